"""Keeps the steps of a sequence in the order of their arrival while they are read, which large ones are on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.infer.sequences.rows import SequenceId


class ArrivalOrder:
    """One line for each sequence. Nobody's step overtakes an earlier one of its own."""

    def __init__(self) -> None:
        self._locks: dict[SequenceId, tuple[asyncio.Lock, int]] = {}

    def is_free(self, id: SequenceId) -> bool:
        """Whether no step of the sequence is being read: then one that is read at once overtakes none."""
        return id not in self._locks

    @asynccontextmanager
    async def in_order(self, id: SequenceId) -> AsyncIterator[None]:
        """Waits until all that came before are through; first come, first served."""
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
