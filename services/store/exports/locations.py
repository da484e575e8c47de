"""Files of an export: in a folder or a bucket, each written whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mesh.process.threads import Threads
from services.store.allowed_locations import Allowed, make_folder
from services.store.artifacts import disk


class ExportLocation(Protocol):
    """Where files of an export lie. Part of what a BlobStore is."""

    async def size(self, key: str) -> int | None:
        """How many bytes the file has, or None when there is none."""

    async def put(self, key: str, data: bytes) -> None:
        """Writes a file: whole or not at all, and durable when the call returns."""


class FolderPlace:
    """A folder. What is not whole has a hidden name there, which readers of Parquet folders pass over."""

    def __init__(self, folder: Path, threads: Threads) -> None:
        self._folder = folder
        self._threads = threads

    @property
    def folder(self) -> Path:
        """Without `..` and links."""
        return self._folder

    async def size(self, key: str) -> int | None:
        file = self._folder / key
        with disk.translated("looking for an export"):
            return await self._threads.run(lambda: file.stat().st_size if file.exists() else None)

    async def put(self, key: str, data: bytes) -> None:
        await self._threads.run(self._write, key, data)

    def _write(self, key: str, data: bytes) -> None:
        # One name for one file: what a kill left behind is written over.
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
    """Opens `file` for this writer alone, until it is closed.

    An export that was broken off may be writing its last part still when the call that goes on with it writes the same.
    """
    while True:
        fd = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(fd), file.lstat()):
                return fd
        except FileNotFoundError:  # Renamed by who had it, between the two looks.
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


class ExportLocations:
    """Opens the places that exports may go to: those under one of `allowed`."""

    def __init__(self, allowed: Sequence[str], threads: Threads, *, checksums: bool) -> None:
        advice = "export to the caller (no url), or have the operator add it to SHOAL_STORE_EXPORTS"
        self._allowed = Allowed(allowed, threads, checksums=checksums, advice=advice)
        self._threads = threads

    async def open(self, url: str) -> ExportLocation:
        """The place at `url`. A folder is made.

        Raises:
            InvalidArgument: it is no URL of a place.
            PermissionDenied: the operator has not allowed it, or the store's user may not make it.
            FailedPrecondition: a file is in its place.
        """
        place = await self._allowed.open(url)
        if not isinstance(place, Path):
            return place
        await self._threads.run(make_folder, place)
        return FolderPlace(place, self._threads)


def name_of(url: str, place: ExportLocation) -> str:
    """The name of the place at `url`: one for all the URLs that lead there."""
    if isinstance(place, FolderPlace):
        return place.folder.as_uri()
    scheme, _, path = url.partition("://")
    return f"{scheme}://" + "/".join(step for step in path.split("/") if step)
