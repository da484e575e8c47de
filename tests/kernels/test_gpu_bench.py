"""bench/gpu.py measures a GPU or nothing: without one it says so and fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import backend


@pytest.mark.parametrize(("script", "status"), [("gpu.py", 2), ("gpu_checks.py", 1)])
def test_without_a_gpu_it_says_so_and_fails(script: str, status: int, repository_root: Path) -> None:
    if backend.device_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run([sys.executable, f"bench/{script}"], cwd=repository_root, capture_output=True, text=True)
    assert ran.returncode == status
    assert backend.why_no_device() in ran.stderr
    assert not ran.stdout
