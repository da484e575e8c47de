"""Staging: files of unfinished uploads, which outlive a broken call and a killed process.

    begin(digest)           new file <digest>.<random>.part, locked (flock) during its upload
    resume(digest, offset)  the file where an earlier upload stopped; its bytes are hashed again
    append ... append       the file and its hash grow
    finish                  synced, ready to become a blob;   suspend: kept for later;   discard: deleted

Each upload has its own file, so two uploads of one digest, even in two processes, never touch the same bytes. A lock
ends with the process that holds it, so an unlocked file can be resumed or swept. Files only grow: a file that a broken
call still holds (its server has not noticed yet) can be copied from, up to any size it had.

Every function blocks: call it in a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mesh.rpc.places import are_for_others
from services.store.artifacts import disk
from services.store.artifacts.blocks import SMALLEST_BYTES, BlockHash, Blocks
from shoal.errors import FailedPrecondition, ResourceExhausted

_CATCH_UP_BYTES = 16 << 20
_MIB = 1 << 20
_TEMPORARY = ".tmp"


class Partial:
    """File of one upload, held by this process alone. Call the methods one at a time."""

    def __init__(
        self,
        path: Path,
        fd: int,
        received: int,
        source: int | None = None,
        block_bytes: int = SMALLEST_BYTES,
        min_free_bytes: int = 0,
    ) -> None:
        self._min_free_bytes = min_free_bytes
        self.path = path
        self.received = received
        """Bytes in the file, including those that it still has to catch up with."""
        self._fd = fd
        self._source = source
        self._hash = hashlib.sha256()
        self._block_hash = BlockHash(block_bytes)
        self._hashed = 0

    def catch_up(self) -> bool:
        """Hash (and copy) the next 16 MiB of an earlier upload. Return True when all of it is hashed."""
        if self._hashed < self.received:
            with disk.translated("reading an unfinished upload"):
                count = min(_CATCH_UP_BYTES, self.received - self._hashed)
                data = os.pread(self._fd if self._source is None else self._source, count, self._hashed)
                if not data:
                    raise FailedPrecondition("the unfinished upload was discarded: start again at offset 0")
                if self._source is not None:
                    self._check_room(len(data))
                    disk.write_all(self._fd, data, self._hashed)
            self._update(data)
        return self._hashed == self.received

    def append(self, data: bytes) -> None:
        """Append `data`. After an error the file has its earlier content.

        Raises:
            ResourceExhausted: the disk is full, or what would be left free is reserved.
        """
        with disk.translated("writing an upload"):
            self._check_room(len(data))
            try:
                disk.write_all(self._fd, data, self.received)
            except OSError:
                os.ftruncate(self._fd, self.received)
                raise
        self._update(data)
        self.received += len(data)

    def finish(self) -> str:
        """Make the content durable and return its SHA-256. The file stays locked until `close`."""
        with disk.translated("syncing an upload"):
            os.fsync(self._fd)
        return self._hash.hexdigest()

    def blocks(self) -> Blocks:
        """Return the digests of the blocks. Call it after the last `append`."""
        return self._block_hash.blocks()

    def suspend(self) -> None:
        """Keep the file for a later upload, which resumes it."""
        try:
            if self._source is not None:
                os.ftruncate(self._fd, self._hashed)
            os.fsync(self._fd)
        except OSError:
            # Bytes that are not on the disk will not hash to the digest later, so this error can be ignored.
            pass
        finally:
            self.close()

    def discard(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close and unlock the file. A second call does nothing."""
        if self._source is not None:
            os.close(self._source)
            self._source = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_room(self, count: int) -> None:
        if not self._min_free_bytes or not count:
            return
        state = os.fstatvfs(self._fd)
        free = state.f_bavail * state.f_frsize
        if free - count < self._min_free_bytes:
            raise ResourceExhausted(
                f"the store's disk has {free // _MIB} MiB left, of which {self._min_free_bytes // _MIB} MiB are not "
                "for uploads: free some space there, and resume",
                retry_after_ms=10_000,
            )

    def _update(self, data: bytes) -> None:
        self._hash.update(data)
        self._block_hash.update(data)
        self._hashed += len(data)

    def __del__(self) -> None:
        # The upload was cancelled while a thread was opening the file: no other code can close it.
        self.close()


@dataclass(frozen=True)
class Staging:
    """Folder of unfinished uploads, bounded in number and age, in which tenants have shares.

    An upload for which no place is left takes that of the least recently written one that is not in progress: of its
    tenant, when the free places are for others; else of the tenant with the most.
    """

    folder: Path
    max_uploads: int
    max_age_s: float
    min_free_bytes: int = 0
    """Free space of the disk that uploads leave."""

    def received(self, digest: str) -> int:
        """Return the offset at which an upload of `digest` can resume; 0 when there is no file."""
        return max((_size(path) for path in self._files(digest)), default=0)

    def begin(self, digest: str, now: float, block_bytes: int = SMALLEST_BYTES) -> Partial:
        """Return a new file for an upload from its start. `now`: Unix time in seconds.

        Raises:
            ResourceExhausted: all places are taken by uploads in progress, those that are free are for other tenants,
                or the disk is full.
        """
        self._make_room(digest, now)
        return self._create(digest, block_bytes)

    def resume(self, digest: str, offset: int, now: float, block_bytes: int = SMALLEST_BYTES) -> Partial:
        """Return the file of an upload that stopped at `offset`. Call `catch_up` before `append`.

        Raises:
            FailedPrecondition: no upload stopped there; the message says where one did.
            ResourceExhausted: as for `begin`.
        """
        for path in self._files(digest):
            held = _lock(path)
            if held is None:
                # Another call still holds the file: copy from it.
                if _size(path) >= offset:
                    return self._copy(digest, path, offset, now, block_bytes)
            elif os.fstat(held).st_size == offset:
                return Partial(path, held, offset, block_bytes=block_bytes, min_free_bytes=self.min_free_bytes)
            else:
                os.close(held)
        received = self.received(digest)
        raise FailedPrecondition(f"offset {offset} is not where the earlier upload stopped: resume at {received}")

    def sweep(self, now: float) -> None:
        """Discard the files that are too old."""
        discard_temporary(self.folder, now - self.max_age_s)
        for path in self._files("*"):
            if _touched(path) < now - self.max_age_s:
                _discarded(path)

    def _make_room(self, digest: str, now: float) -> None:
        """Make a place for one more upload of the tenant in `digest`, the name of its files."""
        self.sweep(now)
        tenant = _tenant(digest)
        while True:
            files = sorted(self._files("*"), key=_touched)
            held, free = Counter(map(_tenant, (path.name for path in files))), self.max_uploads - len(files)
            is_beyond = bool(tenant) and are_for_others(held[tenant], free)
            if free > 0 and not is_beyond:
                return
            # The tenants that lose an upload, the first that has one which is not in progress.
            losing = [tenant] if is_beyond else [name for name, _ in held.most_common()]
            by_tenant = ([path for path in files if _tenant(path.name) == name] for name in losing)
            if not any(_discarded(path) for paths in by_tenant for path in paths):
                whose = f"this tenant's uploads ({held[tenant]})" if is_beyond else f"{len(files)} uploads"
                raise ResourceExhausted(f"{whose} are in progress, the most allowed: retry later", retry_after_ms=1_000)

    def forget(self, digest: str) -> None:
        """Discard every file of `digest` that is not in use: the artifact is stored whole now."""
        for path in self._files(digest):
            _discarded(path)

    def _files(self, digest: str) -> list[Path]:
        return list(self.folder.glob(f"{digest}.*.part"))

    def _create(self, digest: str, block_bytes: int, received: int = 0, source: int | None = None) -> Partial:
        with disk.translated("beginning an upload"):
            while True:
                path = self.folder / f"{digest}.{uuid.uuid4().hex[:12]}.part"
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                if (fd := _lock(path)) is not None:
                    return Partial(path, fd, received, source, block_bytes, self.min_free_bytes)

    def _copy(self, digest: str, path: Path, offset: int, now: float, block_bytes: int) -> Partial:
        try:
            source = os.open(path, os.O_RDONLY)
        except FileNotFoundError as err:
            raise FailedPrecondition("the earlier upload has just ended: call StatArtifact again") from err
        try:
            self._make_room(digest, now)
            return self._create(digest, block_bytes, offset, source)
        except BaseException:
            os.close(source)
            raise


def _tenant(name: str) -> str:
    """Return the part of an upload's name that stands for its tenant (`uploads.staged_name`); empty: of no tenant."""
    return name.partition(".")[0].partition("-")[2]


def _lock(path: Path) -> int | None:
    """Open and lock the file; None when another process holds it or it is gone. Closing the descriptor unlocks it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock the earlier holder may have finished, and moved or removed the file.
        if os.stat(path).st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _discarded(path: Path) -> bool:
    if (fd := _lock(path)) is None:
        return not path.exists()
    path.unlink(missing_ok=True)
    os.close(fd)
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def discard_temporary(folder: Path, before: float) -> None:
    """Remove temporary files of interrupted writes from a folder, unmodified since `before` (Unix time)."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        if _touched(path) < before:
            path.unlink(missing_ok=True)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
