"""Arrival order of a sequence's steps while they are read; large ones are read on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.infer.sequences.rows import SequenceId


class ArrivalOrder:
    """A fair lock for each sequence, by tenant and id: no step overtakes an earlier one of its sequence."""

    def __init__(self) -> None:
        self._locks: dict[tuple[str, SequenceId], tuple[asyncio.Lock, int]] = {}

    def is_free(self, id: tuple[str, SequenceId]) -> bool:
        """Return True when no step of the sequence is being read: one that is read immediately overtakes none."""
        return id not in self._locks

    @asynccontextmanager
    async def in_order(self, id: tuple[str, SequenceId]) -> AsyncIterator[None]:
        """Wait until all earlier steps of the sequence have left the block; first come, first served."""
        lock, users = self._locks.get(id) or (asyncio.Lock(), 0)
        self._locks[id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[id]
            if users == 1:
                del self._locks[id]
            else:
                self._locks[id] = (lock, users - 1)
