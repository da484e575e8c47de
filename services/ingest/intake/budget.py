"""Memory budget shared by many holders: beyond it, they wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Budget:
    """Budget of `limit` bytes. An amount above the whole budget is granted when nothing else is held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        return self._used

    @asynccontextmanager
    async def of(self, nbytes: int) -> AsyncIterator[None]:
        """Wait for `nbytes`, and hold them for the duration of the block. Waiters are served in order of arrival."""
        await self.wait_for(nbytes)
        try:
            yield
        finally:
            self.give_back(nbytes)

    async def wait_for(self, nbytes: int) -> None:
        """Wait until `nbytes` are free, and hold them until `give_back`."""
        if self._waiters or not self._fits(nbytes):
            await self._wait(nbytes)
        else:
            self._used += nbytes

    def give_back(self, nbytes: int) -> None:
        """Release `nbytes`, and serve waiters."""
        self._used -= nbytes
        self._admit()

    def _fits(self, nbytes: int) -> bool:
        return self._used == 0 or self._used + nbytes <= self._limit

    async def _wait(self, nbytes: int) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (nbytes, granted)
        self._waiters.append(entry)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._used -= nbytes
            else:
                # A release may have skipped this cancelled entry already.
                with suppress(ValueError):
                    self._waiters.remove(entry)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiters and self._fits(self._waiters[0][0]):
            nbytes, granted = self._waiters.popleft()
            if not granted.done():
                self._used += nbytes
                granted.set_result(None)
