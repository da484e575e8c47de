"""Where bytes are kept, behind one small interface that a local folder and object stores implement.

A key is a path of our own making (`artifacts/3f/3f79...`, `responses/a0/a0c1...`), never a caller's. What is put under
a key is there whole or not at all, and durable when the call returns.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 1 << 20
"""Largest piece that a read yields."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One blob, as a listing shows it."""

    key: str
    size: int
    modified_at: datetime
    """By the clock of whoever keeps it."""


class BlobStore(Protocol):
    """Keeps bytes by key. Every method raises Unavailable, PermissionDenied or FailedPrecondition when it cannot."""

    async def check(self) -> None:
        """Makes sure that the folder or bucket itself is there: without it, every blob would look as if it were lost.

        Raises:
            FailedPrecondition: it is not.
        """

    async def size(self, key: str) -> int | None:
        """How many bytes it has, or None when there is no such blob (or, see `check`, nothing at all).

        Raises:
            DataLoss: the disk cannot read it.
        """

    async def adopt(self, key: str, file: Path) -> None:
        """Makes the content of a local file, which is whole and synced, a blob. The file is not to change any more.

        It may be gone afterwards. Replaces a blob of that key: whoever reads it now reads on undisturbed.
        """

    async def put(self, key: str, data: bytes) -> None:
        """Stores `data`, all of it in memory."""

    def read(self, key: str, offset: int, size: int) -> AsyncIterator[bytes]:
        """Yields the bytes from `offset` to `size`, the size of the whole blob, in pieces of CHUNK_BYTES, but the last.

        Fewer bytes come when the blob is shorter than that. Raises (while iterating) NotFound when it is gone, DataLoss
        when the disk cannot read it.
        """

    async def remove(self, key: str) -> None:
        """Removes it, if it is there."""

    def list(self, prefix: str) -> AsyncIterator[Blob]:
        """Yields every blob under the folder `prefix`, in no order. Those made meanwhile may be missing."""
