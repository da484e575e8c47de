"""Artifacts: immutable bytes, named by their SHA-256, verified on the way in and on the way out (`reading`).

    upload ──> staging file (grows, survives) ──> hash right? ──> blob (durable) ──> document: now it exists
                    ^                                  └─ no: the file is discarded, DATA_LOSS      |
                    └──────────────────── kept when one of these fails ────────────────── then it is discarded

A document is written last, so an artifact that is known is there whole. A blob without a document is a stray, which is
collected when it is old (services/store/collecting).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime, timedelta

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from mesh.process.threads import Threads
from services.store.artifacts.blobs import CHUNK_BYTES, BlobStore
from services.store.artifacts.blocks import Blocks, block_bytes
from services.store.artifacts.pending_deletions import Graves
from services.store.artifacts.reading import Reader
from services.store.artifacts.staging import Partial, Staging
from services.store.artifacts.stored import Stored, bytes_fields, key_of, new_key, stored_of
from services.store.artifacts.uploads import TooLong, Upload
from services.store.documents import Collections, whole_milliseconds
from services.store.transactions import transaction
from shoal.errors import Aborted, DataLoss, InvalidArgument, NotFound, ResourceExhausted, ShoalError, Unavailable

KEPT_FOR = timedelta(days=1)
"""What is uploaded, or asked for, stays so long without a reference: a model of many large files takes a while."""
_REFERRED_FOR = timedelta(minutes=10)
# What comes with a reference is referred to in a moment, and goes soon after that reference.
WITHOUT_BLOCKS = {"blocks": 0}
_RACES = 5


class Artifacts:
    """Takes and finds artifacts. Safe beside other instances on the same MongoDB and blobs."""

    def __init__(
        self,
        collections: Collections,
        blobs: BlobStore,
        staging: Staging,
        threads: Threads,
        *,
        max_bytes: int,
        clock: Callable[[], datetime],
        kept_for: timedelta = KEPT_FOR,
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._staging = staging
        self._threads = threads
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept_for = kept_for
        self._graves = Graves(collections)
        self.reader = Reader(collections, blobs, threads)

    async def find(self, digests: Collection[str]) -> dict[str, Stored]:
        """Those of `digests` that are stored whole."""
        with translated("looking for artifacts"):
            query = {"_id": {"$in": list(digests)}, "damaged": {"$ne": True}}
            docs = self._collections.artifacts.find(query, WITHOUT_BLOCKS)
            return {doc["_id"]: stored_of(doc) async for doc in docs}

    async def stat(self, digest: str) -> tuple[Stored | None, int]:
        """The artifact when it is whole, and the bytes of it that are here. Who asks is given time to refer to it.

        Raises:
            NotFound: nothing of it is here.
        """
        if (artifact := (await self.find([digest])).get(digest)) and await self._keep(digest, self._kept_for):
            return artifact, artifact.size
        if received := await self._threads.run(self._staging.received, digest):
            return None, received
        raise NotFound(f"artifact {digest}: nothing of it is stored")

    async def put(self, upload: Upload) -> tuple[Stored, bool]:
        """Stores an upload, or says that it is stored already (True) without reading the rest of it.

        A stream that breaks leaves what has come, to be resumed.

        Raises:
            InvalidArgument: size_bytes contradicts the artifact that is there, or the stream and its header disagree.
            DataLoss: the bytes do not hash to the digest. All of them are discarded.
            FailedPrecondition: no earlier upload stopped at the offset, or there is no folder or bucket to put it in.
            ResourceExhausted: over the size limit, too many uploads, or the disk is full.
            Unavailable: MongoDB or the blob store is away, or it took a day to record it: resume it.
        """
        if upload.size > self._max_bytes:
            raise ResourceExhausted(f"header.size_bytes: {upload.size}; this store takes {self._max_bytes} at most")
        if there := await self._whole(upload):
            if there.size != upload.size:
                raise InvalidArgument(f"header.size_bytes: artifact {there.digest} has {there.size}, not {upload.size}")
            return there, True
        stored = await self._receive(upload)
        await self._threads.run(self._staging.forget, upload.digest)
        return stored, False

    async def touch(self, digests: Collection[str], session: AsyncClientSession) -> bool:
        """In the transaction that refers to them: nobody collects them. False: one is not there (any more)."""
        change = {"$unset": {"condemned_at": ""}, "$set": {"referred_at": self._clock()}}
        query = {"_id": {"$in": list(digests)}, "damaged": {"$ne": True}}
        touched = await self._collections.artifacts.update_many(query, change, session=session)
        return touched.matched_count == len(set(digests))

    async def _keep(self, digest: str, kept_for: timedelta) -> bool:
        """Gives whoever was told that it is there the time to refer to it. False: it has just been collected."""
        until = self._clock() + kept_for
        with translated("keeping an artifact"):
            kept = await self._collections.artifacts.update_one(
                {"_id": digest, "damaged": {"$ne": True}},
                {"$max": {"keep_until": until}, "$unset": {"condemned_at": ""}},
            )
        return kept.matched_count == 1

    def _kept(self, upload: Upload) -> timedelta:
        return min(_REFERRED_FOR, self._kept_for) if upload.reference else self._kept_for

    async def _whole(self, upload: Upload) -> Stored | None:
        """The artifact, when its document and a blob of its size are there. A blob that is gone is uploaded again."""
        artifact = (await self.find([upload.digest])).get(upload.digest)
        if artifact is None:
            return None
        try:
            await self.reader.check_size(artifact)
        except (DataLoss, NotFound, Aborted):
            return None
        return artifact if await self._keep(upload.digest, self._kept(upload)) else None

    async def _receive(self, upload: Upload) -> Stored:
        """Brings the rest of the upload here, verifies it and makes it an artifact."""
        partial = await self._open(upload)
        try:
            await self._grow(partial, upload)
            found = await self._threads.run(partial.finish)
            if found != upload.digest:
                raise DataLoss(f"the upload hashes to {found}, not to {upload.digest}: all of it is discarded")
            key = new_key(upload.digest)
            await self._blobs.adopt(key, partial.path)
            stored = await self._record(upload, key, partial.blocks())
        except (DataLoss, TooLong):
            await self._threads.run(partial.discard)
            raise
        except BaseException:
            await self._threads.run(partial.suspend)
            raise
        await self._threads.run(partial.discard)
        return stored

    async def _open(self, upload: Upload) -> Partial:
        now, blocks = self._clock().timestamp(), block_bytes(upload.size)
        if upload.offset == 0:
            return await self._threads.run(self._staging.begin, upload.digest, now, blocks)
        return await self._threads.run(self._staging.resume, upload.digest, upload.offset, now, blocks)

    async def _grow(self, partial: Partial, upload: Upload) -> None:
        while not await self._threads.run(partial.catch_up):
            pass
        # Small chunks are gathered, so that a thread does 1 MiB of work for each switch to it.
        waiting = bytearray()
        try:
            async for chunk in upload.chunks():
                waiting += chunk
                if len(waiting) >= CHUNK_BYTES:
                    data, waiting = waiting, bytearray()
                    await self._threads.run(partial.append, bytes(data))
        finally:
            await self._threads.run(partial.append, bytes(waiting))
        if partial.received != upload.size:
            here = f"the stream ended at {partial.received} of {upload.size} bytes"
            raise InvalidArgument(f"{here}: send the rest from offset {partial.received}")

    async def _record(self, upload: Upload, key: str, blocks: Blocks) -> Stored:
        """Writes the document of a blob that is there. Of several uploads at once the first one's blob counts."""
        now = whole_milliseconds(self._clock())
        fields: Document = {"size": upload.size, "keep_until": now + self._kept(upload), **bytes_fields(key, blocks)}
        with translated("recording an artifact"):
            doc = await self._written(upload.digest, fields, now)
        if key_of(doc) != key:
            with suppress(ShoalError):  # What stays is a stray.
                await self._blobs.remove(key)
        return stored_of(doc)

    async def _written(self, digest: str, fields: Document, now: datetime) -> Document:
        artifacts = self._collections.artifacts

        async def all_or_nothing(session: AsyncClientSession) -> Document:
            # From here to the commit nobody can bury the blob, so that it is there for good when it is there now.
            await self._graves.exclude(fields["key"], session)
            if await self._blobs.size(fields["key"]) is None:
                raise _taken_for_a_stray(digest)
            change = {"$set": fields, "$unset": {"damaged": "", "condemned_at": ""}}
            before = await artifacts.find_one_and_update({"_id": digest, "damaged": True}, change, session=session)
            if before is not None:
                await self._graves.bury([key_of(before)], now, session)
                return {**before, **fields}
            doc = {"_id": digest, "created_at": now, **fields}
            await artifacts.insert_one(doc, session=session)
            return doc

        for _ in range(_RACES):
            try:
                return await transaction(self._collections, all_or_nothing)
            except DuplicateKeyError:
                if await self._graves.has(fields["key"]):
                    raise _taken_for_a_stray(digest) from None
                there = await artifacts.find_one({"_id": digest, "damaged": {"$ne": True}})
            if there is not None:
                return there
        raise Aborted(f"artifact {digest}: it is being removed and uploaded at once: try again")


def _taken_for_a_stray(digest: str) -> Unavailable:
    return Unavailable(f"artifact {digest}: storing it took so long that its bytes were collected: upload it again")
