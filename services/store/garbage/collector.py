"""Garbage collector: removes unused artifacts and blobs, in steps that may be interrupted or run twice at once.

    artifact ──unreferenced, not kept──> marked ──still so, a while later──> document deleted, deletion pending
        ^                                  │              (one transaction)          ──(a while later)──> blob removed
        └──── uploaded, requested or referenced: no longer marked

    blob without document ──old──> deletion pending ──> blob removed, if there is still no document

No step races a new reference: a reference writes to the artifact's document in its own transaction, so it conflicts
with the transaction that deletes the document. No step races an upload: keys are never reused, an artifact's document
is written in a transaction that excludes a pending deletion, and documents are read again before a blob is removed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import Document, translated
from services.store.artifacts.artifacts import WITHOUT_BLOCKS
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.pending_deletions import PendingDeletions
from services.store.artifacts.stored import FOLDER, key_of
from services.store.documents import Collections, is_being_restored
from services.store.garbage.uses import Uses
from services.store.results.large_responses import FOLDER as RESPONSES
from services.store.transactions import transaction

T = TypeVar("T")

AT_ONCE = 500
"""Artifacts or blobs that are looked up together: one index query for each kind of use."""


@dataclass(frozen=True, slots=True)
class Ages:
    """Minimum ages of the steps."""

    marked: timedelta = timedelta(minutes=10)
    """Between two checks that both find no reference. Not needed for safety: it spares clients a second upload."""
    pending: timedelta = timedelta(minutes=10)
    """Before an unused blob is removed, so that its current readers can finish."""
    stray: timedelta = timedelta(days=1)
    """Before a blob without a document counts as a stray, and not as an upload in progress."""


@dataclass(frozen=True, slots=True)
class Collected:
    """Counts of one collection."""

    marked: int = 0
    artifacts: int = 0
    """Artifacts that were deleted."""
    blobs: int = 0
    """Blobs that were removed."""
    strays: int = 0
    """Blobs without a document whose deletion is pending now."""


class Collector:
    """The garbage collector. Every method may be called at any time, by any instance."""

    def __init__(
        self, collections: Collections, blobs: BlobStore, clock: Callable[[], datetime], ages: Ages | None = None
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._clock = clock
        self._ages = ages or Ages()
        self._deletions = PendingDeletions(collections)
        self._uses = Uses(collections)

    async def collect(self, *, strays: bool = False) -> Collected:
        """Run every step once; `strays` only on request, because that step lists every blob.

        Raises:
            ShoalError: MongoDB or the blobs are unavailable. Finished steps stay done.
        """
        with translated("collecting artifacts"):
            # A restore inserts artifacts before their references.
            if await is_being_restored(self._collections):
                return Collected()
            marked = await self.mark()
            deleted = await self.delete_artifacts()
            found = await self.find_strays() if strays else 0
            removed = await self.remove_blobs()
        return Collected(marked, deleted, removed, found)

    async def mark(self) -> int:
        """Mark the artifacts that have no reference and were not requested lately. Return their number."""
        now = self._clock()
        # `$not $gte` and not `$lt`: artifacts of an older version have no `keep_until`.
        kept_no_longer = {"keep_until": {"$not": {"$gte": now}}, "condemned_at": {"$exists": False}}
        marked = 0
        async for docs in batches(self._collections.artifacts.find(kept_no_longer, {"_id": 1})):
            digests = {doc["_id"] for doc in docs}
            unreferenced = digests - await self._uses.referenced(digests)
            query = {"_id": {"$in": list(unreferenced)}, **kept_no_longer}
            change = {"$set": {"condemned_at": now}}
            marked += (await self._collections.artifacts.update_many(query, change)).modified_count
        return marked

    async def delete_artifacts(self) -> int:
        """Delete the documents of artifacts that were marked long ago and still have no reference."""
        long_ago = self._clock() - self._ages.marked
        deleted = 0
        async for doc in self._collections.artifacts.find({"condemned_at": {"$lte": long_ago}}, WITHOUT_BLOCKS):
            deleted += await self._delete_artifact(doc)
        return deleted

    async def find_strays(self) -> int:
        """Schedule the deletion of every old blob that no document refers to. Return their number."""
        before = self._clock() - self._ages.stray
        found = 0
        for folder in (FOLDER, RESPONSES):
            old = (blob.key async for blob in self._blobs.list(folder) if blob.modified_at < before)
            async for keys in batches(old):
                strays = sorted(set(keys) - await self._uses.used_keys(keys))
                await self._deletions.schedule(strays, self._clock())
                found += len(strays)
        return found

    async def remove_blobs(self) -> int:
        """Remove the blobs whose pending deletion is old enough. Return their number."""
        if await self._deletions.are_on_hold(self._clock()):
            return 0
        long_ago = self._clock() - self._ages.pending
        removed = 0
        async for docs in batches(
            self._collections.pending_deletions.find({"buried_at": {"$lte": long_ago}}, {"_id": 1})
        ):
            keys = [doc["_id"] for doc in docs]
            # An upload that took a day may have been recorded meanwhile: its blob stays.
            used = await self._uses.used_keys(keys)
            for key in keys:
                if key not in used:
                    await self._blobs.remove(key)
                    removed += 1
            await self._collections.pending_deletions.delete_many({"_id": {"$in": keys}})
        return removed

    async def _delete_artifact(self, marked: Document) -> bool:
        """Delete one artifact, if it is still marked and has no reference."""
        still = {"_id": marked["_id"], "condemned_at": marked["condemned_at"]}

        async def all_or_nothing(session: AsyncClientSession) -> bool:
            doc = await self._collections.artifacts.find_one_and_delete(still, WITHOUT_BLOCKS, session=session)
            if doc is None:
                return False
            if await self._uses.referenced([doc["_id"]], session):
                raise _Referred
            await self._deletions.schedule([key_of(doc)], self._clock(), session)
            return True

        try:
            return await transaction(self._collections, all_or_nothing)
        except _Referred:
            await self._collections.artifacts.update_one(still, {"$unset": {"condemned_at": ""}})
            return False


class _Referred(Exception):
    """The artifact has a reference: roll the transaction back."""


async def batches(items: AsyncIterator[T]) -> AsyncIterator[Sequence[T]]:
    """Yield the items in lists of AT_ONCE."""
    batch: list[T] = []
    async for item in items:
        batch.append(item)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
