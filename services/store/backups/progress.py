"""How far a backup or a restore is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts so far."""

    backup_id: str
    documents: int = 0
    blobs: int = 0
    """Blobs that are dealt with."""
    blobs_in_all: int = 0
    """0 while it is not known."""
    copied: int = 0
    """Of those, how many were copied: the rest was there."""
    copied_bytes: int = 0
    missing: tuple[str, ...] = ()
    """Digests of blobs that are damaged where they were to be read."""
    repaired: int = 0
    """Of those that were copied: so many lay there damaged, and were replaced."""
    cluster_time: str = ""
    is_complete: bool = False
