"""Upload of one file into the store: skipped when the store has it, resumed after a break, verified on both ends."""

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
"""Chunk size that the .proto file suggests; smaller costs messages, larger costs memory on every hop."""

STAT_S = 10.0
"""Timeout of a stat, which reads one document."""

# Slowest transfer rate that is expected. A transfer may take the time for this rate, and a minute.
_SLOWEST_BYTES_S = 256 * 1024


@dataclass(frozen=True)
class Artifact:
    """A local file and its digest, which names its bytes in the store."""

    path: Path
    sha256: str
    size_bytes: int


def time_for(size_bytes: int) -> float:
    """Return the timeout of a transfer, in seconds."""
    return 60 + size_bytes / _SLOWEST_BYTES_S


async def digest(path: Path) -> Artifact:
    """Hash the file, in a thread.

    Raises:
        FailedPrecondition: the file cannot be read.
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
    """Ensure that the store has `artifact`. Return the bytes sent for it: 0 when the store had them.

    `sent(offset)` receives the offset in the file that the upload has reached. A broken upload resumes at the store's
    offset; repeated breaks without progress end it.

    Raises:
        DataLoss: the file changed during the upload, or the store holds other bytes.
    """
    total, best, attempt, restarted = 0, -1, 0, False
    while True:
        transfer: _Transfer | None = None
        try:
            # A file of one chunk is sent without asking: the store reads no byte that it has.
            is_small = artifact.size_bytes <= CHUNK_BYTES
            offset = 0 if is_small else await _resume_offset(caller, artifact)
            if offset is None:
                sent(artifact.size_bytes)
                return total
            if offset > best:
                best, attempt = offset, 0
            transfer = _Transfer(artifact, 0 if restarted else offset, sent)
            existed = await _send(caller, artifact, transfer)
            return total if existed else total + transfer.sent_bytes
        except ShoalError as err:
            error = err
        if transfer is not None:
            total += transfer.sent_bytes
            if transfer.failure is not None:
                raise error
            if isinstance(error, DataLoss) and transfer.offset and not restarted:
                # The bytes that the store received earlier are not the beginning of this file: restart at offset 0.
                restarted = True
                continue
        if best < 0:
            # The first stat failed, after its own retries.
            raise error
        attempt += 1
        wait = caller.stream_wait_s(_retryable(error), attempt=attempt, begun=True)
        if wait is None:
            raise error
        await caller.pause(wait)


def _retryable(err: ShoalError) -> ShoalError:
    # FAILED_PRECONDITION: another offset than the store's, since another client uploads the same bytes: stat again.
    return Unavailable(err.message) if isinstance(err, FailedPrecondition) else err


async def _resume_offset(caller: Caller, artifact: Artifact) -> int | None:
    """Return the offset at which the upload continues; None when the store has the whole file."""
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


class _Transfer:
    """Messages of one upload, and the number of bytes sent."""

    def __init__(self, artifact: Artifact, offset: int, sent: Callable[[int], None]) -> None:
        self.sent_bytes = 0
        self.failure: Exception | None = None
        self._artifact = artifact
        self.offset = offset
        self._sent = sent

    async def messages(self) -> AsyncIterator[store.PutArtifactRequest]:
        """Yield the messages. An error ends the upload and goes to `failure`, because grpc swallows it."""
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


async def _send(caller: Caller, artifact: Artifact, transfer: _Transfer) -> bool:
    """Send the upload. Return True when the store had the whole file."""
    try:
        response = await caller.upload(
            methods.PUT_ARTIFACT,
            transfer.messages(),
            timeout_s=time_for(artifact.size_bytes),
            doing=f"upload of {artifact.path.name}",
        )
    except ShoalError as err:
        raise transfer.failure or err from err
    if response.artifact.sha256 != artifact.sha256:
        raise DataLoss(f"upload of {artifact.path}: the store has {response.artifact.sha256}, not {artifact.sha256}")
    return response.existed
