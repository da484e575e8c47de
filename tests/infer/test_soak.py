"""Some seconds of bench/soak.py find plain faults; ten minutes (`make soak`) find rare ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.long_form import by_form

SECONDS = by_form(6, 15)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("front", os.environ.get("SHOAL_TEST_FRONTS", "auto").split(","))
def test_load_of_all_kinds_holds(front: str, python: str, repository_root: Path) -> None:
    command = [python, "bench/soak.py", "--seconds", str(SECONDS), "--front", front]
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
