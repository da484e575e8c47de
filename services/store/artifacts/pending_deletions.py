"""Blobs that are to go: first a grave says so, then they are removed.

What a grave names is removed for certain, after any crash. It is removed only a while later, so that whoever reads it
now can end, and not while a backup is being made, which may still need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import translated
from services.store.documents import Collections

_NEVER = datetime(9999, 1, 1, tzinfo=UTC)


class Graves:
    """Keys of blobs that no document means any more."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    async def bury(self, keys: Sequence[str], now: datetime, session: AsyncClientSession | None = None) -> None:
        """Has the blobs removed, once this is durable. In a transaction: together with what ends their use."""
        if keys:
            graves = [UpdateOne({"_id": key}, {"$setOnInsert": {"buried_at": now}}, upsert=True) for key in keys]
            with translated("burying blobs"):
                await self._collections.graves.bulk_write(graves, ordered=False, session=session)

    async def exclude(self, key: str, session: AsyncClientSession) -> None:
        """In a transaction: fails with DuplicateKeyError when there is a grave, and keeps one from being made."""
        grave = {"_id": key, "buried_at": _NEVER}
        await self._collections.graves.insert_one(grave, session=session)
        await self._collections.graves.delete_one({"_id": key}, session=session)

    async def are_held(self, now: datetime) -> bool:
        """Whether somebody needs that no blob is removed: a backup that is under way."""
        with translated("looking for backups under way"):
            return await self._collections.holds.find_one({"expires_at": {"$gt": now}}) is not None

    async def has(self, key: str) -> bool:
        """Whether that blob is to go."""
        with translated("looking for a grave"):
            return await self._collections.graves.find_one({"_id": key}) is not None
