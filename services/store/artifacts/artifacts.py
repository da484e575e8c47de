"""Artifacts: immutable bytes, named by their SHA-256, verified during upload and during reading (`reading`).

    upload ──> staging file (grows, survives) ──> hash right? ──> blob (durable) ──> document: now it exists
                    ^                                  └─ no: the file is discarded, DATA_LOSS      |
                    └──────────── kept when one of these steps fails ──────────────── then the file is discarded

The document is written last, so every known artifact is stored whole. A blob without a document is a stray; garbage
collection removes it when it is old (services/store/garbage).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime, timedelta

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from mesh.process.threads import Threads
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.store.artifacts.blobs import CHUNK_BYTES, BlobStore
from services.store.artifacts.blocks import Blocks, block_bytes
from services.store.artifacts.pending_deletions import PendingDeletions
from services.store.artifacts.reading import Reader
from services.store.artifacts.staging import Partial, Staging
from services.store.artifacts.stored import Stored, bytes_fields, key_of, new_key, stored_of
from services.store.artifacts.uploads import TooLong, Upload, staged_name
from services.store.artifacts.visibility import visible
from services.store.documents import Collections, whole_milliseconds
from services.store.transactions import transaction
from shoal.errors import Aborted, DataLoss, InvalidArgument, NotFound, ResourceExhausted, ShoalError, Unavailable

KEPT_FOR = timedelta(days=1)
"""Time that an artifact is kept after an upload or a request, without a reference: a large model takes a while."""
# An upload that names a reference gets it in a moment, so its artifact may be collected soon after the reference ends.
_REFERRED_FOR = timedelta(minutes=10)
WITHOUT_BLOCKS = {"blocks": 0}
_RACES = 5


class Artifacts:
    """Stores and finds artifacts. Safe beside other instances on the same MongoDB and blobs."""

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
        self._deletions = PendingDeletions(collections)
        self.reader = Reader(collections, blobs, threads)

    async def find(self, digests: Collection[str], scope: TenantScope = EVERY_TENANT) -> dict[str, Stored]:
        """Return the artifacts among `digests` that are stored whole, and that the scope sees."""
        seen = await visible(self._collections, digests, scope)
        with translated("looking for artifacts"):
            query = {"_id": {"$in": list(digests)}, "damaged": {"$ne": True}, **seen}
            docs = self._collections.artifacts.find(query, WITHOUT_BLOCKS)
            return {doc["_id"]: stored_of(doc) async for doc in docs}

    async def stat(self, digest: str, scope: TenantScope = EVERY_TENANT) -> tuple[Stored | None, int]:
        """Return the artifact when it is stored whole, else None and the number of uploaded bytes.

        The artifact is kept for a while, so that the caller can refer to it.

        Raises:
            NotFound: no byte of the artifact is stored.
        """
        if (artifact := (await self.find([digest], scope)).get(digest)) and await self._keep(digest, self._kept_for):
            return artifact, artifact.size
        if received := await self._threads.run(self._staging.received, staged_name(digest, scope.tenant)):
            return None, received
        raise NotFound(f"artifact {digest}: nothing of it is stored")

    async def put(self, upload: Upload, scope: TenantScope = EVERY_TENANT) -> tuple[Stored, bool]:
        """Store an upload. Return True, without reading the rest, when the artifact was stored already.

        An artifact that the scope does not see is received like a new one.

        A stream that breaks leaves the received bytes; a later upload resumes there.

        Raises:
            InvalidArgument: size_bytes contradicts the stored artifact, or the stream contradicts its header.
            DataLoss: the bytes do not hash to the digest. All of them are discarded.
            FailedPrecondition: no earlier upload stopped at the offset, or the folder or bucket does not exist.
            ResourceExhausted: over the size limit, too many uploads, or the disk is full.
            Unavailable: MongoDB or the blob store is unavailable, or recording took over a day: resume the upload.
        """
        if upload.size > self._max_bytes:
            raise ResourceExhausted(
                f"header.size_bytes: {upload.size}; this store accepts at most {self._max_bytes}: raise "
                "SHOAL_STORE_MAX_ARTIFACT_BYTES, or upload a smaller file"
            )
        if there := await self._whole(upload, scope):
            if there.size != upload.size:
                raise InvalidArgument(f"header.size_bytes: artifact {there.digest} has {there.size}, not {upload.size}")
            return there, True
        stored = await self._receive(upload)
        await self._threads.run(self._staging.forget, upload.staged_name)
        return stored, False

    async def touch(self, digests: Collection[str], session: AsyncClientSession) -> bool:
        """In the referring transaction: protect the artifacts from collection. Return False when one is not stored."""
        change = {"$unset": {"condemned_at": ""}, "$set": {"referred_at": self._clock()}}
        query = {"_id": {"$in": list(digests)}, "damaged": {"$ne": True}}
        touched = await self._collections.artifacts.update_many(query, change, session=session)
        return touched.matched_count == len(set(digests))

    async def _keep(self, digest: str, kept_for: timedelta) -> bool:
        """Keep an artifact so that the caller can refer to it. Return False when it has just been collected."""
        until = self._clock() + kept_for
        with translated("keeping an artifact"):
            kept = await self._collections.artifacts.update_one(
                {"_id": digest, "damaged": {"$ne": True}},
                {"$max": {"keep_until": until}, "$unset": {"condemned_at": ""}},
            )
        return kept.matched_count == 1

    def _kept(self, upload: Upload) -> timedelta:
        return min(_REFERRED_FOR, self._kept_for) if upload.reference else self._kept_for

    async def _whole(self, upload: Upload, scope: TenantScope) -> Stored | None:
        """Return the artifact when its document and a blob of its size exist. A lost blob is uploaded again."""
        artifact = (await self.find([upload.digest], scope)).get(upload.digest)
        if artifact is None:
            return None
        try:
            await self.reader.check_size(artifact)
        except (DataLoss, NotFound, Aborted):
            return None
        return artifact if await self._keep(upload.digest, self._kept(upload)) else None

    async def _receive(self, upload: Upload) -> Stored:
        """Receive the rest of the upload, verify it and record it as an artifact."""
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
        # Compared with the times of files, which are this machine's.
        now, blocks = time.time(), block_bytes(upload.size)
        if upload.offset == 0:
            return await self._threads.run(self._staging.begin, upload.staged_name, now, blocks)
        return await self._threads.run(self._staging.resume, upload.staged_name, upload.offset, now, blocks)

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
        """Write the document of a stored blob. Of concurrent uploads, the first one's blob counts."""
        now = whole_milliseconds(self._clock())
        fields: Document = {"size": upload.size, "keep_until": now + self._kept(upload), **bytes_fields(key, blocks)}
        with translated("recording an artifact"):
            doc = await self._written(upload, fields, now)
        if key_of(doc) != key:
            # If the removal fails, the blob stays as a stray.
            with suppress(ShoalError):
                await self._blobs.remove(key)
        return stored_of(doc)

    async def _written(self, upload: Upload, fields: Document, now: datetime) -> Document:
        artifacts, digest = self._collections.artifacts, upload.digest
        owned: Document = {} if upload.uploader is None else {"$addToSet": {"tenants": upload.uploader}}

        async def all_or_nothing(session: AsyncClientSession) -> Document:
            # From here to the commit no instance can schedule this blob's deletion. If the blob exists now, it stays.
            await self._deletions.exclude(fields["key"], session)
            if await self._blobs.size(fields["key"]) is None:
                raise _collected_meanwhile(digest)
            change = {"$set": fields, "$unset": {"damaged": "", "condemned_at": ""}, **owned}
            before = await artifacts.find_one_and_update({"_id": digest, "damaged": True}, change, session=session)
            if before is not None:
                await self._deletions.schedule([key_of(before)], now, session)
                return {**before, **fields}
            doc = {"_id": digest, "created_at": now, **fields}
            if upload.uploader is not None:
                doc["tenants"] = [upload.uploader]
            await artifacts.insert_one(doc, session=session)
            return doc

        for _ in range(_RACES):
            try:
                return await transaction(self._collections, all_or_nothing)
            except DuplicateKeyError:
                if await self._deletions.has(fields["key"]):
                    raise _collected_meanwhile(digest) from None
                whole = {"_id": digest, "damaged": {"$ne": True}}
                # The bytes of another upload stand; this one's tenant has sent them, too.
                kept: Document = {"$max": {"keep_until": fields["keep_until"]}, "$unset": {"condemned_at": ""}}
                there = await artifacts.find_one_and_update(whole, kept | owned)
            if there is not None:
                return there
        raise Aborted(f"artifact {digest}: it is being removed and uploaded at the same time: try again")


def _collected_meanwhile(digest: str) -> Unavailable:
    return Unavailable(f"artifact {digest}: storing it took so long that its bytes were collected: upload it again")
