"""Lock that one call holds at a time; the tenants of the calls that wait take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TenantLock:
    """The lock. The calls bound what waits: each holds its request in its memory account."""

    def __init__(self) -> None:
        self._is_held = False
        # Tenants in the order of their next turns, with their calls in the order of arrival.
        self._waiting: dict[bytes, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def held_by(self, tenant: bytes) -> AsyncIterator[None]:
        """Hold the lock in the block, after the wait for the tenant's turn."""
        if self._is_held:
            await self._turn(tenant)
        self._is_held = True
        try:
            yield
        finally:
            self._hand_on()

    async def _turn(self, tenant: bytes) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # Otherwise the lock was handed to this call, and is lost.
            if not turn.cancelled():
                self._hand_on()
            raise

    def _hand_on(self) -> None:
        """Give the lock to the first call of the next tenant, or to nobody."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._is_held = False
