"""Responses too large for a document (16 MiB at most): stored as blobs, and verified when they are read."""

from __future__ import annotations

import hashlib
import uuid

from mesh.process.threads import Threads
from services.store.artifacts.blobs import BlobStore
from services.store.results.result_documents import BlobRef
from shoal.errors import DataLoss, NotFound

FOLDER = "responses"
"""Folder of the blobs of responses."""
INLINE_BYTES = 256 << 10
"""Largest response inside its document. One read suffices, and a page of a hundred such results fits one message."""


class LargeResponses:
    """Stores large responses. Each has its own key, so the blob of a result that was not recorded can be removed."""

    def __init__(self, blobs: BlobStore, threads: Threads, inline_bytes: int = INLINE_BYTES) -> None:
        self.inline_bytes = inline_bytes
        """Largest response that is not stored as a blob."""
        self._blobs = blobs
        self._threads = threads

    async def keep(self, response: bytes) -> bytes | BlobRef:
        """Return a small response unchanged; store a large one as a blob, durably, and return its reference."""
        if len(response) <= self.inline_bytes:
            return response
        name = uuid.uuid4().hex
        key = f"{FOLDER}/{name[:2]}/{name}"
        digest = await self._threads.run(lambda: hashlib.sha256(response).hexdigest())
        await self._blobs.put(key, response)
        return BlobRef(key, len(response), digest)

    async def read(self, ref: BlobRef) -> bytes:
        """Return the response.

        Raises:
            DataLoss: the blob is missing or damaged, or the disk cannot read it.
            FailedPrecondition: the folder or bucket of blobs does not exist.
        """
        try:
            data = b"".join([chunk async for chunk in self._blobs.read(ref.key, 0, ref.size)])
        except NotFound as err:
            # An unavailable bucket or disk has lost nothing.
            await self._blobs.check()
            raise DataLoss(f"blob {ref.key}: the response is missing") from err
        if await self._threads.run(lambda: hashlib.sha256(data).hexdigest()) != ref.sha256:
            raise DataLoss(f"blob {ref.key}: the response is damaged")
        return data

    async def drop(self, ref: BlobRef) -> None:
        """Remove a response that no result refers to."""
        await self._blobs.remove(ref.key)
