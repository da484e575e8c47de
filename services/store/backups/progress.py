"""Progress of a backup or a restore."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackupProgress:
    """Counts so far."""

    backup_id: str
    documents: int = 0
    blobs: int = 0
    """Blobs handled so far."""
    blobs_in_all: int = 0
    """0 until it is known."""
    copied: int = 0
    """Number of `blobs` that were copied; the others were present already."""
    copied_bytes: int = 0
    missing: tuple[str, ...] = ()
    """Digests of blobs that are damaged at the source."""
    repaired: int = 0
    """Number of copied blobs that replaced a damaged one."""
    cluster_time: str = ""
    is_complete: bool = False
