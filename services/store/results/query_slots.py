"""Queries over results that run at a time: a filter that matches nothing may read all results of its tenant.

    query ──a slot is free──────────────────────────────────────> MongoDB
      └────none, or the tenant holds too many──> queue of its tenant ──turn──┘

A tenant may hold twice as many slots as are free, as in `mesh.rpc.places`. So its queries neither take all connections
to MongoDB, for which other calls would wait, nor keep other tenants from querying.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.h2.memory_account import FREE_FACTOR

# A third of the connections of a store (`mesh.mongo`).
_LIMIT = 16


class QuerySlots:
    """Slots for queries. Tenants take turns."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self.free = limit
        self._held: Counter[str] = Counter()
        # Tenants in the order of their next turns, with their queries in the order of arrival.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def take(self, tenant: str) -> AsyncIterator[None]:
        """Hold a slot for as long as the block lasts; wait for it first."""
        if tenant in self._waiting or not self._may(tenant):
            await self._turn(tenant)
        else:
            self._hold(tenant, 1)
        try:
            yield
        finally:
            self._hold(tenant, -1)
            self._admit_waiting()

    async def _turn(self, tenant: str) -> None:
        """Wait for a slot, which the call holds then."""
        admitted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(admitted)
        try:
            await admitted
        except asyncio.CancelledError:
            if not admitted.cancel() and not admitted.cancelled():
                self._hold(tenant, -1)
            self._admit_waiting()
            raise

    def _may(self, tenant: str) -> bool:
        held = self._held[tenant]
        return self.free > 0 and (not held or held + 1 <= FREE_FACTOR * (self.free - 1))

    def _hold(self, tenant: str, slots: int) -> None:
        self.free -= slots
        self._held[tenant] += slots
        if not self._held[tenant]:
            del self._held[tenant]

    def _admit_waiting(self) -> None:
        while any(self._admit_first(tenant) for tenant in list(self._waiting)):
            pass

    def _admit_first(self, tenant: str) -> bool:
        """Admit the tenant's first query if it may run now; the other tenants are next. Return True if it was."""
        queue = self._waiting[tenant]
        while queue and queue[0].done():
            queue.popleft()
        is_admitted = bool(queue) and self._may(tenant)
        if is_admitted:
            self._hold(tenant, 1)
            queue.popleft().set_result(None)
        if is_admitted or not queue:
            del self._waiting[tenant]
        if is_admitted and queue:
            self._waiting[tenant] = queue
        return is_admitted
