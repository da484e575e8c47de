"""Locations outside the store's own folder that exports and backups may use.

The operator lists them; a caller names a location and is not trusted.

SHOAL_STORE_EXPORTS = file:///data/exports,s3://reports/{tenant},gs://
SHOAL_STORE_BACKUPS = file:///mnt/backups,s3://backups/shoal
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError

from mesh.process.threads import Threads
from mesh.tenant_locations import of_tenant
from services.store.artifacts import disk
from services.store.artifacts.digest import brief
from services.store.artifacts.object_blobs import ObjectBlobs, open_object_store
from shoal.errors import FailedPrecondition, InvalidArgument, PermissionDenied

LOCATION_URL = r"^(file:///.*|(s3|gs|az)://.*)$"
"""Pattern of an allowed location: a folder, a bucket or a prefix in a bucket, or (`s3://`) every bucket."""
_SCHEMES = ("file", "s3", "gs", "az")
_MAX_CHARACTERS = 2_048
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class AllowedLocations:
    """Locations at or below one of `urls`. `advice`: what a rejected caller may do, besides choosing one of `urls`."""

    def __init__(self, urls: Sequence[str], threads: Threads, *, checksums: bool, advice: str) -> None:
        self._urls = tuple(urls)
        self._threads = threads
        self._checksums = checksums
        self._advice = advice

    async def open(self, url: str, tenant: str | None = None) -> Path | ObjectBlobs:
        """Return the folder at `url`, which may not exist yet, or the blobs of a bucket.

        `tenant`: that of a verified caller, who may use the locations of its tenant; None: all locations.

        Raises:
            InvalidArgument: `url` is no URL of a location.
            PermissionDenied: the operator has not allowed it.
        """
        scheme, path = checked_url(url)
        urls = self._urls if tenant is None else of_tenant(self._urls, tenant)
        if scheme == "file":
            return await self._threads.run(self._folder, path, urls)
        if not any(is_within(url, allowed) for allowed in urls):
            raise self._refused(url, urls)
        try:
            return ObjectBlobs(open_object_store(url, checksums=self._checksums))
        except (BaseError, ValueError) as err:
            raise InvalidArgument(f"url: {brief(url)} cannot be opened: expected like s3://bucket/prefix") from err

    def _folder(self, path: str, urls: Sequence[str]) -> Path:
        # resolve() follows links and `..`, so neither leads out of an allowed folder.
        folder = Path(path).resolve()
        roots = [Path(path_of(allowed)).resolve() for allowed in urls if allowed.startswith("file:")]
        if not any(folder.is_relative_to(root) for root in roots):
            raise self._refused(f"file://{path}", urls)
        return folder

    def _refused(self, url: str, urls: Sequence[str]) -> PermissionDenied:
        allowed = ", ".join(urls) or "none"
        return PermissionDenied(
            f"url: this store may not use {brief(url)}; it may use: {allowed}. Choose a location below one of those, "
            + self._advice
        )


def make_folder(folder: Path) -> None:
    """Make a folder that a caller has named.

    Raises:
        FailedPrecondition: a file has that name. PermissionDenied: the store's user may not make the folder.
    """
    failure = f"url: the folder {brief(str(folder))} cannot be made on the store's machine"
    try:
        disk.make_folder(folder)
    except (FileExistsError, NotADirectoryError) as err:
        raise FailedPrecondition(f"{failure}: a file has that name: choose another") from err
    except OSError as err:
        if err.errno in _REFUSED:
            raise PermissionDenied(
                f"{failure}: {err.strerror}: let the user that the store runs as write there, or choose another"
            ) from err
        with disk.translated("making the folder that was named"):
            raise


def checked_url(url: str) -> tuple[str, str]:
    """Return the scheme and the path of a URL of a location.

    Raises:
        InvalidArgument: `url` is no such URL.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    is_plain = (
        len(url) <= _MAX_CHARACTERS and url.isprintable() and not set("?#") & set(url) and "\0" not in unquote(url)
    )
    is_bucket = bool(parts.netloc) and not set("@:%\\") & set(parts.netloc)
    is_whole = len(parts.path) > 1 and not parts.netloc if parts.scheme == "file" else is_bucket
    # urlsplit reads a scheme in capitals, too.
    if not url.startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)) or not is_plain or not is_whole:
        raise InvalidArgument(f"url: {brief(url)}: expected file:///folder, s3://bucket/prefix, gs://... or az://...")
    return parts.scheme, path_of(url)


def path_of(url: str) -> str:
    return unquote(urlsplit(url).path)


def is_within(url: str, allowed: str) -> bool:
    """Return True when `url` is `allowed` or lies below it. `s3://` allows every bucket."""
    if allowed.endswith("://"):
        return url.startswith(allowed)
    steps, prefix = _steps(url), _steps(allowed)
    return steps[: len(prefix)] == prefix and not {"..", "."} & set(steps)


def _steps(url: str) -> list[str]:
    """Return the names in a URL as the object store reads them: its opener decodes them, and `%2e%2e` is `..`."""
    return [step for step in unquote(url).replace("\\", "/").split("/") if step]
