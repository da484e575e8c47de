"""The store as its operator sees it: whether its bytes are what they were, and what nobody needs any more."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

from shoal.client.store.backups import BackupProgress, of_progress
from shoal.client.store.retention import Keeping
from shoal.client.transport import methods
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2 as store

VERIFY_S = 7 * 24 * 3_600.0
"""A store of many terabytes takes days."""

BACKUP_S = 7 * 24 * 3_600.0
"""The same."""

COLLECT_S = 600.0
"""A listing of all blobs."""


class FindingKind(StrEnum):
    """What is wrong."""

    DAMAGED = "damaged"
    STRAY = "stray"
    WHOLE_AGAIN = "whole again"
    UNKNOWN = "unknown"
    """Of a store that is newer than this client."""


_KINDS = {
    store.VerifyStoreResponse.KIND_DAMAGED: FindingKind.DAMAGED,
    store.VerifyStoreResponse.KIND_STRAY: FindingKind.STRAY,
    store.VerifyStoreResponse.KIND_WHOLE_AGAIN: FindingKind.WHOLE_AGAIN,
}


@dataclass(frozen=True)
class Finding:
    """A blob that does not fit."""

    kind: FindingKind
    key: str
    """Where it lies in the store's folder or bucket."""
    message: str
    sha256: str
    """What it should hash to; empty for a stray."""
    users: tuple[str, ...]
    """Who is harmed: models with their files, jobs."""


@dataclass(frozen=True)
class Verified:
    """How far a verification is."""

    blobs: int
    blobs_in_all: int
    bytes: int
    finding: Finding | None
    """What was found with this step."""


@dataclass(frozen=True)
class Collected:
    """What one round of collection did."""

    condemned: int
    """Artifacts that nobody refers to: collected if that is still so 10 minutes later."""
    collected: int
    """Artifacts that are no more; their bytes go 10 minutes later."""
    removed: int
    """Blobs whose bytes were removed."""
    strays: int
    """Blobs without a document that were found; they go 10 minutes later."""


class AsyncStore(Keeping):
    """`client.store`."""

    async def verify(self, *, sizes_only: bool = False, timeout: float = VERIFY_S) -> AsyncGenerator[Verified, None]:
        """Has the store read every blob; yields after each. `sizes_only`: only whether they are there, and how large.

        What is found damaged counts as missing from then on; its next upload (the model pushed again) repairs it.

        Raises:
            FailedPrecondition: the store's folder or bucket is not there.
            Unavailable: MongoDB or the object store is away: begin again.
        """
        request = store.VerifyStoreRequest(sizes_only=sizes_only)
        steps = self._caller.stream(methods.VERIFY_STORE, request, timeout_s=timeout, doing="verify the store")
        async for step in steps:
            finding = _finding(step.finding) if step.HasField("finding") else None
            yield Verified(step.blobs, step.blobs_in_all, step.bytes, finding)

    async def collect(self, *, strays: bool = False, timeout: float = COLLECT_S) -> Collected:
        """Collects now what the store collects every few minutes by itself; with `strays` what it does once a day."""
        request = store.CollectArtifactsRequest(strays=strays)
        done = await self._caller.call(methods.COLLECT_ARTIFACTS, request, timeout_s=timeout, doing="collect artifacts")
        return Collected(done.condemned, done.collected, done.removed, done.strays)

    async def backup(
        self, to: str, *, trust_sizes: bool = False, timeout: float = BACKUP_S
    ) -> AsyncGenerator[BackupProgress, None]:
        """Backs everything up to the URL `to` (`file:///folder`, `s3://bucket/prefix`, ...); yields how far it is.

        The last one is `complete`. A backup that ends before is none; the next one goes on where it was. What an
        earlier backup has left there is read and compared with its digest, and replaced where it is damaged; with
        `trust_sizes` only its size is looked at.

        Raises:
            InvalidArgument, PermissionDenied: a place that the store may not use.
            Aborted: it stood still for too long: start it again.
            Unavailable: MongoDB, the blobs or the place are away, or the stream broke: start it again.
        """
        request = store.BackUpRequest(to=to, trust_sizes=trust_sizes)
        steps = self._caller.stream(methods.BACK_UP, request, timeout_s=timeout, doing="backup")
        async for progress in _until_complete((of_progress(step.progress) async for step in steps), "backup"):
            yield progress

    async def restore(
        self, source: str, *, backup_id: str = "", timeout: float = BACKUP_S
    ) -> AsyncGenerator[BackupProgress, None]:
        """Restores a backup (the newest, when none is named) into this store, which must be empty.

        Repeated after an interruption, it goes on.

        Raises:
            InvalidArgument, PermissionDenied: a place that the store may not use.
            NotFound: no (such) complete backup there. FailedPrecondition: this store is not empty.
            DataLoss: the backup is damaged. Unavailable: something is away, or the stream broke: repeat it.
        """
        request = store.RestoreRequest(source=source, backup_id=backup_id)
        steps = self._caller.stream(methods.RESTORE, request, timeout_s=timeout, doing="restore")
        async for progress in _until_complete((of_progress(step.progress) async for step in steps), "restore"):
            yield progress


async def _until_complete(steps: AsyncIterator[BackupProgress], doing: str) -> AsyncIterator[BackupProgress]:
    is_complete = False
    async for progress in steps:
        is_complete = progress.complete
        yield progress
    if not is_complete:
        raise Unavailable(f"{doing}: the stream ended early: start it again")


def _finding(message: store.VerifyStoreResponse.Finding) -> Finding:
    kind = _KINDS.get(message.kind, FindingKind.UNKNOWN)
    return Finding(kind, message.key, message.message, message.sha256, tuple(message.users))
