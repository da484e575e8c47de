"""Pauses in the loops of calls over many items: of all calls, one goes on in each iteration of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

# Documents of results or jobs between two pauses: 16 take about a millisecond.
_ITEMS = 16


class Pauses:
    """Pauses that calls share. Ten pages of 1,000 documents at once would hold the event loop for seconds."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def pause(self) -> None:
        """Let other work go on, and then the call that has waited for the longest time."""
        async with self._turn:
            await asyncio.sleep(0)

    async def each(
        self, items: Iterable[T], *, every: int = _ITEMS, weight: Callable[[T], int] = lambda _: 1
    ) -> AsyncIterator[T]:
        """Yield `items`, with a pause after each `every` of them. An item counts as `weight` says."""
        passed = 0
        for item in items:
            yield item
            passed += weight(item)
            if passed >= every:
                passed = 0
                await self.pause()
