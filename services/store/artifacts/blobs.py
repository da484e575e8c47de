"""Where bytes are kept, behind one small interface: a local folder or an object store, both through obstore.

A key is a path of our own making (`artifacts/3f/3f79...`, `responses/a0/a0c1...`), never a caller's. What is put under
a key is there whole or not at all, and durable when the call returns.

Local blobs are read through obstore, but written by ourselves: obstore renames a finished file into place, yet syncs
neither the file nor its folder, so a power cut could leave a document whose bytes are gone.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, from_url

from services.store.artifacts import disk
from services.store.artifacts.threads import Threads
from shoal.errors import NotFound, PermissionDenied, Unavailable

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Largest piece that a read yields."""

_WINDOW_BYTES = 4 << 20
# One request of an object store. One request for the whole would have to end within the client's timeout (30 s),
# however slowly its reader reads; a window is in memory before the first byte of it is passed on.
_PART_BYTES = 8 << 20
# S3 takes 10,000 parts of an upload at most, so up to 80 GB in one artifact.
_PARTS_AT_ONCE = 4
_RETRY = timedelta(seconds=10)
# An object store that is away is reported after so long, and not after obstore's three minutes.


class BlobStore(Protocol):
    """Keeps bytes by key."""

    async def size(self, key: str) -> int | None:
        """How many bytes it has, or None when there is no such blob."""

    async def adopt(self, key: str, file: Path) -> None:
        """Takes over the content of a local file, which is closed and synced. The file is gone afterwards.

        Replaces a blob of that key: whoever reads it now reads on undisturbed.
        """

    async def put(self, key: str, data: bytes) -> None:
        """Stores `data`, all of it in memory."""

    def read(self, key: str, offset: int, size: int) -> AsyncIterator[bytes]:
        """Yields the bytes from `offset` to `size`, the size of the whole blob, in pieces of CHUNK_BYTES at most.

        Fewer bytes come when the blob is shorter than that. Raises NotFound (while iterating) when it is gone.
        """

    async def remove(self, key: str) -> None:
        """Removes it, if it is there."""


def open_blobs(url: str, staging: Path | None, threads: Threads) -> tuple[BlobStore, Path]:
    """The blob store at `url` and the local folder for its unfinished uploads. Makes the folders.

    Raises:
        OSError: a folder cannot be made.
    """
    if url.startswith("file://"):
        root = Path(unquote(urlsplit(url).path))
        staging = root / "staging"
        disk.make_folder(staging)
        return LocalBlobs(root, staging, threads), staging
    assert staging is not None  # StoreConfig sees to it.
    disk.make_folder(staging)
    return ObjectBlobs(from_url(url, retry_config={"retry_timeout": _RETRY})), staging


class ObjectBlobs:
    """Blobs in any store that obstore knows; an object store makes an upload visible only when it is complete."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def size(self, key: str) -> int | None:
        try:
            with _translated(f"looking for blob {key}"):
                return int((await obstore.head_async(self._store, key))["size"])
        except NotFound:
            return None

    async def adopt(self, key: str, file: Path) -> None:
        with _translated(f"storing blob {key}"):
            await obstore.put_async(self._store, key, file, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        file.unlink(missing_ok=True)

    async def put(self, key: str, data: bytes) -> None:
        with _translated(f"storing blob {key}"):
            await obstore.put_async(self._store, key, data, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    async def read(self, key: str, offset: int, size: int) -> AsyncIterator[bytes]:
        for start in range(offset, size, _WINDOW_BYTES):
            end = min(start + _WINDOW_BYTES, size)
            with _translated(f"reading blob {key}"):
                window = memoryview(await obstore.get_range_async(self._store, key, start=start, end=end))
            for at in range(0, len(window), CHUNK_BYTES):
                yield bytes(window[at : at + CHUNK_BYTES])
            if len(window) < end - start:
                return

    async def remove(self, key: str) -> None:
        try:
            with _translated(f"removing blob {key}"):
                await obstore.delete_async(self._store, key)
        except NotFound:
            pass


class LocalBlobs(ObjectBlobs):
    """Blobs in a folder of this machine. What is written is synced, then renamed into place, then its folder synced."""

    def __init__(self, root: Path, staging: Path, threads: Threads) -> None:
        super().__init__(LocalStore(root))
        self._root = root
        self._staging = staging
        self._threads = threads

    async def adopt(self, key: str, file: Path) -> None:
        await self._threads.run(self._place, key, file)

    async def put(self, key: str, data: bytes) -> None:
        await self._threads.run(self._write, key, data)

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


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Raises obstore's errors as ShoalError, the cause kept."""
    try:
        yield
    except FileNotFoundError as err:
        raise NotFound(f"{doing}: it is not there") from err
    except (PermissionDeniedError, UnauthenticatedError) as err:
        raise PermissionDenied(f"{doing}: the object store refuses: check the store's credentials") from err
    except BaseError as err:
        log.warning("%s: %s", doing, str(err).splitlines()[0])  # Tells of buckets and endpoints: not for callers.
        raise Unavailable(f"{doing}: the blob store does not do it just now: retry in a moment") from err
    except OSError as err:
        with disk.translated(doing):
            raise err
