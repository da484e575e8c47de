"""The examples as a user runs them: beside a real node, against the original packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples import originals

Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(repository_root: Path, tmp_path: Path) -> Run:
    """`run("examples.speech.demo")`: the finished process; nothing of it is left in the temporary folder."""
    if not originals.VENV.exists():
        pytest.fail("the original packages have an environment of their own: run `make test`")

    def start(module: str) -> subprocess.CompletedProcess[str]:
        runtime = tmp_path / "runtime"
        runtime.mkdir(mode=0o700)
        environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        command = [sys.executable, "-m", module]
        done = subprocess.run(
            command, cwd=repository_root, env=environ, capture_output=True, text=True, timeout=170, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return start
