"""Freed memory goes back to the system: glibc keeps it for reuse, and a process would keep its peak for ever.

check ──1 s──> check (resident memory has grown, little is held) ──a thread──> caches shrink, malloc_trim
           └──> check (objects have grown old, and little is held or 10 s have passed) ──> full garbage collection
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CHECK_S = 1.0

# Growth that is left to glibc. A trim costs some 0.1 ms a MiB that it finds, and allocations wait meanwhile.
_KEPT_BYTES = 8 << 20

# Memory that a trim does not return is in use, and may be freed later. Trims that return little are so many checks
# apart: 1, 2, 4, ...
_MOST_APART = 16

# A full garbage collection is due after so many of the second generation: 500,000 objects.
_COLLECTED_AFTER = 50

# While requests hold much, a collection that is due waits at least so long, and full collections take at most this
# part of the time: each stops the event loop, for 150 ms with 10,000 open streams.
_PATIENCE_S = 10.0
_COLLECTING_SHARE = 0.01

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Returns freed memory once requests are over, and collects garbage, from `start` to `stop`.

    Args:
        is_quiet: True when requests hold little memory.
        shrink: frees memory that others keep for reuse; called by a thread. None: nothing keeps any.
    """

    def __init__(self, is_quiet: Callable[[], bool], shrink: Callable[[], None] | None = None) -> None:
        self._is_quiet = is_quiet
        self._shrink = shrink
        self._pool = ThreadPoolExecutor(1, "freed-memory")
        self._least_bytes = self._trimmed_at_bytes = 0
        self._apart = self._left = 1
        self._was_quiet = False
        self._collect_at_s: float | None = None
        self._collection_s = 0.0

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
        # What a call holds is released before its objects are gone.
        is_quiet, self._was_quiet = self._was_quiet, self._is_quiet()
        is_quiet &= self._was_quiet
        self._collect(is_quiet=is_quiet)
        resident = _resident_bytes()
        self._least_bytes = min(self._least_bytes, resident)
        if resident <= self._least_bytes + _KEPT_BYTES or resident <= self._trimmed_at_bytes - _KEPT_BYTES:
            self._apart = self._left = 1
        if resident <= self._least_bytes + _KEPT_BYTES or not is_quiet:
            return
        self._left -= 1
        if not self._left:
            self._apart = self._left = min(2 * self._apart, _MOST_APART)
            self._trimmed_at_bytes = resident
            self._pool.submit(self._return)

    def _return(self) -> None:
        if self._shrink is not None:
            self._shrink()
        return_freed_memory()

    def _collect(self, *, is_quiet: bool) -> None:
        if gc.get_count()[2] <= _COLLECTED_AFTER:
            return
        now = time.perf_counter()
        if self._collect_at_s is None:
            self._collect_at_s = now + max(_PATIENCE_S, self._collection_s / _COLLECTING_SHARE)
        if is_quiet or now >= self._collect_at_s:
            gc.collect()
            self._collection_s = time.perf_counter() - now
            self._collect_at_s = None


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    # Not Linux.
    except OSError:
        return 0
