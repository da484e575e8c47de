"""Locations of exports: folders or buckets, in which each file is written whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mesh.process.threads import Threads
from services.store.allowed_locations import AllowedLocations, make_folder
from services.store.artifacts import disk


class ExportLocation(Protocol):
    """Location of an export's files; every BlobStore is one."""

    async def size(self, key: str) -> int | None:
        """Return the file's size in bytes; None when there is no such file."""

    async def put(self, key: str, data: bytes) -> None:
        """Write a file, whole or not at all, durable when the call returns."""


class FolderLocation:
    """Folder. An unfinished file has a hidden name, which readers of Parquet folders ignore."""

    def __init__(self, folder: Path, threads: Threads) -> None:
        self._folder = folder
        self._threads = threads

    @property
    def folder(self) -> Path:
        """The folder's path, without `..` and links."""
        return self._folder

    async def size(self, key: str) -> int | None:
        file = self._folder / key
        with disk.translated("looking for an export"):
            return await self._threads.run(lambda: file.stat().st_size if file.exists() else None)

    async def put(self, key: str, data: bytes) -> None:
        await self._threads.run(self._write, key, data)

    def _write(self, key: str, data: bytes) -> None:
        # A fixed name, so that the next write replaces a file that a kill left behind.
        partial = self._folder / f".{key}.partial"
        with disk.translated(f"writing {key}"):
            fd = _locked(partial)
            try:
                os.ftruncate(fd, 0)
                disk.write_all(fd, data, 0)
                os.fsync(fd)
                os.replace(partial, self._folder / key)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
            disk.sync_folder(self._folder)


def _locked(file: Path) -> int:
    """Open `file` and lock it until it is closed.

    An interrupted export may still write its last part when the call that resumes it writes the same part.
    """
    while True:
        fd = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(fd), file.lstat()):
                return fd
        # The earlier holder renamed the file between open and lstat.
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


class ExportLocations:
    """Opens locations at or below one of `allowed`."""

    def __init__(self, allowed: Sequence[str], threads: Threads, *, checksums: bool) -> None:
        advice = (
            "export to the caller (no url), or have the operator name it in SHOAL_STORE_EXPORTS (s3://bucket/{tenant})"
        )
        self._allowed = AllowedLocations(allowed, threads, checksums=checksums, advice=advice)
        self._threads = threads

    async def open(self, url: str, tenant: str | None = None) -> ExportLocation:
        """Return the location at `url`. A folder is made. `tenant`: that of a verified caller.

        Raises:
            InvalidArgument: `url` is no URL of a location.
            PermissionDenied: the operator has not allowed it, or the store's user may not make it.
            FailedPrecondition: a file has that name.
        """
        location = await self._allowed.open(url, tenant)
        if not isinstance(location, Path):
            return location
        await self._threads.run(make_folder, location)
        return FolderLocation(location, self._threads)


def name_of(url: str, location: ExportLocation) -> str:
    """Return the name of the location at `url`, the same for all URLs that lead there."""
    if isinstance(location, FolderLocation):
        return location.folder.as_uri()
    scheme, _, path = url.partition("://")
    return f"{scheme}://" + "/".join(step for step in path.split("/") if step)
