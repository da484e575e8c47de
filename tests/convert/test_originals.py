"""Real frameworks and exporters, in an environment of their own: originals/ is one run of pytest in there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "originals"


@pytest.mark.timeout(900)
def test_in_the_frameworks_own_environment(repository_root: Path) -> None:
    python = repository_root / ".venv-originals/bin/python"
    if not python.exists():
        pytest.fail("the frameworks have an environment of their own: run `make test`")
    command = [python, "-m", "pytest", "-q", "-c", HERE / "pytest.ini", "--confcutdir", HERE, HERE]
    # The models are small: several threads of three frameworks would only wait for each other.
    environ = {**os.environ, "PYTHONPATH": str(repository_root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
