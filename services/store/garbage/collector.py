"""Collects what nobody needs, in steps that may be interrupted anywhere, and be done by several instances at once.

    artifact ──unreferred, not kept──> condemned ──still so, a while later──> document gone, grave ──> blob gone
        ^                                  │              (one transaction)                    (a while later)
        └──── uploaded, asked for or referred to: no longer condemned

    blob without document ──old──> grave ──> blob gone, if there is still no document

Nothing here can race a new reference: it writes to the artifact's document in its own transaction, so that it and the
transaction that deletes the document cannot both succeed. Nor an upload: a key is never used twice, its document is
written in a transaction that excludes a grave, and a blob is removed after a look at documents with the grave there.
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
from services.store.artifacts.pending_deletions import Graves
from services.store.artifacts.stored import FOLDER, key_of
from services.store.documents import Collections, is_being_restored
from services.store.garbage.uses import Uses
from services.store.results.large_responses import FOLDER as RESPONSES
from services.store.transactions import transaction

T = TypeVar("T")

AT_ONCE = 500
"""Artifacts or blobs that are looked up together: one query of an index each way."""


@dataclass(frozen=True, slots=True)
class Ages:
    """How long things are left alone."""

    condemned: timedelta = timedelta(minutes=10)
    """Between two looks that both found no reference. Safety does not rest on it: it spares whoever comes back soon."""
    buried: timedelta = timedelta(minutes=10)
    """Before a blob is removed that nobody means: who reads it now is done by then."""
    stray: timedelta = timedelta(days=1)
    """Before a blob without a document counts as a stray, and not as an upload under way."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What one round did."""

    condemned: int = 0
    artifacts: int = 0
    """Artifacts that are no more."""
    blobs: int = 0
    """Blobs that were removed."""
    strays: int = 0
    """Blobs without a document that will be."""


class Collector:
    """Collects. Every method may be called at any time, by any instance."""

    def __init__(
        self, collections: Collections, blobs: BlobStore, clock: Callable[[], datetime], ages: Ages | None = None
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._clock = clock
        self._ages = ages or Ages()
        self._graves = Graves(collections)
        self._uses = Uses(collections)

    async def collect(self, *, strays: bool = False) -> Collected:
        """One round of everything; of `strays` only when asked, for that lists every blob.

        Raises:
            ShoalError: MongoDB or the blobs are away. What was done stays done.
        """
        with translated("collecting artifacts"):
            if await is_being_restored(self._collections):
                return Collected()  # Artifacts come before what refers to them: none may go.
            condemned = await self.condemn()
            gone = await self.delete()
            found = await self.find_strays() if strays else 0
            removed = await self.dig()
        return Collected(condemned, gone, removed, found)

    async def condemn(self) -> int:
        """Marks what nobody refers to and nobody has asked for lately."""
        now = self._clock()
        # Not "before now": one that an older version stored has no time to be kept.
        kept_no_longer = {"keep_until": {"$not": {"$gte": now}}, "condemned_at": {"$exists": False}}
        marked = 0
        async for docs in batches(self._collections.artifacts.find(kept_no_longer, {"_id": 1})):
            digests = {doc["_id"] for doc in docs}
            unreferred = digests - await self._uses.referred(digests)
            query = {"_id": {"$in": list(unreferred)}, **kept_no_longer}
            change = {"$set": {"condemned_at": now}}
            marked += (await self._collections.artifacts.update_many(query, change)).modified_count
        return marked

    async def delete(self) -> int:
        """Deletes the documents of what has been condemned for long enough, and is still referred to by nobody."""
        long_ago = self._clock() - self._ages.condemned
        gone = 0
        async for doc in self._collections.artifacts.find({"condemned_at": {"$lte": long_ago}}, WITHOUT_BLOCKS):
            gone += await self._deleted(doc)
        return gone

    async def find_strays(self) -> int:
        """Buries every old blob that no document means."""
        before = self._clock() - self._ages.stray
        found = 0
        for folder in (FOLDER, RESPONSES):
            old = (blob.key async for blob in self._blobs.list(folder) if blob.modified_at < before)
            async for keys in batches(old):
                strays = sorted(set(keys) - await self._uses.meant(keys))
                await self._graves.bury(strays, self._clock())
                found += len(strays)
        return found

    async def dig(self) -> int:
        """Removes the blobs whose graves are old enough."""
        if await self._graves.are_held(self._clock()):
            return 0
        long_ago = self._clock() - self._ages.buried
        removed = 0
        async for docs in batches(self._collections.graves.find({"buried_at": {"$lte": long_ago}}, {"_id": 1})):
            keys = [doc["_id"] for doc in docs]
            # After all: an upload that took a day was recorded. Its blob stays.
            meant = await self._uses.meant(keys)
            for key in keys:
                if key not in meant:
                    await self._blobs.remove(key)
                    removed += 1
            await self._collections.graves.delete_many({"_id": {"$in": keys}})
        return removed

    async def _deleted(self, condemned: Document) -> bool:
        """One artifact, if it is still condemned and nobody refers to it."""
        still = {"_id": condemned["_id"], "condemned_at": condemned["condemned_at"]}

        async def all_or_nothing(session: AsyncClientSession) -> bool:
            doc = await self._collections.artifacts.find_one_and_delete(still, WITHOUT_BLOCKS, session=session)
            if doc is None:
                return False
            if await self._uses.referred([doc["_id"]], session):
                raise _Referred
            await self._graves.bury([key_of(doc)], self._clock(), session)
            return True

        try:
            return await transaction(self._collections, all_or_nothing)
        except _Referred:
            await self._collections.artifacts.update_one(still, {"$unset": {"condemned_at": ""}})
            return False


class _Referred(Exception):
    """Ends a transaction: nothing of it is to happen."""


async def batches(items: AsyncIterator[T]) -> AsyncIterator[Sequence[T]]:
    """The items, AT_ONCE by AT_ONCE."""
    batch: list[T] = []
    async for item in items:
        batch.append(item)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
