"""Bound of the responses that a store reads at a time: many calls for large results would need many gigabytes.

    call ──small page, small response──────────────────> read
      └────large──> queue of its tenant ──turn, room──> read ──> message: the server counts it until the client has it

Nothing that waits for a client is in the gate, so a place comes free as fast as disks and MongoDB are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import NamedTuple

READ_BYTES = 128 << 20
"""Responses that are read at a time. Each exists some five times until its message is written."""

UNGATED_BYTES = 1 << 20
"""Responses of one call that are read without a place. MongoDB's connections bound the number of such calls."""


class _Waiter(NamedTuple):
    size: int
    admitted: asyncio.Future[None]


class ReadGate:
    """Places for large reads. Tenants take turns."""

    def __init__(self, limit: int = READ_BYTES) -> None:
        self._limit = limit
        self.held = 0
        # Tenants in the order of their next turns, with their reads in the order of arrival.
        self._waiting: dict[str, deque[_Waiter]] = {}

    def reading(self, tenant: str | None) -> Reading:
        """Return a read of `tenant`, which has no place yet."""
        return Reading(self, tenant or "")

    async def admit(self, tenant: str, size: int) -> None:
        """Return once `size` bytes have a place: in turn, and when they fit or nothing else is read."""
        waiter = _Waiter(size, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(waiter)
        self._admit_waiting()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter.admitted.done() and not waiter.admitted.cancelled():
                self.release(size)
            else:
                # The first of the queue may have been too large for the room that there is.
                waiter.admitted.cancel()
                self._admit_waiting()
            raise

    def release(self, size: int) -> None:
        """Give back the place of `size` bytes."""
        self.held -= size
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._waiting:
            tenant, queue = next(iter(self._waiting.items()))
            size, admitted = queue[0]
            if not admitted.done():
                if self.held and self.held + size > self._limit:
                    return
                self.held += size
                admitted.set_result(None)
            queue.popleft()
            del self._waiting[tenant]
            if queue:
                self._waiting[tenant] = queue


class Reading:
    """The responses that one call reads. Use as `with`: the end gives its place back."""

    def __init__(self, gate: ReadGate, tenant: str) -> None:
        self._gate = gate
        self._tenant = tenant
        self._size = 0

    async def take(self, size: int) -> None:
        """Wait for a place for `size` bytes. Small reads need none, and one that has a place keeps it."""
        if size > UNGATED_BYTES and not self._size:
            await self._gate.admit(self._tenant, size)
            self._size = size

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._size:
            self._gate.release(self._size)
