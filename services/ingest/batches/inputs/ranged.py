"""Seekable file over a source that returns byte ranges."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO, cast

WINDOW_BYTES = 4 << 20
"""Size of one read: few requests when the file is read sequentially, and few bytes that are fetched in vain."""


class _Windows(io.RawIOBase):
    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._read(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def Ranged(read: Callable[[int, int], bytes], size: int) -> BinaryIO:
    """Return a file of `size` bytes, whose ranges `read(start, end)` returns."""
    return cast(BinaryIO, io.BufferedReader(_Windows(read, size), WINDOW_BYTES))
