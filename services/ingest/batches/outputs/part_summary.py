"""Names of parts, and values about their rows. This module needs no Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.ingest.batches.batch import DEAD, LISTING, MANIFEST, SUMMARY


def part_name(number: int) -> str:
    """Return the name of a chunk's part."""
    return f"part-{number:08d}.parquet"


def is_reserved_output_name(name: str) -> bool:
    """Return True for a name, relative to an output, that a batch writes or that readers take for a part."""
    folder, _, file = name.rpartition("/")
    if folder in ("", DEAD):
        return file.startswith("part-") or (not folder and file in (LISTING, MANIFEST, SUMMARY))
    return False


@dataclass(frozen=True, slots=True)
class RowError:
    """Reason for which a row failed."""

    code: str
    reason: str
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class RowOrigins:
    """Origins of rows: their numbers in the batch, their files, and their numbers in those files."""

    rows: Sequence[int]
    sources: Sequence[str]
    source_rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class PartSummary:
    """Counts and size of a finished part."""

    rows: int
    failed: int
    nbytes: int
    codes: Mapping[str, int]
    """Failed rows by status code."""
