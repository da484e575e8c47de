"""Where backups lie: a folder of the store's machine or a bucket, as blobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from mesh.process.threads import Threads
from services.store.allowed_locations import Allowed, make_folder
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.digest import brief
from services.store.artifacts.local_blobs import LocalBlobs
from services.store.artifacts.staging import discard_temporary
from shoal.errors import FailedPrecondition

_STAGING = "staging"
_LEFT_FOR = timedelta(days=1)
# A file that is being written is younger than that.


class BackupPlaces:
    """Opens folders and buckets under one of `allowed`."""

    def __init__(self, allowed: Sequence[str], threads: Threads, *, checksums: bool) -> None:
        advice = "or have the operator add it to SHOAL_STORE_BACKUPS"
        self._allowed = Allowed(allowed, threads, checksums=checksums, advice=advice)
        self._threads = threads

    async def open(self, url: str, *, to_write: bool, now: datetime | None = None) -> BlobStore:
        """The place at `url`; a folder is made when it is `to_write`. With `now`, what backups that were killed left in
        it long before is removed: nobody else looks after that folder.

        Raises:
            InvalidArgument: it is no URL of a place.
            PermissionDenied: the operator has not allowed it, or the store's user may not make it.
            FailedPrecondition: there is no such folder to read, or a file is in its place.
        """
        place = await self._allowed.open(url)
        if not isinstance(place, Path):
            return place
        if to_write:
            for folder in (place, place / _STAGING):
                await self._threads.run(make_folder, folder)
            if now is not None:
                with disk.translated("tidying the folder of backups"):
                    await self._threads.run(discard_temporary, place / _STAGING, (now - _LEFT_FOR).timestamp())
        elif not await self._threads.run(place.is_dir):
            raise FailedPrecondition(f"url: there is no folder {brief(str(place))} on the store's machine")
        return LocalBlobs(place, place / _STAGING, self._threads)
