"""Reading of artifacts: every byte is verified before it is sent, at whatever offset the read begins.

    read(digest, 2_500_000)         block 0      block 1      block 2 ─right?─> from byte 2_500_000 on
                                                              block 3 ─right?─> ...
                                                                └─ no: DATA_LOSS, and the document says damaged

A damaged artifact counts as missing, so the next upload of the same bytes repairs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress

from mesh.mongo import translated
from mesh.process.threads import Threads
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.store.artifacts.blobs import CHUNK_BYTES, BlobStore
from services.store.artifacts.blocks import BlockHash, Blocks, block_bytes
from services.store.artifacts.stored import Stored, block_fields, same_bytes, stored_of
from services.store.artifacts.visibility import visible
from services.store.documents import Collections
from shoal.errors import Aborted, DataLoss, InvalidArgument, NotFound, OutOfRange, ShoalError


class Reader:
    """Reads and verifies artifacts."""

    def __init__(self, collections: Collections, blobs: BlobStore, threads: Threads) -> None:
        self._collections = collections
        self._blobs = blobs
        self._threads = threads

    async def read(
        self, digest: str, offset: int, scope: TenantScope = EVERY_TENANT
    ) -> tuple[Stored, AsyncIterator[bytes]]:
        """Return the artifact and its verified bytes from `offset`, in pieces of at most 1 MiB.

        Raises:
            InvalidArgument: a negative offset.
            NotFound: no such artifact, or none that the scope sees.
            FailedPrecondition: the folder or bucket of blobs does not exist.
            OutOfRange: `offset` is beyond the artifact's end.
            DataLoss: the bytes are lost, of another size, or (while iterating) damaged: the message says which.
            Aborted: the artifact was uploaded again during the read.
        """
        if offset < 0:
            raise InvalidArgument(f"offset: expected 0 or more, got {offset}")
        stored = await self._find(digest, scope)
        if offset > stored.size:
            raise OutOfRange(f"offset {offset} is beyond the end of artifact {digest}: it has {stored.size} bytes")
        await self.check_size(stored)
        return stored, self._blocks(stored, await self._blocks_of(stored), offset)

    async def verify(self, stored: Stored) -> None:
        """Read and verify the whole artifact.

        Raises:
            DataLoss: the artifact is damaged. NotFound, Aborted: it was removed or replaced during the read.
        """
        await self.check_size(stored)
        async for _ in self._blocks(stored, await self._blocks_of(stored), 0):
            pass

    async def check_size(self, stored: Stored) -> None:
        """Check that the artifact's blob exists and has its size, without reading it.

        Raises:
            DataLoss: the blob is missing or of another size. FailedPrecondition: the folder or bucket does not exist.
        """
        try:
            size = await self._blobs.size(stored.key)
        except DataLoss as err:
            raise await self.damaged(stored, err.message) from err
        if size is None:
            # An unavailable bucket or disk has lost nothing.
            await self._blobs.check()
        if size != stored.size:
            how = "they are missing" if size is None else f"{size} bytes of {stored.size}"
            raise await self.damaged(stored, how)

    async def damaged(self, stored: Stored, how: str) -> ShoalError:
        """Mark the artifact as damaged. Return DataLoss, or NotFound or Aborted after a concurrent change."""
        # The reader gets the error even when the mark cannot be written now.
        with suppress(ShoalError):
            with translated("marking a damaged artifact"):
                marked = await self._collections.artifacts.update_one(same_bytes(stored), {"$set": {"damaged": True}})
                if not marked.matched_count:
                    return await self._changed(stored.digest)
        return DataLoss(f"artifact {stored.digest}: its stored bytes are damaged ({how}): upload it again")

    async def _changed(self, digest: str) -> ShoalError:
        if await self._collections.artifacts.find_one({"_id": digest}, {"_id": 1}) is None:
            return NotFound(f"artifact {digest}: removed, because nothing referred to it")
        return Aborted(f"artifact {digest}: uploaded again meanwhile: retry the read")

    async def _find(self, digest: str, scope: TenantScope) -> Stored:
        seen = await visible(self._collections, [digest], scope)
        with translated("looking for an artifact"):
            doc = await self._collections.artifacts.find_one({"_id": digest, "damaged": {"$ne": True}, **seen})
        if doc is None:
            raise NotFound(f"artifact {digest}: not stored")
        return stored_of(doc)

    async def _blocks(self, stored: Stored, blocks: Blocks, offset: int) -> AsyncIterator[bytes]:
        index = offset // blocks.block_bytes
        waiting = bytearray()
        async for chunk in self._bytes(stored, index * blocks.block_bytes):
            waiting += chunk
            start, end = blocks.span(index, stored.size)
            if len(waiting) < end - start:
                continue
            block = chunk if len(chunk) == len(waiting) else bytes(waiting)
            waiting.clear()
            if not await self._threads.run(blocks.is_right, index, block):
                raise await self.damaged(stored, f"of bytes {start} to {end - 1}")
            for at in range(max(0, offset - start), len(block), CHUNK_BYTES):
                yield block[at : at + CHUNK_BYTES]
            index += 1
        if index < len(blocks):
            await self._blobs.check()
            raise await self.damaged(stored, f"they end at {blocks.span(index, stored.size)[0] + len(waiting)}")

    async def _bytes(self, stored: Stored, offset: int) -> AsyncIterator[bytes]:
        """Yield the stored bytes from `offset`. A blob that is removed during the read yields fewer bytes."""
        try:
            with suppress(NotFound):
                async for chunk in self._blobs.read(stored.key, offset, stored.size):
                    yield chunk
        except DataLoss as err:
            raise await self.damaged(stored, err.message) from err

    async def _blocks_of(self, stored: Stored) -> Blocks:
        """Return the block digests. For an artifact of an older version, compute and store them after verification."""
        if stored.blocks is not None:
            return stored.blocks
        whole, parts = hashlib.sha256(), BlockHash(block_bytes(stored.size))
        async for chunk in self._bytes(stored, 0):
            await self._threads.run(whole.update, chunk)
            await self._threads.run(parts.update, chunk)
        if whole.hexdigest() != stored.digest:
            await self._blobs.check()
            raise await self.damaged(stored, f"they hash to {whole.hexdigest()}")
        with translated("keeping the digests of an artifact's blocks"):
            await self._collections.artifacts.update_one(same_bytes(stored), {"$set": block_fields(parts.blocks())})
        return parts.blocks()
