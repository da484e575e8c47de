"""Reads of MongoDB's log by watches that are far behind, and other reads of many documents. Tenants take turns.

A watch that resumes far back in the log gets no answer until MongoDB has read the log up to a change that matches, or
to its end: some 100,000 changes a second of a core. Once it has had an empty answer, it is no longer behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pymongo

from mesh.rpc.tenant_turns import TenantTurns

T = TypeVar("T")

AT_ONCE = 4
AWAIT_MS = 10
"""`max_await_time_ms` of a watch that is behind: at the end of the log, its turn is over soon."""
_LONGEST_S = 1_800.0
# MongoDB notices within this time that a client has left.
_NOTICED_S = 0.5


class LogReads:
    """Turns of the tenants' reads."""

    def __init__(self) -> None:
        self._turns = TenantTurns(AT_ONCE, leaves_room=True)

    async def read(self, tenant: str, read: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `read`, which may take up to 30 minutes, in a turn of `tenant`."""
        async with self._turns.take(tenant):
            with pymongo.timeout(_LONGEST_S):
                try:
                    return await read()
                except asyncio.CancelledError:
                    # MongoDB reads on until it notices that nobody waits.
                    await asyncio.sleep(_NOTICED_S)
                    raise
