"""A service collects no garbage while it is imported, and does afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SERVICE = """
import gc
from mesh.process import uncollected_imports
from mesh.process.config import ServiceConfig
from mesh.process.main import main

was_enabled = gc.isenabled()

async def run(config: ServiceConfig) -> None:
    print("enabled while it is imported:", was_enabled, "then:", gc.isenabled(), flush=True)

main("ingest", ServiceConfig, run)
"""


def test_collections_begin_when_the_service_runs(tmp_path: Path) -> None:
    environ = os.environ | {"SHOAL_INGEST_INSTANCE": "ingest-0", "SHOAL_INGEST_LISTEN": f"unix:{tmp_path}/x.sock"}
    done = subprocess.run([sys.executable, "-c", SERVICE], capture_output=True, text=True, env=environ, check=False)
    assert done.stdout == "enabled while it is imported: False then: True\n", done.stderr


def test_every_service_imports_it_first(repository_root: Path) -> None:
    for path in repository_root.glob("services/*/__main__.py"):
        imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert imports[0].startswith("from mesh.process import uncollected_imports"), path
