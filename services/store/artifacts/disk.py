"""Durable files and folders, and the errors of full or broken disks."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import Internal, ResourceExhausted

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise an OSError of the block as a ShoalError, with its cause."""
    try:
        yield
    except OSError as err:
        if err.errno in _FULL:
            raise ResourceExhausted(f"{doing}: the store's disk is full: free some space there") from err
        if err.errno in _TOO_MANY:
            raise ResourceExhausted(f"{doing}: {err.strerror}: retry later", retry_after_ms=1_000) from err
        raise Internal(f"{doing}: the store's disk failed: {err.strerror}") from err


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. One pwrite may write less (2 GiB at most, or on a nearly full disk)."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_all(fd: int, size: int, offset: int) -> bytes:
    """Return the `size` bytes at `offset`, fewer where the file ends. One pread may return less (2 GiB at most)."""
    data = os.pread(fd, size, offset)
    while data and len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def responds(folder: Path) -> bool:
    """Return True when the disk of `folder` still works: a file can be created and synced there."""
    file = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            write_all(fd, b"?", 0)
            os.fsync(fd)
        finally:
            os.close(fd)
            file.unlink()
    except OSError as err:
        return err.errno in _FULL or err.errno == errno.EROFS
    return True


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each durable in its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
