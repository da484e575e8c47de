"""Room that calls of all tenants share. A call that finds none waits in the queue of its tenant; tenants take turns.

admit ──queue of its tenant ──turn, room──> the call goes on ──> release
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from mesh.h2.memory_account import leaves_room
from shoal.errors import Unavailable

WAIT_S = 30.0
"""Longest wait of a short read or change for its turn. While MongoDB is unavailable, each one takes 6 s to fail."""


class _Waiter(NamedTuple):
    size: int
    admitted: asyncio.Future[None]


class TenantTurns:
    """Room of `limit` units. A call for more than that is admitted alone.

    With `leaves_room`, a tenant may hold twice as many units as are free, as in `mesh.rpc.places`, and while its next
    call waits, calls of others are admitted. Without, the next call in turn holds up all others until it fits: a large
    one would wait for ever behind small ones.
    """

    def __init__(self, limit: int, *, leaves_room: bool = False, wait_s: float | None = None) -> None:
        """Allow `limit` units at a time; `wait_s` bounds the time that `take` waits for room (None: no bound)."""
        self._limit = limit
        self._leaves_room = leaves_room
        self._wait_s = wait_s
        self.held = 0
        """Units of the calls that were admitted."""
        self._held_by: Counter[str] = Counter()
        # Tenants in the order of their next turns, with their calls in the order of arrival.
        self._waiting: dict[str, deque[_Waiter]] = {}

    async def admit(self, tenant: str, size: int = 1) -> None:
        """Return once a call of `tenant` has room for `size` units."""
        waiter = _Waiter(size, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(waiter)
        self._admit_waiting()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter.admitted.done() and not waiter.admitted.cancelled():
                self.release(tenant, size)
            else:
                # It may have held up others.
                waiter.admitted.cancel()
                self._admit_waiting()
            raise

    def try_admit(self, tenant: str, size: int = 1) -> bool:
        """Admit a call of `tenant` if it need not wait; return False, without an effect, when it would."""
        if tenant in self._waiting or (self.held and self.held + size > self._limit):
            return False
        if self._leaves_room and not self._may_hold(tenant, size):
            return False
        self._hold(tenant, size)
        return True

    def held_by(self, tenant: str) -> int:
        """Return the units that calls of `tenant` hold."""
        return self._held_by[tenant]

    @asynccontextmanager
    async def take(self, tenant: str, size: int = 1) -> AsyncIterator[None]:
        """Hold room for as long as the block lasts; wait for it first.

        Raises:
            Unavailable: there was none for `wait_s`.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self.admit(tenant, size)
        except TimeoutError:
            raise Unavailable(f"the call has waited for its turn for {self._wait_s:g} s: retry later") from None
        try:
            yield
        finally:
            self.release(tenant, size)

    def release(self, tenant: str, size: int = 1) -> None:
        """Give the room of a call back."""
        self._hold(tenant, -size)
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._admit_next():
            pass

    def _admit_next(self) -> bool:
        """Admit the next call in turn that may go on. Return False when there is none."""
        for tenant, queue in [*self._waiting.items()]:
            while queue and queue[0].admitted.done():
                queue.popleft()
            if not queue:
                del self._waiting[tenant]
                continue
            size, admitted = queue[0]
            if self.held and self.held + size > self._limit:
                return False
            if self._leaves_room and not self._may_hold(tenant, size):
                continue
            self._hold(tenant, size)
            admitted.set_result(None)
            # The others are next.
            queue.popleft()
            del self._waiting[tenant]
            if queue:
                self._waiting[tenant] = queue
            return True
        return False

    def _may_hold(self, tenant: str, size: int) -> bool:
        held = self._held_by[tenant]
        return not held or leaves_room(held, size, self._limit - self.held)

    def _hold(self, tenant: str, size: int) -> None:
        self.held += size
        self._held_by[tenant] += size
        if not self._held_by[tenant]:
            del self._held_by[tenant]
