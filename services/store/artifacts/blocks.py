"""Digests of an artifact's blocks: any part of it can be verified without the rest, before a byte of it is passed on.

    | block 0 | block 1 | block 2 | ... | what is left |      of each the SHA-256: 32 bytes, in the artifact's document

They are made while the whole is hashed on its way in, so they are as right as the artifact's name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SMALLEST_BYTES = 1 << 20
_MOST_BLOCKS = 65_536
# 2 MiB of digests in a document, for 64 GiB in blocks of 1 MiB; what is larger has larger blocks.
_DIGEST_BYTES = 32


def block_bytes(size: int) -> int:
    """How large the blocks of an artifact of `size` bytes are."""
    found = SMALLEST_BYTES
    while found * _MOST_BLOCKS < size:
        found *= 2
    return found


@dataclass(frozen=True, slots=True)
class Blocks:
    """The digests of an artifact's blocks, each of `block_bytes` but for the last."""

    block_bytes: int
    digests: bytes

    def __len__(self) -> int:
        return len(self.digests) // _DIGEST_BYTES

    def span(self, index: int, size: int) -> tuple[int, int]:
        """Where block `index` of an artifact of `size` bytes begins and ends."""
        return index * self.block_bytes, min((index + 1) * self.block_bytes, size)

    def is_right(self, index: int, data: bytes) -> bool:
        """Whether `data` is that block."""
        at = index * _DIGEST_BYTES
        return hashlib.sha256(data).digest() == self.digests[at : at + _DIGEST_BYTES]


class BlockHash:
    """Hashes blocks of a stream as it comes."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._done = bytearray()
        self._open = hashlib.sha256()
        self._filled = 0

    def update(self, data: bytes) -> None:
        """Goes on with `data`."""
        view = memoryview(data)
        while view:
            part = view[: self._block_bytes - self._filled]
            self._open.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self._block_bytes:
                self._close()

    def blocks(self) -> Blocks:
        """What has come so far."""
        last = self._open.digest() if self._filled else b""
        return Blocks(self._block_bytes, bytes(self._done) + last)

    def _close(self) -> None:
        self._done += self._open.digest()
        self._open = hashlib.sha256()
        self._filled = 0
