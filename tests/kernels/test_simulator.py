"""Runs `tests/kernels/simulator`: numba.cuda's kernels in its simulator.

In a process of its own, because numba reads NUMBA_ENABLE_CUDASIM when it is imported, and in the environment that has
numba-cuda (`make .venv-cuda13/.installed`): there is NumPy, numba, pytest and `kernels`, and nothing else of Shoal.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "simulator"


def test_numba_cuda_kernels_in_the_simulator(repository_root: Path) -> None:
    python = repository_root / ".venv-cuda13/bin/python"
    if not python.exists():
        pytest.fail("no numba-cuda: make .venv-cuda13/.installed")
    arguments = ["-q", "-ra", "--import-mode=importlib", "-c", os.devnull, "--rootdir", FOLDER, "--confcutdir", FOLDER]
    ran = subprocess.run(
        [python, "-m", "pytest", *arguments, FOLDER],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(repository_root)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed
    assert int(passed[1]) >= 3
    assert "skipped" not in ran.stdout
