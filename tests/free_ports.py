"""Ports that parts of tests bind later than they are chosen, and again after they were killed.

Between the choice and the bind, the kernel may give a port of its own range to whoever binds port 0 or connects. These
ports are below that range, and each worker of a parallel run has its own.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from itertools import cycle

# Linux's own range begins at 32768.
_FIRST, _EACH = 10_000, 5_000


def free_port() -> int:
    """Return a loopback port that nobody has, and that this process has not returned for a long time."""
    for _ in range(_EACH):
        port = next(_ports)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("no loopback port is free")


def _all() -> Iterator[int]:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw3").removeprefix("gw")
    first = _FIRST + int(worker) % 4 * _EACH
    # Anywhere in it: other runs on this machine have the same ports.
    start = random.SystemRandom().randrange(_EACH)
    return cycle([*range(first + start, first + _EACH), *range(first, first + start)])


_ports = _all()
