"""MongoDB transactions: all writes or none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import pymongo
from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import TIMEOUT_MS
from services.store.documents import Collections

T = TypeVar("T")


async def transaction(collections: Collections, work: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
    """Run `work` in one transaction, possibly more than once. Raises pymongo's errors, and those of `work`."""
    # pymongo would retry a transaction for two minutes.
    with pymongo.timeout(TIMEOUT_MS / 1000):
        async with collections.db.client.start_session() as session:
            return await session.with_transaction(work)
