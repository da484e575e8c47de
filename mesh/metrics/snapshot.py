"""Snapshot of a process's metrics: all sources read on the event loop, in pieces that leave it time for calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from mesh.metrics.families import Reading, Source

# Longest piece, and readings between two looks at the clock. Calls in flight wait for a piece.
_PIECE_S, _LOOK_AT = 0.005, 64


async def snapshot(sources: Iterable[Source]) -> list[Reading]:
    """Return the readings of all sources."""
    found: list[Reading] = []
    began = time.monotonic()
    for source in sources:
        for reading in source():
            found.append(reading)
            if len(found) % _LOOK_AT == 0 and time.monotonic() - began >= _PIECE_S:
                await asyncio.sleep(0)
                began = time.monotonic()
    return found
