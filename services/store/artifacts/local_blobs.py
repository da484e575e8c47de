"""Blobs in a folder of this machine.

obstore lists and removes them. This module writes them itself: obstore renames a finished file into place, but syncs
neither the file nor its folder, so a power cut could leave a document whose bytes are lost. Here a file is synced,
renamed into place, and then its folder is synced.

This module also reads them itself, because the cause of a read error matters:

    the disk lost the blob (EIO ...) but still works otherwise   DataLoss: other blobs are fine, a retry is useless
    the disk fails altogether, too many open files, no memory    Unavailable: a retry may succeed
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import uuid
from pathlib import Path

from obstore.store import LocalStore

from mesh.process.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.object_blobs import ObjectBlobs
from shoal.errors import DataLoss, FailedPrecondition, NotFound, PermissionDenied, ShoalError, Unavailable

log = logging.getLogger(__name__)

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
# A bad sector, or a file system whose checksums or structures are wrong there (XFS, ext4).
_LOST = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})


class LocalBlobs(ObjectBlobs):
    """Blobs under `root`. `staging` is a folder of the same file system, for unfinished files."""

    def __init__(self, root: Path, staging: Path, threads: Threads) -> None:
        super().__init__(LocalStore(root))
        self._root = root
        self._staging = staging
        self._threads = threads

    async def check(self) -> None:
        # The folder was made when the store was opened. Without it, this is an empty mount point or nothing at all.
        if not await self._threads.run(self._staging.is_dir):
            raise FailedPrecondition("the store's folder of blobs does not exist: is its disk mounted?")

    async def size(self, key: str) -> int | None:
        return await self._threads.run(self._size, key)

    async def adopt(self, key: str, file: Path) -> None:
        await self._threads.run(self._link, key, file)

    async def put(self, key: str, data: bytes) -> None:
        await self._threads.run(self._write, key, data)

    async def _window(self, key: str, start: int, end: int) -> memoryview:
        return memoryview(await self._threads.run(self._read, key, start, end))

    def _size(self, key: str) -> int | None:
        try:
            found = os.stat(self._root / key)
        except OSError as err:
            if err.errno in _GONE:
                return None
            raise self._unreadable(key, err) from err
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _read(self, key: str, start: int, end: int) -> bytes:
        try:
            fd = os.open(self._root / key, os.O_RDONLY)
            try:
                return disk.read_all(fd, end - start, start)
            finally:
                os.close(fd)
        except OSError as err:
            raise self._unreadable(key, err) from err

    def _unreadable(self, key: str, err: OSError) -> ShoalError:
        if err.errno in _GONE:
            return NotFound(f"reading blob {key}: it does not exist")
        log.warning("reading blob %(blob)s: %(error)s", {"event": "blob.read_failed", "blob": key, "error": err})
        if err.errno in _REFUSED:
            return PermissionDenied(
                f"reading blob {key}: {err.strerror}: the user that the store runs as must own its folder of blobs"
            )
        if err.errno in _LOST and disk.responds(self._staging):
            return DataLoss(f"blob {key}: the disk cannot read it: {err.strerror}")
        return Unavailable(f"reading blob {key}: the disk fails at present: {err.strerror}: retry in a moment")

    def _link(self, key: str, file: Path) -> None:
        """Store the file's bytes under a second name: the caller still has the file when a later step fails."""
        name = self._staging / f"{uuid.uuid4().hex}.tmp"
        try:
            os.link(file, name)
        except OSError as err:
            # Not every file system has links.
            if err.errno != errno.EXDEV:
                self._place(key, file)
                return
            with disk.translated(f"storing blob {key}"):
                _copy(file, name)
        try:
            self._place(key, name)
        finally:
            name.unlink(missing_ok=True)

    def _write(self, key: str, data: bytes) -> None:
        file = self._staging / f"{uuid.uuid4().hex}.tmp"
        with disk.translated(f"storing blob {key}"):
            fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with disk.translated(f"storing blob {key}"):
                disk.write_all(fd, data, 0)
                os.fsync(fd)
            self._place(key, file)
        finally:
            os.close(fd)
            file.unlink(missing_ok=True)

    def _place(self, key: str, file: Path) -> None:
        target = self._root / key
        with disk.translated(f"storing blob {key}"):
            disk.make_folder(target.parent)
            os.replace(file, target)
            disk.sync_folder(target.parent)


def _copy(source: Path, target: Path) -> None:
    """Copy a file from another disk, durable on return: backups usually lie on another disk than the store."""
    try:
        with source.open("rb") as read, open(target, "xb", opener=_private) as written:
            shutil.copyfileobj(read, written, 1 << 20)
            written.flush()
            os.fsync(written.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
