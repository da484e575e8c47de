"""Pieces: consecutive rows of one file, column by column, as a reader returns them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Cells: TypeAlias = NDArray[Any] | list[Any]
"""Column: an array whose first dimension is the rows, or a list with one value (None: missing) for each row."""

PIECE_ROWS = 512
PIECE_BYTES = 4 << 20
"""Maximum size of one read (a larger row is read alone): enough for several batches of most models."""
ROW_BYTES = 12 << 20
"""Maximum size of a row; a larger row fails. A job's request has the same limit."""


@dataclass(frozen=True)
class Piece:
    """Block of `count` rows, from row `first` of their file on."""

    first: int
    count: int
    columns: Mapping[str, Cells] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    """Reasons by row (counted from 0 within the piece) of rows that cannot be read; their cells are None."""
    sources: Sequence[str] | None = None
    """URL of each row's object; None: the file that is read."""
    arrow: Mapping[str, Any] = field(default_factory=dict)
    """Columns as Arrow arrays too, for formats that have them."""


class Rows(Protocol):
    """Reader of one file. Its methods block: run them in a thread."""

    def seek(self, row: int, offset: int) -> None:
        """Go to row `row`; `offset` is the row's offset in the plan."""

    def read(self, limit: int) -> Piece:
        """Return the next rows, at least one and at most `limit`.

        Raises:
            DataLoss: the file has changed since it was planned, or is broken.
        """

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one file that make a chunk."""

    row: int
    """First row, counted from 0 within the file."""
    rows: int
    offset: int = 0
    """Offset in bytes of the first row, for formats without row numbers."""
    end: int = 0
    """Offset in bytes of the next span."""


def null_column(count: int) -> list[Any]:
    """Return a column of missing values."""
    return [None] * count


def even_spans(total: int, row_bytes: float, chunk_rows: int, chunk_bytes: int, row: int = 0) -> Iterator[Span]:
    """Return the spans of a file whose rows are about equally large, from `row` on."""
    limit = max(1, min(chunk_rows, int(chunk_bytes // max(row_bytes, 1))))
    return (Span(first, min(limit, total - first)) for first in range(row, total, limit))


def piece_rows(limit: int, row_bytes: float) -> int:
    """Return the number of rows of about `row_bytes` to read at once, at most `limit`."""
    return int(np.clip(PIECE_BYTES // max(row_bytes, 1), 1, min(limit, PIECE_ROWS)))
