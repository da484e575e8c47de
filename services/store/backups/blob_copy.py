"""A blob from one place to another, verified on the way: what does not hash to its digest never arrives."""

from __future__ import annotations

import enum
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesh.process.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.stored import key_of
from shoal.errors import DataLoss, NotFound

_IN_MEMORY_BYTES = 4 << 20
"""Larger ones go through a file: several are copied at once."""


@dataclass(frozen=True, slots=True)
class Named:
    """A blob to be copied: where it lies, and what it is."""

    key: str
    size: int
    sha256: str


def blobs_meant(collection: str, docs: Iterable[Mapping[str, Any]]) -> list[Named]:
    """The blobs that documents of a collection of the store mean. Of damaged artifacts there is nothing to copy."""
    if collection == "artifacts":
        return [Named(key_of(doc), doc["size"], doc["_id"]) for doc in docs if not doc.get("damaged")]
    if collection == "results":
        blobs = [doc["blob"] for doc in docs if "blob" in doc]
        return [Named(blob["key"], blob["size"], blob["sha256"]) for blob in blobs]
    return []


def known_damaged(collection: str, docs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The digests of those artifacts of a collection of the store that were found damaged before."""
    return [doc["_id"] for doc in docs if doc.get("damaged")] if collection == "artifacts" else []


class Copied(enum.Enum):
    """What became of a blob that was to be copied."""

    THERE = "it lay there already"
    NEW = "it was copied"
    REPAIRED = "what lay there was damaged, and was replaced"


async def copied(
    blob: Named,
    source: BlobStore,
    target: BlobStore,
    key: str,
    staging: Path,
    threads: Threads,
    *,
    trust_size: bool = False,
) -> Copied:
    """Copies `blob` to `key` there, unless the same bytes lie there: they are read, or (`trust_size`) only counted.

    Raises:
        DataLoss: the source's bytes are gone or not what they were: the message names the blob.
    """
    size = await target.size(key)
    if size == blob.size and (trust_size or await _is_right(replace(blob, key=key), target, threads)):
        return Copied.THERE
    if blob.size <= _IN_MEMORY_BYTES:
        await target.put(key, await whole(blob, source, threads))
    else:
        await _through_a_file(blob, source, target, key, staging, threads)
    return Copied.NEW if size is None else Copied.REPAIRED


async def _is_right(blob: Named, store: BlobStore, threads: Threads) -> bool:
    """Whether the blob's bytes are what they should be. Reads all of them."""
    found = hashlib.sha256()
    with suppress(NotFound, DataLoss):  # Removed since its size was asked for, or lost: then they are none.
        async for chunk in store.read(blob.key, 0, blob.size):
            await threads.run(found.update, chunk)
    return found.hexdigest() == blob.sha256


async def whole(blob: Named, source: BlobStore, threads: Threads) -> bytes:
    """The bytes of a blob that fits into memory.

    Raises:
        DataLoss: they are gone or not what they were.
    """
    data = b"".join([chunk async for chunk in _read(blob, source)])
    if await threads.run(lambda: hashlib.sha256(data).hexdigest()) != blob.sha256:
        raise _damaged(blob)
    return data


async def _through_a_file(
    blob: Named, source: BlobStore, target: BlobStore, key: str, staging: Path, threads: Threads
) -> None:
    file = staging / f"{uuid.uuid4().hex}.tmp"
    found, at = hashlib.sha256(), 0
    with disk.translated(f"copying blob {blob.key}"):
        fd = await threads.run(os.open, file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        async for chunk in _read(blob, source):
            await threads.run(found.update, chunk)
            with disk.translated(f"copying blob {blob.key}"):
                await threads.run(disk.write_all, fd, chunk, at)
            at += len(chunk)
        if found.hexdigest() != blob.sha256:
            raise _damaged(blob)
        with disk.translated(f"copying blob {blob.key}"):
            await threads.run(os.fsync, fd)
        await target.adopt(key, file)
    finally:
        os.close(fd)
        file.unlink(missing_ok=True)


async def _read(blob: Named, source: BlobStore) -> AsyncIterator[bytes]:
    try:
        async for chunk in source.read(blob.key, 0, blob.size):
            yield chunk
    except NotFound as err:
        await source.check()
        raise DataLoss(f"blob {blob.key} is gone") from err


def _damaged(blob: Named) -> DataLoss:
    return DataLoss(f"blob {blob.key} is damaged: it does not hash to {blob.sha256}")
