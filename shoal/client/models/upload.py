"""One file into the store: skipped when it is there, resumed where it broke off, verified on both ends."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import DataLoss, FailedPrecondition, NotFound, ShoalError, Unavailable
from shoal.store.v1 import store_pb2 as store

CHUNK_BYTES = 1 << 20
"""What the contract suggests; smaller costs messages, larger costs memory on every hop."""

STAT_S = 10.0
"""A look into one document."""

_SLOWEST_BYTES_S = 256 * 1024
# A transfer is given the time that it takes at this rate, and a minute: no line that a model goes over is slower.


@dataclass(frozen=True)
class Artifact:
    """A file, and the digest that names its bytes."""

    path: Path
    sha256: str
    size_bytes: int


def time_for(size_bytes: int) -> float:
    """Seconds that a transfer of so many bytes may take."""
    return 60 + size_bytes / _SLOWEST_BYTES_S


async def digest(path: Path) -> Artifact:
    """Hashes the file, in a thread.

    Raises:
        FailedPrecondition: it cannot be read.
    """
    try:
        return await asyncio.to_thread(_digest, path)
    except OSError as err:
        raise FailedPrecondition(f"cannot read {path}: {err.strerror}") from err


def _digest(path: Path) -> Artifact:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Artifact(path, sha256, file.tell())


async def put(caller: Caller, artifact: Artifact, sent: Callable[[int], None] = lambda offset: None) -> int:
    """Sees to it that the store has `artifact`. Returns the bytes that were sent for it: 0 when it had them.

    `sent(offset)` is told how far into the file the upload is. An upload that breaks goes on where the store has it; it
    is given up when it breaks again and again without a byte of progress.

    Raises:
        DataLoss: the file changed while it was sent, or the store holds other bytes.
    """
    total, best, attempt, restarted = 0, -1, 0, False
    while True:
        counted: _Counted | None = None
        try:
            offset = await _received(caller, artifact)
            if offset is None:
                sent(artifact.size_bytes)
                return total
            if offset > best:
                best, attempt = offset, 0
            counted = _Counted(artifact, 0 if restarted else offset, sent)
            await _send(caller, artifact, counted)
            return total + counted.sent_bytes
        except ShoalError as err:
            error = err
        if counted is not None:
            total += counted.sent_bytes
            if counted.failure is not None:
                raise error
            if isinstance(error, DataLoss) and counted.offset and not restarted:
                # What had arrived before was not what this file begins with: once more, from its start.
                restarted = True
                continue
        if best < 0:
            raise error  # Not even the first look: that was tried as often as a call is.
        attempt += 1
        wait = caller.stream_wait_s(_as_retried(error), attempt=attempt, begun=True)
        if wait is None:
            raise error
        await caller.pause(wait)


def _as_retried(err: ShoalError) -> ShoalError:
    # FAILED_PRECONDITION: the offset is not where the upload stands. Somebody uploads the same bytes: look again.
    return Unavailable(err.message) if isinstance(err, FailedPrecondition) else err


async def _received(caller: Caller, artifact: Artifact) -> int | None:
    """Where the upload goes on; None when the store has all of it."""
    try:
        stat = await caller.call(
            methods.STAT_ARTIFACT,
            store.StatArtifactRequest(sha256=artifact.sha256),
            timeout_s=STAT_S,
            doing=f"look for {artifact.path.name} in the store",
        )
    except NotFound:
        return 0
    return None if stat.HasField("artifact") else min(stat.received_bytes, artifact.size_bytes)


class _Counted:
    """The messages of one upload, and how many bytes of them were taken."""

    def __init__(self, artifact: Artifact, offset: int, sent: Callable[[int], None]) -> None:
        self.sent_bytes = 0
        self.failure: Exception | None = None
        self._artifact = artifact
        self.offset = offset
        self._sent = sent

    async def messages(self) -> AsyncIterator[store.PutArtifactRequest]:
        """The messages. grpc swallows what their source raises: it ends the upload, and is kept aside as `failure`."""
        try:
            async for message in self._messages():
                yield message
        except OSError as err:
            self.failure = FailedPrecondition(f"cannot read {self._artifact.path}: {err.strerror}")
        except Exception as err:
            self.failure = err

    async def _messages(self) -> AsyncIterator[store.PutArtifactRequest]:
        header = store.PutArtifactRequest.Header(
            sha256=self._artifact.sha256, size_bytes=self._artifact.size_bytes, offset=self.offset
        )
        yield store.PutArtifactRequest(header=header)
        with self._artifact.path.open("rb") as file:
            file.seek(self.offset)
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield store.PutArtifactRequest(chunk=chunk)
                self.sent_bytes += len(chunk)
                self._sent(self.offset + self.sent_bytes)


async def _send(caller: Caller, artifact: Artifact, counted: _Counted) -> None:
    try:
        answer = await caller.upload(
            methods.PUT_ARTIFACT,
            counted.messages(),
            timeout_s=time_for(artifact.size_bytes),
            doing=f"upload of {artifact.path.name}",
        )
    except ShoalError as err:
        raise counted.failure or err from err
    if answer.artifact.sha256 != artifact.sha256:
        raise DataLoss(f"upload of {artifact.path}: the store has {answer.artifact.sha256}, not {artifact.sha256}")
