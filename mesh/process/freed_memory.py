"""Freed memory goes back to the system: glibc keeps it for reuse, and a process would keep its peak for ever.

check ──1 s──> check (resident memory has grown, little is held) ──a thread──> malloc_trim
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CHECK_S = 1.0

# Growth that is left to glibc. A trim costs some 0.1 ms a MiB that it finds, and allocations wait meanwhile.
_KEPT_BYTES = 8 << 20

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Returns freed memory once requests are over, from `start` to `stop`.

    Args:
        is_quiet: True when requests hold little memory.
    """

    def __init__(self, is_quiet: Callable[[], bool]) -> None:
        self._is_quiet = is_quiet
        self._pool = ThreadPoolExecutor(1, "freed-memory")
        self._least_bytes = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._least_bytes = _resident_bytes()
        self._set()

    def stop(self) -> None:
        self._timer.cancel()
        self._pool.shutdown(wait=False)

    def _set(self) -> None:
        self._timer = self._loop.call_later(_CHECK_S, self._check)

    def _check(self) -> None:
        self._set()
        resident = _resident_bytes()
        self._least_bytes = min(self._least_bytes, resident)
        if resident > self._least_bytes + _KEPT_BYTES and self._is_quiet():
            # Memory that a trim does not return is in use.
            self._least_bytes = resident
            self._pool.submit(return_freed_memory)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    # Not Linux.
    except OSError:
        return 0
