"""Blobs in an object store (S3, GCS, Azure), through obstore. A blob is visible there only when its upload is complete.

Large blobs are uploaded in parts; each part is a request that is retried alone. S3 compares each received part with the
checksum sent along. Readers of blobs know the digest and compare the bytes that they read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore, S3Store, from_url

from services.store.artifacts import disk
from services.store.artifacts.blobs import CHUNK_BYTES, Blob
from shoal.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

log = logging.getLogger(__name__)

WINDOW_BYTES = 4 << 20
"""Size of one read request. A single request for the whole blob would have to end within the client's timeout, however
slow its reader is. A window is held in memory before its first byte is sent."""
PART_BYTES = 8 << 20
"""Size of one upload request. S3 accepts at most 10,000 parts, so up to 80 GB in one artifact."""

_PARTS_AT_ONCE = 4
# Four parts at once take this long on a connection of 270 KB/s. A slower request fails, and so does the upload.
_REQUEST = timedelta(seconds=120)
_CONNECT = timedelta(seconds=5)
# An unavailable object store is reported after this time, not after obstore's three minutes.
_RETRIES: RetryConfig = {"retry_timeout": timedelta(seconds=10)}
# A range that begins beyond the end has no error class. These are the messages of object stores and of folders.
_PAST_ITS_END = ("416 Range Not Satisfiable", "Requested range was invalid")
_NOWHERE = "no-such-folder/"


def open_object_store(url: str, *, checksums: bool = True, request: timedelta = _REQUEST) -> ObjectStore:
    """Open the store at `s3://bucket/prefix`, `gs://...`, `az://...`; credentials come from the usual variables.

    `checksums`: send a SHA-256 with each part; S3 compares and keeps it. `request`: timeout of one request.
    """
    # These options replace the ones from the environment, and `allow_http` must still follow its variable.
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
    options: ClientConfig = {"timeout": request, "connect_timeout": _CONNECT, "allow_http": allow_http}
    if checksums and url.startswith("s3"):
        return S3Store.from_url(url, client_options=options, retry_config=_RETRIES, checksum_algorithm="SHA256")
    return from_url(url, client_options=options, retry_config=_RETRIES)


class ObjectBlobs:
    """Blobs in any store that obstore supports."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def check(self) -> None:
        with _translated("looking for the blob store"):
            async for _ in obstore.list(self._store, _NOWHERE, chunk_size=1):
                return

    async def size(self, key: str) -> int | None:
        try:
            with _translated(f"looking for blob {key}"):
                return int((await obstore.head_async(self._store, key))["size"])
        except NotFound:
            return None

    async def adopt(self, key: str, file: Path) -> None:
        with _storing(key):
            await obstore.put_async(self._store, key, file, chunk_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    async def put(self, key: str, data: bytes) -> None:
        with _storing(key):
            await obstore.put_async(self._store, key, data, chunk_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    async def read(self, key: str, offset: int, size: int) -> AsyncIterator[bytes]:
        for start in range(offset, size, WINDOW_BYTES):
            end = min(start + WINDOW_BYTES, size)
            window = await self._window(key, start, end)
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

    async def list(self, prefix: str) -> AsyncIterator[Blob]:
        with _translated("listing blobs"):
            async for page in obstore.list(self._store, f"{prefix}/"):
                for meta in page:
                    yield Blob(meta["path"], meta["size"], meta["last_modified"])

    async def _window(self, key: str, start: int, end: int) -> memoryview:
        with _translated(f"reading blob {key}"):
            try:
                return memoryview(await obstore.get_range_async(self._store, key, start=start, end=end))
            except BaseError as err:
                if any(text in str(err) for text in _PAST_ITS_END):
                    return memoryview(b"")
                raise


@contextmanager
def _storing(key: str) -> Iterator[None]:
    try:
        with _translated(f"storing blob {key}"):
            yield
    except NotFound as err:
        # A put has nothing to miss but the bucket.
        raise FailedPrecondition(f"storing blob {key}: the store's bucket does not exist: make it") from err


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Raise obstore's errors as ShoalErrors, with their cause."""
    try:
        yield
    except FileNotFoundError as err:
        if "NoSuchBucket" in str(err):
            raise FailedPrecondition(f"{doing}: the store's bucket does not exist: make it") from err
        raise NotFound(f"{doing}: it does not exist") from err
    except (PermissionDeniedError, UnauthenticatedError) as err:
        raise _refused(doing) from err
    except BaseError as err:
        # The text names buckets and endpoints, which callers must not see.
        text = str(err)
        log.warning(
            "%(doing)s: %(error)s", {"event": "blob.object_store_failed", "doing": doing, "error": text.splitlines()[0]}
        )
        if "NoSuchBucket" in text:
            raise FailedPrecondition(f"{doing}: the store's bucket does not exist: make it") from err
        # A refused listing has no error class.
        if "403 Forbidden" in text:
            raise _refused(doing) from err
        raise Unavailable(f"{doing}: the blob store fails at present: retry in a moment") from err
    except OSError as err:
        with disk.translated(doing):
            raise err


def _refused(doing: str) -> PermissionDenied:
    return PermissionDenied(f"{doing}: the object store refuses: check the store's credentials")
