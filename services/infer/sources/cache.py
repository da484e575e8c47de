"""Files of the store on this machine's disk, named by their digest; all instances of a node share the folder.

    CACHE/blobs/<sha256>             whole and verified: it gets this name by a rename, after its digest was checked
    CACHE/blobs/<sha256>.part        what has arrived so far; a broken download goes on where it stopped
    CACHE/blobs/<sha256>.lock        held by the process that downloads it; the others wait, then find the work done
    CACHE/open/<instance>/<name>...  the files of loaded versions, as links to blobs, in a repository's layout
    CACHE/registry.binpb             the last registry that was seen: what to serve while the store is away

Every blob is hashed again when a version is opened: a disk that lies is noticed before a wrong model answers.
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
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from services.infer.error_text import quoted
from shoal.errors import DataLoss, FailedPrecondition

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_LOCK_POLL_S = 0.1
_UNUSED_S = 7 * 24 * 3600
# A blob that no registered version needs is kept for so long after its last use: roll-backs are quick that way.

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Blobs(Protocol):
    """Where files come from."""

    def read(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """The bytes of an artifact from `offset` on. Raises ShoalError: OutOfRange beyond its end."""
        ...


class Cache:
    """One folder, used by one instance of this process, and by its siblings."""

    def __init__(self, root: Path, instance: str, blobs: Blobs) -> None:
        self._blobs_folder = root / "blobs"
        self._open_folder = root / "open" / instance
        self._registry_file = root / "registry.binpb"
        self._source = blobs
        self._opened = 0

    def start(self) -> None:
        """Makes the folders, and clears away what an earlier process of this instance had open.

        Raises:
            OSError: the folder cannot be written.
        """
        shutil.rmtree(self._open_folder, ignore_errors=True)
        for folder in (self._blobs_folder, self._open_folder):
            folder.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def open(self, name: str, version: int, files: Iterable[tuple[str, str, int]]) -> AsyncIterator[Path]:
        """A model's folder with the `files` (path, sha256, size in bytes) of one version, until the block ends.

        Paths are as in the registry: relative to `<version>/`, or to the model's folder when they start with `../`.

        Raises:
            FailedPrecondition: a path or digest is not what a registry may hold.
            DataLoss: what was downloaded is not what was stored.
            ShoalError: the store cannot be asked; OSError: the disk is full or broken.
        """
        self._opened += 1
        folder = self._open_folder / f"{name}-{version}-{self._opened}" / name
        try:
            for path, sha256, size_bytes in files:
                target = folder / _inside(path, version)
                blob = await self.fetch(sha256, size_bytes)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(blob, target)
            # A version may have no file of its own: its configuration says all of it.
            (folder / str(version)).mkdir(parents=True, exist_ok=True)
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder.parent, ignore_errors=True)

    async def fetch(self, sha256: str, size_bytes: int) -> Path:
        """The blob, downloaded if need be, and verified. Raises as `open` does."""
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
            part.unlink()  # Nothing of it can be trusted: the next try starts from the beginning.
            raise DataLoss(
                f"artifact {sha256} arrived as {digest.hexdigest()}: it was damaged on its way or in the store"
            )
        part.rename(blob)

    def remember(self, registry: bytes) -> None:
        """Keeps the registry for a start without the store."""
        draft = self._registry_file.with_name(f"{self._registry_file.name}.{os.getpid()}")
        draft.write_bytes(registry)
        draft.rename(self._registry_file)

    def remembered(self) -> bytes | None:
        """What `remember` kept last; None when there is nothing."""
        try:
            return self._registry_file.read_bytes()
        except FileNotFoundError:
            return None

    def prune(self, needed: frozenset[str], now: float) -> None:
        """Removes blobs that are not `needed` and were not used for a week. `now`: unix seconds."""
        for file in self._blobs_folder.iterdir():
            if file.name[:64] not in needed and file.stat().st_mtime < now - _UNUSED_S:
                log.info("removing %s from the cache: no registered model needs it", file.name)
                file.unlink(missing_ok=True)


def _inside(path: str, version: int) -> PurePosixPath:
    parts = PurePosixPath(path).parts
    in_model = parts[:1] == ("..",)
    rest = parts[1:] if in_model else parts
    if not rest or "\\" in path or "\0" in path or any(part in ("..", "/") or part.startswith("/") for part in rest):
        raise FailedPrecondition(f"the registry names a file {quoted(path)}, which is not inside a model's folder")
    return PurePosixPath(*rest) if in_model else PurePosixPath(str(version), *rest)


def _link(blob: Path, target: Path) -> None:
    # A link and not a symlink: ONNX Runtime refuses weights whose real path is outside of the model's folder.
    try:
        os.link(blob, target)
    except FileExistsError:  # Never written over: it is a link to another blob.
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
        os.utime(blob)  # The time of its last use, for `prune`.
    else:
        log.error("%s in the cache is damaged: it is downloaded again", blob)
    return is_whole


def _digest(file: BinaryIO) -> hashlib._Hash:
    """The hash of the whole file; leaves it at its end."""
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
    """Holds a lock among the processes of this machine; it is let go when its holder dies."""
    with path.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_S)
        yield
