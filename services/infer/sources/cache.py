"""Disk cache of the store's files, named by digest; all instances of a node share the folder.

    CACHE/blobs/<sha256>             complete and verified: renamed to this name after its digest was checked
    CACHE/blobs/<sha256>.part        the bytes received so far; a broken download resumes there
    CACHE/blobs/<sha256>.lock        held by the process that downloads the blob; the others wait for it
    CACHE/open/<instance>/<name>...  files of loaded versions, as links to blobs, in a repository's layout
    CACHE/registry.binpb             the last registry snapshot, served while the store is unavailable

Every blob is hashed again when a version is opened, so that a damaged file is found before a wrong model is served.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from services.infer.error_text import quoted
from shoal.errors import DataLoss, FailedPrecondition

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_LOCK_POLL_S = 0.1
# A blob that no registered version needs is kept this long after its last use, so that roll-backs are quick.
_UNUSED_S = 7 * 24 * 3600
# A blob of a failed trial is kept for the other instance, and for a push that shares it.
_EXPIRED_S = 600

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Blobs(Protocol):
    """Source of blobs."""

    def read(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the bytes of an artifact from `offset` on. Raises ShoalError; OutOfRange beyond its end."""
        ...


class Cache:
    """Cache folder, as one instance uses it; the node's other instances share it."""

    def __init__(self, root: Path, instance: str, blobs: Blobs) -> None:
        self._blobs_folder = root / "blobs"
        self._open_folder = root / "open" / instance
        self._registry_file = root / "registry.binpb"
        self._source = blobs
        self._opened = 0

    def start(self) -> None:
        """Make the folders, and remove the links that an earlier process of this instance left.

        Raises:
            OSError: the folder cannot be written.
        """
        shutil.rmtree(self._open_folder, ignore_errors=True)
        for folder in (self._blobs_folder, self._open_folder):
            folder.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def open(self, name: str, version: int, files: Iterable[tuple[str, str, int]]) -> AsyncIterator[Path]:
        """Provide a model's folder with the `files` (path, sha256, size in bytes) of one version in the block.

        Paths are as in the registry: relative to `<version>/`, or to the model's folder when they start with `../`.

        Raises:
            FailedPrecondition: a path or digest is invalid.
            DataLoss: the downloaded bytes do not match the digest.
            ShoalError: the store is unavailable; OSError: the disk is full or broken.
        """
        self._opened += 1
        folder = self._open_folder / f"{name}-{version}-{self._opened}" / name
        try:
            for path, sha256, size_bytes in files:
                target = folder / _inside(path, version)
                blob = await self.fetch(sha256, size_bytes)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(blob, target)
            # A version may consist of its configuration only, and have no file.
            (folder / str(version)).mkdir(parents=True, exist_ok=True)
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder.parent, ignore_errors=True)

    async def fetch(self, sha256: str, size_bytes: int) -> Path:
        """Return the verified blob, downloaded if necessary. Raises as `open` does."""
        if not _SHA256.fullmatch(sha256):
            raise FailedPrecondition(f"the registry names a file by {quoted(sha256)}, which is no SHA-256 digest")
        blob = self._blobs_folder / sha256
        if await asyncio.to_thread(_is_whole, blob, sha256):
            return blob
        async with _locked(blob.with_suffix(".lock")):
            if not await asyncio.to_thread(_is_whole, blob, sha256):
                await self._download(blob, sha256, size_bytes)
        return blob

    async def _download(self, blob: Path, sha256: str, size_bytes: int) -> None:
        part = blob.with_suffix(".part")
        with part.open("ab+") as file:
            digest = await asyncio.to_thread(_digest, file)
            if file.tell() > size_bytes:
                file.truncate(0)
                digest = hashlib.sha256()
            at = file.tell()
            if at < size_bytes:
                async for chunk in self._source.read(sha256, at):
                    await asyncio.to_thread(_append, file, chunk, digest)
                    at += len(chunk)
                    if at > size_bytes:
                        break
            await asyncio.to_thread(_sync, file)
        if at < size_bytes:
            raise DataLoss(f"artifact {sha256} ended after {at} of {size_bytes} bytes")
        if digest.hexdigest() != sha256:
            # No part of the file can be trusted: the next try starts from the beginning.
            part.unlink()
            raise DataLoss(
                f"artifact {sha256} arrived as {digest.hexdigest()}: it was damaged on its way or in the store"
            )
        part.rename(blob)

    def remember(self, registry: bytes) -> None:
        """Save the registry snapshot for a start without the store."""
        draft = self._registry_file.with_name(f"{self._registry_file.name}.{os.getpid()}")
        draft.write_bytes(registry)
        draft.rename(self._registry_file)

    def remembered(self) -> bytes | None:
        """Return the snapshot that `remember` saved last, or None."""
        try:
            return self._registry_file.read_bytes()
        except FileNotFoundError:
            return None

    def expire(self, digests: Iterable[str], now: float) -> None:
        """Let `prune` remove blobs, and parts of them, after minutes instead of a week, unless they are used again."""
        used_at = now - _UNUSED_S + _EXPIRED_S
        for name in (sha256 + ending for sha256 in digests if _SHA256.fullmatch(sha256) for ending in ("", ".part")):
            with suppress(OSError):
                os.utime(self._blobs_folder / name, (used_at, used_at))

    def prune(self, needed: frozenset[str], now: float) -> None:
        """Remove blobs that are not `needed` and were not used for a week. `now`: unix seconds."""
        for file in self._blobs_folder.iterdir():
            if file.name[:64] not in needed and file.stat().st_mtime < now - _UNUSED_S:
                log.info(
                    "removing %(blob)s from the cache: no registered model needs it",
                    {"event": "cache.blob_removed", "blob": file.name},
                )
                file.unlink(missing_ok=True)


def _inside(path: str, version: int) -> PurePosixPath:
    parts = PurePosixPath(path).parts
    in_model = parts[:1] == ("..",)
    rest = parts[1:] if in_model else parts
    if not rest or "\\" in path or "\0" in path or any(part in ("..", "/") or part.startswith("/") for part in rest):
        raise FailedPrecondition(f"the registry names a file {quoted(path)}, which is not inside a model's folder")
    return PurePosixPath(*rest) if in_model else PurePosixPath(str(version), *rest)


def _link(blob: Path, target: Path) -> None:
    # A hard link: ONNX Runtime rejects weights whose real path is outside of the model's folder.
    try:
        os.link(blob, target)
    # Never overwritten: the file is a link to another blob.
    except FileExistsError:
        raise FailedPrecondition(f"the registry names the file {quoted(target.name)} twice") from None
    except OSError:
        shutil.copyfile(blob, target)


def _is_whole(blob: Path, sha256: str) -> bool:
    try:
        with blob.open("rb") as file:
            is_whole = _digest(file).hexdigest() == sha256
    except FileNotFoundError:
        return False
    if is_whole:
        # The time of the last use, for `prune`.
        os.utime(blob)
    else:
        log.error(
            "%(blob)s in the cache is damaged: it is downloaded again", {"event": "cache.blob_damaged", "blob": blob}
        )
    return is_whole


def _digest(file: BinaryIO) -> hashlib._Hash:
    """Return the hash of the whole file, and leave the file's position at its end."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest


def _append(file: BinaryIO, chunk: bytes, digest: hashlib._Hash) -> None:
    file.write(chunk)
    digest.update(chunk)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold a lock among the processes of this machine; the kernel releases it when its holder dies."""
    with path.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_S)
        yield
