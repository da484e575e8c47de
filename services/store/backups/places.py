"""Where backups may lie. A store reads and writes only where its operator said: a caller is not trusted.

SHOAL_STORE_BACKUPS = file:///mnt/backups,s3://backups/shoal
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from obstore.exceptions import BaseError

from mesh.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.digest import brief
from services.store.artifacts.local_blobs import LocalBlobs
from services.store.artifacts.object_blobs import ObjectBlobs, open_object_store
from services.store.exports.places import checked_url, is_within, path_of
from shoal.errors import FailedPrecondition, InvalidArgument, PermissionDenied

_STAGING = "staging"


class BackupPlaces:
    """Opens folders and buckets under one of `allowed`."""

    def __init__(self, allowed: Sequence[str], threads: Threads, *, checksums: bool) -> None:
        self._allowed = tuple(allowed)
        self._threads = threads
        self._checksums = checksums

    async def open(self, url: str, *, to_write: bool) -> BlobStore:
        """The place at `url`; a folder is made when it is `to_write`.

        Raises:
            InvalidArgument: it is no URL of a place.
            PermissionDenied: the operator has not allowed it.
            FailedPrecondition: there is no such folder to read.
        """
        scheme, path = checked_url(url)
        if scheme == "file":
            return await self._threads.run(self._folder, path, to_write)
        if not any(is_within(url, allowed) for allowed in self._allowed):
            raise self._refused(url)
        try:
            return ObjectBlobs(open_object_store(url, checksums=self._checksums))
        except (BaseError, ValueError) as err:
            raise InvalidArgument(f"url: {brief(url)} cannot be opened: expected like s3://bucket/prefix") from err

    def _folder(self, path: str, to_write: bool) -> BlobStore:
        # As the disk has it: `..` and links lead nowhere else.
        folder = Path(path).resolve()
        roots = [Path(path_of(allowed)).resolve() for allowed in self._allowed if allowed.startswith("file:")]
        if not any(folder.is_relative_to(root) for root in roots):
            raise self._refused(f"file://{path}")
        if to_write:
            with disk.translated("making the folder of a backup"):
                disk.make_folder(folder / _STAGING)
        elif not folder.is_dir():
            raise FailedPrecondition(f"url: there is no folder {brief(str(folder))} on the store's machine")
        return LocalBlobs(folder, folder / _STAGING, self._threads)

    def _refused(self, url: str) -> PermissionDenied:
        allowed = ", ".join(self._allowed) or "nowhere"
        return PermissionDenied(
            f"url: this store does not use {brief(url)} for backups; it may use: {allowed}. Choose a place there, or "
            "have the operator add it to SHOAL_STORE_BACKUPS"
        )
