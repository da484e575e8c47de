"""Blobs in a folder of this machine.

They are read through obstore, but written by ourselves: obstore renames a finished file into place, yet syncs neither
the file nor its folder, so a power cut could leave a document whose bytes are gone. What is written here is synced,
then renamed into place, then its folder synced.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from obstore.store import LocalStore

from mesh.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.object_blobs import ObjectBlobs
from shoal.errors import FailedPrecondition


class LocalBlobs(ObjectBlobs):
    """Blobs under `root`. `staging` is a folder of the same file system, for what is not whole yet."""

    def __init__(self, root: Path, staging: Path, threads: Threads) -> None:
        super().__init__(LocalStore(root))
        self._root = root
        self._staging = staging
        self._threads = threads

    async def check(self) -> None:
        # It was made when the store was opened: without it, this is an empty mount point, or nothing.
        if not await self._threads.run(self._staging.is_dir):
            raise FailedPrecondition("the store's folder of blobs is not there: is its disk mounted?")

    async def adopt(self, key: str, file: Path) -> None:
        await self._threads.run(self._link, key, file)

    async def put(self, key: str, data: bytes) -> None:
        await self._threads.run(self._write, key, data)

    def _link(self, key: str, file: Path) -> None:
        """The same bytes under a second name: who brought them still has them when what comes next fails."""
        name = self._staging / f"{uuid.uuid4().hex}.tmp"
        try:
            os.link(file, name)
        except OSError:  # Not every file system has links.
            self._place(key, file)
            return
        self._place(key, name)

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
