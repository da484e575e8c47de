"""Check of a connectors file before a node starts with it. ingest's own code reads the file, in a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shoal.errors import DeadlineExceeded, InvalidArgument

_WITHIN_S = 60.0


def check(path: Path) -> None:
    """Check the file `path` with ingest's code.

    Raises:
        InvalidArgument: the file is invalid; the message has a line for each mistake, with its key.
        DeadlineExceeded: reading the file did not end in time, as with a pipe.
    """
    argv = [sys.executable, "-P", "-m", "services.ingest.connectors", str(path)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"--connectors {path}: could not be read within {_WITHIN_S:.0f} s") from None
    if done.returncode != 0:
        raise InvalidArgument(f"--connectors {path}: {done.stderr.strip()}")
