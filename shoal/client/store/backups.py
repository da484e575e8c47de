"""Progress of a backup or restore of a node."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.store.v1 import store_pb2 as store


@dataclass(frozen=True)
class BackupProgress:
    """Progress of a backup or a restore."""

    backup_id: str
    documents: int
    blobs: int
    """Blobs processed so far."""
    blobs_in_all: int
    """Blobs to process; 0 while the number is unknown."""
    copied: int
    """Blobs copied so far; the other processed blobs existed in the target."""
    copied_bytes: int
    missing: tuple[str, ...]
    """Digests of blobs that are damaged in the store and therefore not in the backup; at most 1,000."""
    cluster_time: str
    """MongoDB cluster time of the snapshot of all documents."""
    complete: bool
    repaired: int = 0
    """Copied blobs that replaced a damaged copy in the target."""


def of_progress(message: store.BackupProgress) -> BackupProgress:
    """Return the BackupProgress of a message."""
    return BackupProgress(
        backup_id=message.backup_id,
        documents=message.documents,
        blobs=message.blobs,
        blobs_in_all=message.blobs_in_all,
        copied=message.copied,
        copied_bytes=message.copied_bytes,
        missing=tuple(message.missing),
        cluster_time=message.cluster_time,
        complete=message.complete,
        repaired=message.repaired,
    )
