"""Reading of a process's metrics on the event loop, in pieces that leave it time for calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from mesh.metrics.families import Reading, Source

# Longest piece, and readings between two looks at the clock: each takes 2 to 30 us. Calls in flight wait for a piece.
_PIECE_S, _LOOK_AT = 0.005, 32


async def read(
    sources: Iterable[Source], take: Callable[[Reading], object], clock: Callable[[], float] = time.monotonic
) -> None:
    """Pass every reading of all sources to `take`. The event loop has a turn after each piece."""
    count, began = 0, clock()
    for source in sources:
        for reading in source():
            take(reading)
            count += 1
            if count % _LOOK_AT == 0 and clock() - began >= _PIECE_S:
                await asyncio.sleep(0)
                began = clock()


async def snapshot(sources: Iterable[Source]) -> list[Reading]:
    """Return the readings of all sources."""
    found: list[Reading] = []
    await read(sources, found.append)
    return found
