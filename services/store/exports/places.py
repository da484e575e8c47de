"""Where an export may go. A store writes only where its operator said: a caller names the place, and is not trusted.

SHOAL_STORE_EXPORTS = file:///data/exports,s3://reports/shoal,gs://
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError

from mesh.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.digest import brief
from services.store.artifacts.object_blobs import ObjectBlobs, open_object_store
from shoal.errors import InvalidArgument, PermissionDenied

PLACE = r"^(file:///.*|(s3|gs|az)://.*)$"
"""What an allowed place looks like: a folder, a bucket or a prefix in it, or (`s3://`) every bucket there."""
_SCHEMES = ("file", "s3", "gs", "az")
_MAX_CHARACTERS = 2_048


class Place(Protocol):
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
            fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            try:
                disk.write_all(fd, data, 0)
                os.fsync(fd)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
            os.replace(partial, self._folder / key)
            disk.sync_folder(self._folder)


class Places:
    """Opens the places that exports may go to: those under one of `allowed`."""

    def __init__(self, allowed: Sequence[str], threads: Threads, *, checksums: bool) -> None:
        self._allowed = tuple(allowed)
        self._threads = threads
        self._checksums = checksums

    async def open(self, url: str) -> Place:
        """The place at `url`. A folder is made.

        Raises:
            InvalidArgument: it is no URL of a place.
            PermissionDenied: the operator has not allowed it.
        """
        scheme, path = checked_url(url)
        if scheme == "file":
            return await self._threads.run(self._folder, path)
        if not any(is_within(url, allowed) for allowed in self._allowed):
            raise self._refused(url)
        try:
            return ObjectBlobs(open_object_store(url, checksums=self._checksums))
        except (BaseError, ValueError) as err:
            raise InvalidArgument(f"url: {brief(url)} cannot be opened: expected like s3://bucket/prefix") from err

    def _folder(self, path: str) -> Place:
        # As the disk has it: `..` and links lead nowhere else.
        folder = Path(path).resolve()
        roots = [Path(path_of(allowed)).resolve() for allowed in self._allowed if allowed.startswith("file:")]
        if not any(folder.is_relative_to(root) for root in roots):
            raise self._refused(f"file://{path}")
        with disk.translated("making the folder of an export"):
            disk.make_folder(folder)
        return FolderPlace(folder, self._threads)

    def _refused(self, url: str) -> PermissionDenied:
        allowed = ", ".join(self._allowed) or "nowhere"
        return PermissionDenied(
            f"url: this store does not write to {brief(url)}; it may write to: {allowed}. Choose a place there, "
            "export to the caller (no url), or have the operator add it to SHOAL_STORE_EXPORTS"
        )


def checked_url(url: str) -> tuple[str, str]:
    """The scheme and the path of a URL that may name a place.

    Raises:
        InvalidArgument: it may not.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    is_plain = len(url) <= _MAX_CHARACTERS and url.isprintable() and not parts.query and not parts.fragment
    is_whole = len(parts.path) > 1 and not parts.netloc if parts.scheme == "file" else bool(parts.netloc)
    if parts.scheme not in _SCHEMES or not is_plain or not is_whole:
        raise InvalidArgument(f"url: {brief(url)}: expected file:///folder, s3://bucket/prefix, gs://... or az://...")
    return parts.scheme, path_of(url)


def path_of(url: str) -> str:
    return unquote(urlsplit(url).path)


def is_within(url: str, allowed: str) -> bool:
    """Whether `url` is `allowed` or lies under it. `s3://` allows every bucket."""
    if allowed.endswith("://"):
        return url.startswith(allowed)
    inside = [step for step in url.split("/") if step]
    outside = [step for step in allowed.split("/") if step]
    return inside[: len(outside)] == outside and not {"..", "."} & set(inside)
