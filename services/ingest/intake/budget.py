"""A budget of memory, shared by all who hold some: refuse beyond it, or wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from shoal.errors import ResourceExhausted

RETRY_AFTER_MS = 200


class Budget:
    """`limit` bytes. Something larger than the whole budget passes when it is alone."""

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._used = 0
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        return self._used

    @asynccontextmanager
    async def of(self, nbytes: int, *, waits: bool) -> AsyncIterator[None]:
        """Holds `nbytes` for the length of the block. Those who wait get it in the order of their coming.

        Raises:
            ResourceExhausted: it is spent, and `waits` is False.
        """
        if waits:
            await self.wait_for(nbytes)
        else:
            self.take(nbytes)
        try:
            yield
        finally:
            self.give_back(nbytes)

    def take(self, nbytes: int) -> None:
        """Holds `nbytes` until they are given back.

        Raises:
            ResourceExhausted: it is spent.
        """
        if self._line or not self._fits(nbytes):
            raise ResourceExhausted(
                f"{self._used} bytes of {self._what} are held already and the limit is {self._limit}: "
                "come back in a moment",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._used += nbytes

    async def wait_for(self, nbytes: int) -> None:
        """The same, but waits for room."""
        if self._line or not self._fits(nbytes):
            await self._wait(nbytes)
        else:
            self._used += nbytes

    def give_back(self, nbytes: int) -> None:
        """Holds `nbytes` no more."""
        self._used -= nbytes
        self._admit()

    def _fits(self, nbytes: int) -> bool:
        return self._used == 0 or self._used + nbytes <= self._limit

    async def _wait(self, nbytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (nbytes, turn)
        self._line.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._used -= nbytes
            else:
                with suppress(ValueError):  # Somebody who released may have passed over it already.
                    self._line.remove(entry)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            nbytes, turn = self._line.popleft()
            if not turn.done():
                self._used += nbytes
                turn.set_result(None)
