"""Real frameworks and exporters, in an environment of their own: each file of originals/ is a run in there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "originals"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("test_*.py")))
def test_in_the_frameworks_own_environment(file: str, repository_root: Path) -> None:
    python = repository_root / ".venv-originals/bin/python"
    if not python.exists():
        pytest.fail("the frameworks have an environment of their own: run `make test`")
    command = [python, "-m", "pytest", "-q", "-c", HERE / "pytest.ini", "--confcutdir", HERE, HERE / file]
    environ = {**os.environ, "PYTHONPATH": str(repository_root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
