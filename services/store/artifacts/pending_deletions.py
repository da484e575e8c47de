"""Pending deletions: a document in the collection `graves` records a blob's deletion before the blob is removed.

A recorded blob is removed for certain, after any crash. Removal waits a while, so that current readers can finish, and
waits for running backups, which may still need the blob.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import translated
from services.store.documents import Collections

_NEVER = datetime(9999, 1, 1, tzinfo=UTC)


class PendingDeletions:
    """Keys of blobs that no document refers to any more."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    async def schedule(self, keys: Sequence[str], now: datetime, session: AsyncClientSession | None = None) -> None:
        """Record the deletion of blobs. With `session`: in the transaction that removes their last use."""
        if keys:
            entries = [UpdateOne({"_id": key}, {"$setOnInsert": {"buried_at": now}}, upsert=True) for key in keys]
            with translated("scheduling the deletion of blobs"):
                await self._collections.pending_deletions.bulk_write(entries, ordered=False, session=session)

    async def exclude(self, key: str, session: AsyncClientSession) -> None:
        """In a transaction: raise DuplicateKeyError when the blob's deletion is pending, and prevent a new one."""
        entry = {"_id": key, "buried_at": _NEVER}
        await self._collections.pending_deletions.insert_one(entry, session=session)
        await self._collections.pending_deletions.delete_one({"_id": key}, session=session)

    async def are_on_hold(self, now: datetime) -> bool:
        """Return True while a running backup forbids the removal of blobs."""
        with translated("looking for backups under way"):
            return await self._collections.holds.find_one({"expires_at": {"$gt": now}}) is not None

    async def has(self, key: str) -> bool:
        """Return True when the deletion of that blob is pending."""
        with translated("looking for a pending deletion"):
            return await self._collections.pending_deletions.find_one({"_id": key}) is not None
