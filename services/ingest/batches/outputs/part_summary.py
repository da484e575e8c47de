"""What a part says of its rows: values that need no Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.ingest.batches.batch import DEAD, LISTING, MANIFEST, SUMMARY


def part_name(number: int) -> str:
    """The name of a chunk's part."""
    return f"part-{number:08d}.parquet"


def is_result(name: str) -> bool:
    """Whether a name below an output is that of something that a batch writes, or of what readers take for a part."""
    folder, _, file = name.rpartition("/")
    if folder in ("", DEAD):
        return file.startswith("part-") or (not folder and file in (LISTING, MANIFEST, SUMMARY))
    return False


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row was not answered."""

    code: str
    reason: str
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class RowOrigins:
    """Which rows they are."""

    rows: Sequence[int]
    sources: Sequence[str]
    source_rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class PartSummary:
    """What a part has, once it is whole."""

    rows: int
    dead: int
    nbytes: int
    codes: Mapping[str, int]
    """Dead rows by status code."""
