"""A real `shoal serve` for the examples."""

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
    """Serve the folder `models` on a free port during the block; yield the address and the pid.

    `settings` are environment variables of the server.

    Raises:
        RuntimeError: the server ended before it was ready; the message contains the end of its output.
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
    text = ""
    for line in server.stdout:
        text += line
        # The end of the JSON object that the server prints when it is ready.
        if line.rstrip() == "}":
            return str(json.loads(text)["address"])
    log.seek(0)
    raise RuntimeError(f"shoal serve ended before it was ready:\n{text}{log.read()[-4000:]}")
