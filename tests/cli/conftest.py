"""The command line against a server that answers as a test tells it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.cli.main import main
from tests.client.served import Served

Shoal = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served().start()
    yield server
    server.close()


@pytest.fixture
def shoal(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shoal:
    """Runs `shoal ARGS` against the server, in this process; `stdin=...` is what it reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def run(*args: str, stdin: bytes = b"", **environ: str) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch:
            for key, value in {"SHOAL_GATEWAY": served.address, **environ}.items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", ["shoal", *args])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main()
        status = ended.value.code or 0
        return subprocess.CompletedProcess(args, int(status), out.getvalue(), err.getvalue())

    return run
