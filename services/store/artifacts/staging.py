"""Unfinished uploads: files that grow until they are whole, and that outlive a broken call and a killed process.

    begin(digest)           a fresh file: <digest>.<random>.part, locked (flock) for as long as its upload lives
    resume(digest, offset)  the file where an earlier upload stopped, its bytes hashed again
    append ... append       the file grows; the hash grows with it
    finish                  whole: synced, ready to become a blob;   suspend: kept for later;   discard: gone

Each upload has a file of its own, so two uploads of one digest, even in two processes, never touch the same bytes. A
lock goes with the process that holds it, so a file without one belongs to nobody and can be resumed or swept. Files
only grow: a file that a broken call still holds (its server has not noticed yet) can be copied from, up to any size it
had.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from services.store.artifacts import disk
from services.store.artifacts.blocks import SMALLEST_BYTES, BlockHash, Blocks
from shoal.errors import FailedPrecondition, ResourceExhausted

_CATCH_UP_BYTES = 16 << 20
_TEMPORARY = ".tmp"


class Partial:
    """One upload's file, held by nobody else. Call the methods one at a time."""

    def __init__(
        self, path: Path, fd: int, received: int, source: int | None = None, block_bytes: int = SMALLEST_BYTES
    ) -> None:
        self.path = path
        self.received = received
        """Bytes that are in the file, or will be once it has caught up."""
        self._fd = fd
        self._source = source
        self._hash = hashlib.sha256()
        self._block_hash = BlockHash(block_bytes)
        self._hashed = 0

    def catch_up(self) -> bool:
        """Hashes (and copies) the next 16 MiB of what an earlier upload left. True when it is through."""
        if self._hashed < self.received:
            with disk.translated("reading an unfinished upload"):
                wanted = min(_CATCH_UP_BYTES, self.received - self._hashed)
                data = os.pread(self._fd if self._source is None else self._source, wanted, self._hashed)
                if not data:
                    raise FailedPrecondition("the unfinished upload is gone: start again at offset 0")
                if self._source is not None:
                    disk.write_all(self._fd, data, self._hashed)
            self._update(data)
        return self._hashed == self.received

    def append(self, data: bytes) -> None:
        """Adds `data`. After an error the file holds what it held before."""
        with disk.translated("writing an upload"):
            try:
                disk.write_all(self._fd, data, self.received)
            except OSError:
                os.ftruncate(self._fd, self.received)
                raise
        self._update(data)
        self.received += len(data)

    def finish(self) -> str:
        """Makes the content durable, and says its SHA-256. The file stays locked until `close`."""
        with disk.translated("syncing an upload"):
            os.fsync(self._fd)
        return self._hash.hexdigest()

    def blocks(self) -> Blocks:
        """The digests of its blocks, once it is whole."""
        return self._block_hash.blocks()

    def suspend(self) -> None:
        """Leaves the file for a later upload to go on from."""
        try:
            if self._source is not None:
                os.ftruncate(self._fd, self._hashed)
            os.fsync(self._fd)
        except OSError:
            pass  # What is not on the disk will not hash right later: the digest is the judge, not this call.
        finally:
            self.close()

    def discard(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the file. Harmless when done twice."""
        if self._source is not None:
            os.close(self._source)
            self._source = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _update(self, data: bytes) -> None:
        self._hash.update(data)
        self._block_hash.update(data)
        self._hashed += len(data)

    def __del__(self) -> None:
        self.close()  # Its upload was cancelled while a thread was still opening it: nobody else knows of it.


@dataclass(frozen=True)
class Staging:
    """The folder of unfinished uploads. Bounded in number and age; at the bound, the longest untouched goes first."""

    folder: Path
    max_uploads: int
    max_age_s: float

    def received(self, digest: str) -> int:
        """Bytes from which an upload of `digest` can go on; 0 when there are none."""
        return max((_size(path) for path in self._files(digest)), default=0)

    def begin(self, digest: str, now: float, block_bytes: int = SMALLEST_BYTES) -> Partial:
        """A fresh file for an upload from its start. `now`: unix seconds.

        Raises:
            ResourceExhausted: as many uploads are under way as the store takes, or the disk is full.
        """
        self.sweep(now, keep=self.max_uploads - 1)
        return self._create(digest, block_bytes)

    def resume(self, digest: str, offset: int, now: float, block_bytes: int = SMALLEST_BYTES) -> Partial:
        """The file of an upload that stopped at `offset`. It has to catch up before it grows.

        Raises:
            FailedPrecondition: no upload stopped there; the message says where one did.
            ResourceExhausted: as for `begin`.
        """
        for path in self._files(digest):
            held = _lock(path)
            if held is None:
                if _size(path) >= offset:  # Its call is still being cleaned up: take what it has, leave it alone.
                    return self._copy(digest, path, offset, now, block_bytes)
            elif os.fstat(held).st_size == offset:
                return Partial(path, held, offset, block_bytes=block_bytes)
            else:
                os.close(held)
        there = self.received(digest)
        raise FailedPrecondition(f"offset {offset} is not where the earlier upload stopped: {there} bytes are here")

    def sweep(self, now: float, keep: int | None = None) -> None:
        """Discards what is too old, and the oldest beyond `keep` files.

        Raises:
            ResourceExhausted: more than `keep` files belong to uploads that are under way.
        """
        discard_temporary(self.folder, now - self.max_age_s)
        files = sorted(self._files("*"), key=_touched)
        excess = 0 if keep is None else len(files) - keep
        for path in files:
            if (excess > 0 or _touched(path) < now - self.max_age_s) and _discarded(path):
                excess -= 1
        if excess > 0:
            raise ResourceExhausted(
                f"{self.max_uploads} uploads are under way, the most there may be: retry later", retry_after_ms=1_000
            )

    def forget(self, digest: str) -> None:
        """Discards every upload of `digest` that is not under way: it is stored whole now."""
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
                    return Partial(path, fd, received, source, block_bytes)

    def _copy(self, digest: str, path: Path, offset: int, now: float, block_bytes: int) -> Partial:
        try:
            source = os.open(path, os.O_RDONLY)
        except FileNotFoundError as err:
            raise FailedPrecondition("the earlier upload has just ended: ask for its state again") from err
        try:
            self.sweep(now, keep=self.max_uploads - 1)
            return self._create(digest, block_bytes, offset, source)
        except BaseException:
            os.close(source)
            raise


def _lock(path: Path) -> int | None:
    """The file, opened and locked; None when it is another's or gone. Closing the descriptor unlocks it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock its owner may have finished, and moved or removed it.
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
    """Removes what writes that were never ended left in a folder, untouched since `before` (Unix time)."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        if _touched(path) < before:
            path.unlink(missing_ok=True)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
