"""Freed memory goes back to the system once requests are over."""

from __future__ import annotations

import asyncio
import ctypes

import pytest

from mesh.process import freed_memory
from mesh.process.freed_memory import FreedMemory

PATIENCE_S = 30.0
PIECES, PIECE_BYTES = 1024, 64 << 10

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only")


async def test_memory_is_returned_when_requests_hold_little(monkeypatch):
    monkeypatch.setattr(freed_memory, "_CHECK_S", 0.01)
    is_quiet = False
    watch = FreedMemory(lambda: is_quiet)
    # Otherwise, memory that earlier tests have freed would be used again.
    freed_memory.return_freed_memory()
    watch.start()
    before = freed_memory._resident_bytes()
    pieces = [b"x" * PIECE_BYTES for _ in range(PIECES)]
    # The newest piece stays: glibc itself returns only what is above the last one in use.
    last = pieces[-1]
    pieces.clear()
    await asyncio.sleep(0.05)
    kept = freed_memory._resident_bytes()
    assert kept - before > PIECES * PIECE_BYTES / 2
    is_quiet = True
    async with asyncio.timeout(PATIENCE_S):
        while freed_memory._resident_bytes() > before + PIECES * PIECE_BYTES / 8:
            await asyncio.sleep(0.01)
    watch.stop()
    assert len(last) == PIECE_BYTES
