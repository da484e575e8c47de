"""Copying of blobs between stores, with verification: bytes that do not hash to their digest are never stored."""

from __future__ import annotations

import enum
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh.process.threads import Threads
from services.store.artifacts import disk
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.stored import key_of
from services.store.results.result_documents import BlobRef
from shoal.errors import DataLoss, NotFound

# Larger blobs are copied through a file, because several are copied at once.
_IN_MEMORY_BYTES = 4 << 20


def blobs_referenced(collection: str, docs: Iterable[Mapping[str, Any]]) -> list[BlobRef]:
    """Return the blobs that documents of a collection refer to. Damaged artifacts are left out: nothing to copy."""
    if collection == "artifacts":
        return [BlobRef(key_of(doc), doc["size"], doc["_id"]) for doc in docs if not doc.get("damaged")]
    if collection == "results":
        return [BlobRef(**doc["blob"]) for doc in docs if "blob" in doc]
    return []


def known_damaged(collection: str, docs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the digests of the artifacts among the documents that were marked damaged before."""
    return [doc["_id"] for doc in docs if doc.get("damaged")] if collection == "artifacts" else []


class CopyOutcome(enum.Enum):
    """Outcome of copying one blob."""

    PRESENT = "the blob was there already"
    NEW = "the blob was copied"
    REPAIRED = "a damaged blob was replaced"


async def copy_blob(
    blob: BlobRef,
    source: BlobStore,
    target: BlobStore,
    key: str,
    staging: Path,
    threads: Threads,
    *,
    trust_size: bool = False,
) -> CopyOutcome:
    """Copy `blob` to `key` in `target`, unless the same bytes are there. `trust_size`: compare only their size.

    Raises:
        DataLoss: the source's bytes are lost or damaged; the message names the blob.
    """
    size = await target.size(key)
    if size == blob.size and (trust_size or await _is_intact(replace(blob, key=key), target, threads)):
        return CopyOutcome.PRESENT
    if blob.size <= _IN_MEMORY_BYTES:
        await target.put(key, await read_whole(blob, source, threads))
    else:
        await _through_a_file(blob, source, target, key, staging, threads)
    return CopyOutcome.NEW if size is None else CopyOutcome.REPAIRED


async def _is_intact(blob: BlobRef, store: BlobStore, threads: Threads) -> bool:
    """Return True when the blob's bytes, read in full, hash to its digest."""
    found = hashlib.sha256()
    # A blob that is lost, or was removed since its size was read, does not hash to its digest.
    with suppress(NotFound, DataLoss):
        async for chunk in store.read(blob.key, 0, blob.size):
            await threads.run(found.update, chunk)
    return found.hexdigest() == blob.sha256


async def read_whole(blob: BlobRef, source: BlobStore, threads: Threads) -> bytes:
    """Return the verified bytes of a blob that fits into memory.

    Raises:
        DataLoss: the bytes are lost or damaged.
    """
    data = b"".join([chunk async for chunk in _read(blob, source)])
    if await threads.run(lambda: hashlib.sha256(data).hexdigest()) != blob.sha256:
        raise _damaged(blob)
    return data


async def _through_a_file(
    blob: BlobRef, source: BlobStore, target: BlobStore, key: str, staging: Path, threads: Threads
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


async def _read(blob: BlobRef, source: BlobStore) -> AsyncIterator[bytes]:
    try:
        async for chunk in source.read(blob.key, 0, blob.size):
            yield chunk
    except NotFound as err:
        await source.check()
        raise DataLoss(f"blob {blob.key} does not exist") from err


def _damaged(blob: BlobRef) -> DataLoss:
    return DataLoss(f"blob {blob.key} is damaged: it does not hash to {blob.sha256}")
