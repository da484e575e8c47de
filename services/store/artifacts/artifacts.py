"""Artifacts: immutable bytes, named by their SHA-256, verified on the way in and on the way out.

    upload ──> staging file (grows, survives) ──> hash right? ──> blob (durable) ──> document: now it exists
                                                       └─ no: the file is discarded, DATA_LOSS

A document is written last, so an artifact that is known is there whole. When a read finds it damaged, its document says
so: it counts as missing, and the next upload of it repairs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from services.store.artifacts.blobs import CHUNK_BYTES, BlobStore
from services.store.artifacts.staging import Partial, Staging
from services.store.artifacts.threads import Threads
from services.store.artifacts.uploads import TooLong, Upload
from services.store.documents import Collections
from shoal.errors import DataLoss, InvalidArgument, NotFound, OutOfRange, ResourceExhausted, ShoalError


@dataclass(frozen=True)
class Artifact:
    """One artifact that is stored whole."""

    digest: str
    size: int
    created_at: datetime


class Artifacts:
    """Stores, finds and reads artifacts. Safe beside other instances on the same MongoDB and blobs."""

    def __init__(
        self,
        collections: Collections,
        blobs: BlobStore,
        staging: Staging,
        threads: Threads,
        *,
        max_bytes: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._staging = staging
        self._threads = threads
        self._max_bytes = max_bytes
        self._clock = clock

    async def find(self, digests: Collection[str]) -> dict[str, Artifact]:
        """Those of `digests` that are stored whole."""
        with translated("looking for artifacts"):
            query = {"_id": {"$in": list(digests)}, "damaged": {"$ne": True}}
            return {doc["_id"]: _artifact(doc) async for doc in self._collections.artifacts.find(query)}

    async def stat(self, digest: str) -> tuple[Artifact | None, int]:
        """The artifact when it is whole, and the bytes of it that are here.

        Raises:
            NotFound: nothing of it is here.
        """
        if artifact := (await self.find([digest])).get(digest):
            return artifact, artifact.size
        if received := await self._threads.run(self._staging.received, digest):
            return None, received
        raise NotFound(f"artifact {digest}: nothing of it is stored")

    async def put(self, upload: Upload) -> tuple[Artifact, bool]:
        """Stores an upload, or says that it is stored already (True) without reading the rest of it.

        A stream that breaks leaves what has come, to be resumed.

        Raises:
            InvalidArgument: size_bytes contradicts the artifact that is there, or the stream and its header disagree.
            DataLoss: the bytes do not hash to the digest. All of them are discarded.
            FailedPrecondition: no earlier upload stopped at the offset.
            ResourceExhausted: over the size limit, too many uploads, or the disk is full.
        """
        if upload.size > self._max_bytes:
            raise ResourceExhausted(f"header.size_bytes: {upload.size}; this store takes {self._max_bytes} at most")
        if there := await self._whole(upload.digest):
            if there.size != upload.size:
                raise InvalidArgument(f"header.size_bytes: artifact {there.digest} has {there.size}, not {upload.size}")
            return there, True
        if not await self._left_behind(upload):
            await self._receive(upload)
        return await self._record(upload), False

    async def read(self, digest: str, offset: int) -> tuple[Artifact, AsyncIterator[bytes]]:
        """The artifact, and its bytes from `offset` in pieces of 1 MiB at most.

        Raises:
            InvalidArgument: a negative offset.
            NotFound: no such artifact.
            FailedPrecondition: the folder or bucket of blobs is not there.
            OutOfRange: `offset` beyond its end.
            DataLoss: its bytes are gone or of another size; or, while iterating a read from 0, they hash to another
                digest. A read from elsewhere is for its reader to verify, who has the bytes before.
        """
        if offset < 0:
            raise InvalidArgument(f"offset: expected 0 or more, got {offset}")
        artifact = (await self.find([digest])).get(digest)
        if artifact is None:
            raise NotFound(f"artifact {digest}: not stored")
        if offset > artifact.size:
            raise OutOfRange(f"offset {offset} is beyond the end of artifact {digest}: it has {artifact.size} bytes")
        size = await self._blobs.size(_key(digest))
        if size is None:
            await self._blobs.check()  # A bucket or disk that is away for an hour has lost nothing.
        if size != artifact.size:
            raise await self._damaged(digest, "they are gone" if size is None else f"{size} bytes of {artifact.size}")
        return artifact, self._verified(artifact, offset)

    async def _verified(self, artifact: Artifact, offset: int) -> AsyncIterator[bytes]:
        found = hashlib.sha256()
        at = offset
        with suppress(NotFound):  # Removed under our hands: shorter than it should be.
            async for chunk in self._blobs.read(_key(artifact.digest), offset, artifact.size):
                if offset == 0:
                    await self._threads.run(found.update, chunk)
                at += len(chunk)
                yield chunk
        if at != artifact.size:
            await self._blobs.check()
            raise await self._damaged(artifact.digest, f"they end at {at} of {artifact.size}")
        if offset == 0 and found.hexdigest() != artifact.digest:
            raise await self._damaged(artifact.digest, f"they hash to {found.hexdigest()}")

    async def _damaged(self, digest: str, how: str) -> DataLoss:
        with suppress(ShoalError):  # The reader is to hear of the damage, whether or not it can be noted now.
            with translated("marking a damaged artifact"):
                await self._collections.artifacts.update_one({"_id": digest}, {"$set": {"damaged": True}})
        return DataLoss(f"artifact {digest}: its stored bytes are damaged ({how}): upload it again")

    async def _whole(self, digest: str) -> Artifact | None:
        """The artifact, when its document and a blob of its size are there. A blob that is gone is uploaded again."""
        artifact = (await self.find([digest])).get(digest)
        if artifact and await self._blobs.size(_key(digest)) == artifact.size:
            return artifact
        return None

    async def _left_behind(self, upload: Upload) -> bool:
        """Whether the right bytes are there and only their document is missing: MongoDB went away between the two."""
        key = _key(upload.digest)
        if await self._blobs.size(key) != upload.size:
            return False
        found = hashlib.sha256()
        async for chunk in self._blobs.read(key, 0, upload.size):
            await self._threads.run(found.update, chunk)
        return found.hexdigest() == upload.digest

    async def _receive(self, upload: Upload) -> None:
        """Brings the rest of the upload here, verifies it and makes it a blob."""
        partial = await self._open(upload)
        try:
            await self._grow(partial, upload)
            found = await self._threads.run(partial.finish)
            if found != upload.digest:
                raise DataLoss(f"the upload hashes to {found}, not to {upload.digest}: all of it is discarded")
            await self._blobs.adopt(_key(upload.digest), partial.path)
        except (DataLoss, TooLong):
            await self._threads.run(partial.discard)
            raise
        except BaseException:
            await self._threads.run(partial.suspend)
            raise
        await self._threads.run(partial.close)

    async def _open(self, upload: Upload) -> Partial:
        now = self._clock().timestamp()
        if upload.offset == 0:
            return await self._threads.run(self._staging.begin, upload.digest, now)
        return await self._threads.run(self._staging.resume, upload.digest, upload.offset, now)

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

    async def _record(self, upload: Upload) -> Artifact:
        change = {"$setOnInsert": {"size": upload.size, "created_at": self._clock()}, "$unset": {"damaged": ""}}
        with translated("recording an artifact"):
            doc = await self._upserted(upload.digest, change)
        await self._threads.run(self._staging.forget, upload.digest)
        return _artifact(doc)

    async def _upserted(self, digest: str, change: Document) -> Document:
        artifacts = self._collections.artifacts
        try:
            doc = await artifacts.find_one_and_update(
                {"_id": digest}, change, upsert=True, return_document=ReturnDocument.AFTER
            )
        except DuplicateKeyError:  # Two first uploads at once: the other one inserted, so this is an update now.
            doc = await artifacts.find_one_and_update({"_id": digest}, change, return_document=ReturnDocument.AFTER)
        assert doc is not None
        return doc


def _key(digest: str) -> str:
    return f"artifacts/{digest[:2]}/{digest}"


def _artifact(doc: Document) -> Artifact:
    return Artifact(doc["_id"], doc["size"], doc["created_at"])
