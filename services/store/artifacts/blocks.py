"""Digests of an artifact's blocks: each block can be verified without the rest, before a byte of it is sent.

    | block 0 | block 1 | block 2 | ... | last block |      a SHA-256 (32 bytes) of each, in the artifact's document

The digests are computed while the whole upload is hashed, so they are as trustworthy as the artifact's name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SMALLEST_BYTES = 1 << 20
# 2 MiB of digests in a document, for 64 GiB in blocks of 1 MiB. Larger artifacts have larger blocks.
_MOST_BLOCKS = 65_536
_DIGEST_BYTES = 32


def block_bytes(size: int) -> int:
    """Return the block size of an artifact of `size` bytes."""
    found = SMALLEST_BYTES
    while found * _MOST_BLOCKS < size:
        found *= 2
    return found


@dataclass(frozen=True, slots=True)
class Blocks:
    """Digests of an artifact's blocks. Every block has `block_bytes` bytes, but the last."""

    block_bytes: int
    digests: bytes

    def __len__(self) -> int:
        return len(self.digests) // _DIGEST_BYTES

    def span(self, index: int, size: int) -> tuple[int, int]:
        """Return the start and the end of block `index` in an artifact of `size` bytes."""
        return index * self.block_bytes, min((index + 1) * self.block_bytes, size)

    def is_right(self, index: int, data: bytes) -> bool:
        """Return True when `data` hashes to the digest of block `index`."""
        at = index * _DIGEST_BYTES
        return hashlib.sha256(data).digest() == self.digests[at : at + _DIGEST_BYTES]


class BlockHash:
    """Hashes the blocks of a stream incrementally."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._done = bytearray()
        self._open = hashlib.sha256()
        self._filled = 0

    def update(self, data: bytes) -> None:
        """Hash `data`, the next bytes of the stream."""
        view = memoryview(data)
        while view:
            part = view[: self._block_bytes - self._filled]
            self._open.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self._block_bytes:
                self._close()

    def blocks(self) -> Blocks:
        """Return the digests of the bytes so far."""
        last = self._open.digest() if self._filled else b""
        return Blocks(self._block_bytes, bytes(self._done) + last)

    def _close(self) -> None:
        self._done += self._open.digest()
        self._open = hashlib.sha256()
        self._filled = 0
