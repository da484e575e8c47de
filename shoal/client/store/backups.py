"""Backups of a node, as its operator asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.store.v1 import store_pb2 as store


@dataclass(frozen=True)
class BackupProgress:
    """How far a backup or a restore is."""

    backup_id: str
    documents: int
    blobs: int
    """Blobs that are dealt with."""
    blobs_in_all: int
    """0 while it is not known."""
    copied: int
    """Of those, how many were copied: the rest was there."""
    copied_bytes: int
    missing: tuple[str, ...]
    """Digests of blobs that were damaged in the store, and are not in the backup. At most 1,000."""
    cluster_time: str
    """MongoDB's time as of which all documents are."""
    complete: bool
    repaired: int = 0
    """Of those that were copied: so many lay there damaged, and were replaced."""


def of_progress(message: store.BackupProgress) -> BackupProgress:
    """The value of a message."""
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
