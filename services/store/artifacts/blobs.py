"""Blob storage interface, implemented by a local folder and by object stores.

The store makes every key (`artifacts/3f/3f79...`, `responses/a0/a0c1...`); callers never do. A blob is stored whole or
not at all, and is durable when the call returns.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 1 << 20
"""Size of the largest piece that a read yields."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Entry of a blob listing."""

    key: str
    size: int
    modified_at: datetime
    """By the clock of the blob store."""


class BlobStore(Protocol):
    """Stores bytes by key. Every method raises Unavailable, PermissionDenied or FailedPrecondition on failure."""

    async def check(self) -> None:
        """Check that the folder or bucket itself exists. Without it, every blob would look lost.

        Raises:
            FailedPrecondition: the folder or bucket does not exist.
        """

    async def size(self, key: str) -> int | None:
        """Return the blob's size in bytes; None when there is no such blob (or no folder or bucket, see `check`).

        Raises:
            DataLoss: the disk cannot read it.
        """

    async def adopt(self, key: str, file: Path) -> None:
        """Make the content of a local file a blob. The file is whole, synced, and must not change any more.

        The file may be gone afterwards. An existing blob of that key is replaced; its current readers are not affected.
        """

    async def put(self, key: str, data: bytes) -> None:
        """Store `data`."""

    def read(self, key: str, offset: int, size: int) -> AsyncIterator[bytes]:
        """Yield the bytes from `offset` to `size`, the size of the whole blob, in pieces of CHUNK_BYTES but the last.

        A blob that is shorter yields fewer bytes. Raises (while iterating) NotFound when the blob does not exist, and
        DataLoss when the disk cannot read it.
        """

    async def remove(self, key: str) -> None:
        """Remove the blob; a missing blob is no error."""

    def list(self, prefix: str) -> AsyncIterator[Blob]:
        """Yield every blob under the folder `prefix`, in no order. Blobs stored meanwhile may be missing."""
