"""Whether a file of connectors is right, before a node is started with it. Only ingest knows how to read one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shoal.errors import DeadlineExceeded, InvalidArgument

_WITHIN_S = 60.0


def check(path: Path) -> None:
    """Has ingest's code look at the file.

    Raises:
        InvalidArgument: a line for each mistake, with its key.
        DeadlineExceeded: the file is no file, but something that never ends.
    """
    argv = [sys.executable, "-P", "-m", "services.ingest.connectors", str(path)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"--connectors {path}: could not be read within {_WITHIN_S:.0f} s") from None
    if done.returncode != 0:
        raise InvalidArgument(f"--connectors {path}: {done.stderr.strip()}")
