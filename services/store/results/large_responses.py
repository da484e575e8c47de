"""Responses too large for a document (16 MiB at most): blobs of their own, verified when they are read back."""

from __future__ import annotations

import hashlib
import uuid

from mesh.process.threads import Threads
from services.store.artifacts.blobs import BlobStore
from services.store.results.result_documents import BlobRef
from shoal.errors import DataLoss, NotFound

FOLDER = "responses"
"""Where their blobs lie."""
INLINE_BYTES = 256 << 10
"""Up to here a response lies in its document: one read, and a page of a hundred such is still a message."""


class LargeResponses:
    """Keeps large responses. Each has a key of its own, so the one of a result that lost a race can be removed."""

    def __init__(self, blobs: BlobStore, threads: Threads, inline_bytes: int = INLINE_BYTES) -> None:
        self.inline_bytes = inline_bytes
        """Up to here a response is kept as it is."""
        self._blobs = blobs
        self._threads = threads

    async def keep(self, response: bytes) -> bytes | BlobRef:
        """The response itself when it is small; else it is stored as a blob, durably."""
        if len(response) <= self.inline_bytes:
            return response
        name = uuid.uuid4().hex
        key = f"{FOLDER}/{name[:2]}/{name}"
        digest = await self._threads.run(lambda: hashlib.sha256(response).hexdigest())
        await self._blobs.put(key, response)
        return BlobRef(key, len(response), digest)

    async def read(self, ref: BlobRef) -> bytes:
        """The response.

        Raises:
            DataLoss: it is gone or damaged, or the disk cannot read it.
            FailedPrecondition: the folder or bucket of blobs is not there.
        """
        try:
            data = b"".join([chunk async for chunk in self._blobs.read(ref.key, 0, ref.size)])
        except NotFound as err:
            await self._blobs.check()  # A bucket or disk that is away for an hour has lost nothing.
            raise DataLoss(f"blob {ref.key}: the response that lay there is gone") from err
        if await self._threads.run(lambda: hashlib.sha256(data).hexdigest()) != ref.sha256:
            raise DataLoss(f"blob {ref.key}: the response that lies there is damaged")
        return data

    async def drop(self, ref: BlobRef) -> None:
        """Removes a response that no result refers to."""
        await self._blobs.remove(ref.key)
