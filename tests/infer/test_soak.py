"""Half a minute of bench/soak.py: ten minutes of it (`make soak`) find what is rare, this what is plainly broken."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SECONDS = 30


@pytest.mark.timeout(240)
def test_load_of_all_kinds_holds(python: str, repository_root: Path) -> None:
    command = [python, "bench/soak.py", "--seconds", str(SECONDS)]
    done = subprocess.run(
        command,
        cwd=repository_root,
        env={**os.environ, "PYTHONPATH": str(repository_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for kind in ("unary", "deadline", "cancelled", "bad", "stream", "decoupled", "reload", "memory"):
        assert kind in done.stdout
