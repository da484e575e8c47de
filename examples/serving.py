"""`shoal serve` for as long as a block lasts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def serving(models: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """Serves the folder `models` on a free port, with `settings` in its environment: its address and its process.

    Raises:
        RuntimeError: it ended before it served; the message has the end of what it said.
    """
    command = [sys.executable, "-m", "shoal.cli.main", "serve", str(models), "--port", "0", "--json"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **settings},
        )
        with server:
            try:
                yield _address(server, log), server.pid
            finally:
                server.terminate()


def _address(server: subprocess.Popen[str], log: IO[str]) -> str:
    assert server.stdout is not None
    said = ""
    for line in server.stdout:
        said += line
        if line.rstrip() == "}":  # The end of the object that says that it serves.
            return str(json.loads(said)["address"])
    log.seek(0)
    raise RuntimeError(f"shoal serve ended before it served:\n{said}{log.read()[-4000:]}")
