"""A piece: some rows of one file that follow each other, column by column, as a reader gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Cells: TypeAlias = NDArray[Any] | list[Any]
"""A column: an array whose first dimension is the rows, or a list with one value (None: none) for each row."""

PIECE_ROWS = 512
PIECE_BYTES = 4 << 20
"""What is read at once, at most (a larger row comes alone): enough for several batches of most models."""
ROW_BYTES = 12 << 20
"""A row that is larger fails: so much a job's request may have."""


@dataclass(frozen=True)
class Piece:
    """`count` rows from row `first` of their file on."""

    first: int
    count: int
    columns: Mapping[str, Cells] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    """Rows (counted from 0 within the piece) that are none, and why; their cells are None."""
    sources: Sequence[str] | None = None
    """Where each row came from; None: from the file that is read."""
    arrow: Mapping[str, Any] = field(default_factory=dict)
    """Columns as Arrow arrays too, where the format has them so."""


class Rows(Protocol):
    """A reader of one file. It blocks: for threads."""

    def seek(self, row: int, offset: int) -> None:
        """Goes to row `row`; `offset` is what the plan has noted about where it begins."""

    def read(self, most: int) -> Piece:
        """The next rows, at least one and at most `most`.

        Raises:
            DataLoss: the file is not what it was when it was planned, or broken.
        """

    def close(self) -> None:
        """Closes what it holds open."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one file that make a chunk."""

    row: int
    """The first, counted from 0 within the file."""
    rows: int
    offset: int = 0
    """Where it begins, for formats that count bytes."""
    end: int = 0
    """Where the next one begins."""


def none_of(count: int) -> list[Any]:
    """A column of nothing."""
    return [None] * count


def even_spans(total: int, row_bytes: float, chunk_rows: int, chunk_bytes: int, row: int = 0) -> Iterator[Span]:
    """Spans for a file whose rows are about equally large, from `row` on."""
    most = max(1, min(chunk_rows, int(chunk_bytes // max(row_bytes, 1))))
    return (Span(first, min(most, total - first)) for first in range(row, total, most))


def piece_rows(most: int, row_bytes: float) -> int:
    """How many rows of about `row_bytes` to read at once."""
    return int(np.clip(PIECE_BYTES // max(row_bytes, 1), 1, min(most, PIECE_ROWS)))
