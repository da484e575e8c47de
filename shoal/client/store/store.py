"""Client of a node's store: verification, garbage collection, backups, retention and quotas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

from shoal.client.store.backups import BackupProgress, of_progress
from shoal.client.store.retention import RetentionAndQuotas
from shoal.client.transport import methods
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2 as store

VERIFY_S = 7 * 24 * 3_600.0
"""Timeout of a verification, which takes days for many terabytes."""

BACKUP_S = 7 * 24 * 3_600.0
"""Timeout of a backup, which takes days for many terabytes."""

COLLECT_S = 600.0
"""Timeout of a garbage collection, which lists all blobs."""


class FindingKind(StrEnum):
    """Kind of a finding of a verification."""

    DAMAGED = "damaged"
    STRAY = "stray"
    WHOLE_AGAIN = "whole again"
    UNKNOWN = "unknown"
    """A kind that this version of the client does not know."""


_KINDS = {
    store.VerifyStoreResponse.KIND_DAMAGED: FindingKind.DAMAGED,
    store.VerifyStoreResponse.KIND_STRAY: FindingKind.STRAY,
    store.VerifyStoreResponse.KIND_WHOLE_AGAIN: FindingKind.WHOLE_AGAIN,
}


@dataclass(frozen=True)
class Finding:
    """Finding of a verification about one blob."""

    kind: FindingKind
    key: str
    """Key of the blob in the store's folder or bucket."""
    message: str
    sha256: str
    """Expected SHA-256; empty for a stray blob."""
    users: tuple[str, ...]
    """Models with their files, and jobs, that need the blob."""


@dataclass(frozen=True)
class Verified:
    """Progress of a verification."""

    blobs: int
    blobs_in_all: int
    bytes: int
    finding: Finding | None
    """Finding of this step, if any."""


@dataclass(frozen=True)
class Collected:
    """Outcome of one round of garbage collection."""

    condemned: int
    """Artifacts without references, marked for collection: collected if still unreferenced 10 minutes later."""
    collected: int
    """Artifacts removed from the store's records; their bytes are removed 10 minutes later."""
    removed: int
    """Blobs whose bytes were removed."""
    strays: int
    """Blobs without a document; removed 10 minutes later."""


class AsyncStore(RetentionAndQuotas):
    """`client.store`: verify, collect, back up and restore; retention and quotas."""

    async def verify(
        self, *, sizes_only: bool = False, timeout: float | None = VERIFY_S
    ) -> AsyncGenerator[Verified, None]:
        """Verify every blob and yield the progress after each. `sizes_only`: compare existence and size, not content.

        A damaged blob counts as missing from then on; its next upload (a push of the model) repairs it.

        Raises:
            FailedPrecondition: the store's folder or bucket is missing.
            Unavailable: MongoDB or the object store is unavailable: start again.
        """
        request = store.VerifyStoreRequest(sizes_only=sizes_only)
        steps = self._caller.stream(methods.VERIFY_STORE, request, timeout_s=timeout, doing="verify the store")
        async for step in steps:
            finding = _finding(step.finding) if step.HasField("finding") else None
            yield Verified(step.blobs, step.blobs_in_all, step.bytes, finding)

    async def collect(self, *, strays: bool = False, timeout: float | None = COLLECT_S) -> Collected:
        """Collect garbage now, as the store does every few minutes; with `strays` also stray blobs, as once a day."""
        request = store.CollectArtifactsRequest(strays=strays)
        done = await self._caller.call(methods.COLLECT_ARTIFACTS, request, timeout_s=timeout, doing="collect artifacts")
        return Collected(done.condemned, done.collected, done.removed, done.strays)

    async def backup(
        self, to: str, *, trust_sizes: bool = False, timeout: float | None = BACKUP_S
    ) -> AsyncGenerator[BackupProgress, None]:
        """Back up everything to the URL `to` (`file:///folder`, `s3://bucket/prefix`, ...) and yield the progress.

        The last element is `complete`; without it there is no backup, and the next call resumes. Blobs of earlier
        backups are read and compared with their digest, and replaced when damaged; with `trust_sizes` only their size
        is compared.

        Raises:
            InvalidArgument, PermissionDenied: the store may not use `to`.
            Aborted: the backup was blocked for too long: start it again.
            Unavailable: MongoDB, the blobs or the target are unavailable, or the stream broke: start it again.
        """
        request = store.BackUpRequest(to=to, trust_sizes=trust_sizes)
        steps = self._caller.stream(methods.BACK_UP, request, timeout_s=timeout, doing="backup")
        async for progress in _until_complete((of_progress(step.progress) async for step in steps), "backup"):
            yield progress

    async def restore(
        self, source: str, *, backup_id: str = "", timeout: float | None = BACKUP_S
    ) -> AsyncGenerator[BackupProgress, None]:
        """Restore a backup (the newest, or `backup_id`) into this store, which must be empty.

        A repeated call after an interruption resumes.

        Raises:
            InvalidArgument, PermissionDenied: the store may not use `source`.
            NotFound: no (such) complete backup. FailedPrecondition: this store is not empty.
            DataLoss: the backup is damaged. Unavailable: a dependency is unavailable, or the stream broke: repeat it.
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
