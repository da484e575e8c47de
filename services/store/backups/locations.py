"""Locations of backups: folders of the store's machine, or buckets, opened as blob stores."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from mesh.process.threads import Threads
from services.store.allowed_locations import AllowedLocations, make_folder
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.digest import brief
from services.store.artifacts.local_blobs import LocalBlobs
from services.store.artifacts.staging import discard_temporary
from shoal.errors import FailedPrecondition

_STAGING = "staging"
# No file is written for longer than this, so an older one was left by a killed backup.
_LEFT_FOR = timedelta(days=1)


class BackupLocations:
    """Opens folders and buckets at or below one of `allowed`."""

    def __init__(self, allowed: Sequence[str], threads: Threads, *, checksums: bool) -> None:
        advice = "or have the operator name it in SHOAL_STORE_BACKUPS"
        self._allowed = AllowedLocations(allowed, threads, checksums=checksums, advice=advice)
        self._threads = threads

    async def open(self, url: str, *, to_write: bool, now: datetime | None = None) -> BlobStore:
        """Return the location at `url`. With `to_write`, a folder is made.

        With `now`, temporary files that killed backups left in the folder long ago are removed. Nothing else does.

        Raises:
            InvalidArgument: `url` is no URL of a location.
            PermissionDenied: the operator has not allowed it, or the store's user may not make it.
            FailedPrecondition: there is no such folder to read, or a file has that name.
        """
        location = await self._allowed.open(url)
        if not isinstance(location, Path):
            return location
        if to_write:
            for folder in (location, location / _STAGING):
                await self._threads.run(make_folder, folder)
            if now is not None:
                with disk.translated("removing old temporary files of backups"):
                    await self._threads.run(discard_temporary, location / _STAGING, (now - _LEFT_FOR).timestamp())
        elif not await self._threads.run(location.is_dir):
            raise FailedPrecondition(f"url: there is no folder {brief(str(location))} on the store's machine")
        return LocalBlobs(location, location / _STAGING, self._threads)
