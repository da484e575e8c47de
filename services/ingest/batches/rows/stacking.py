"""Stacking of rows: consecutive rows of one shape, as many as a model accepts in one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from services.ingest.batches.rows.fitting import FittedInput
from shoal.oip.datatypes import DTYPES

STACK_BYTES = 8 << 20
"""Maximum size of one request (a larger row is sent alone), because ingest holds several in memory."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Rows of a piece that make one request."""

    rows: tuple[int, ...]
    """Row numbers, counted from 0 within the piece."""

    def halves(self) -> tuple[Stack, Stack]:
        """Return the first and the second half of a stack of at least two rows."""
        middle = len(self.rows) // 2
        return Stack(self.rows[:middle]), Stack(self.rows[middle:])


def stacks(inputs: Sequence[FittedInput], rows: Sequence[int], max_rows: int) -> Iterator[Stack]:
    """Yield stacks of `rows`, none of which failed, in their order."""
    limit = max(1, max_rows)
    if all(_is_even(fitted) for fitted in inputs):
        size = sum(_bytes(fitted, 0) for fitted in inputs) if rows else 1
        limit = max(1, min(limit, STACK_BYTES // max(size, 1)))
        yield from (Stack(tuple(rows[first : first + limit])) for first in range(0, len(rows), limit))
        return
    held: list[int] = []
    held_shapes: list[tuple[int, ...]] = []
    nbytes = 0
    for row in rows:
        shapes = [fitted.shape(row) for fitted in inputs]
        size = sum(_bytes(fitted, row) for fitted in inputs)
        if held and (len(held) == limit or shapes != held_shapes or nbytes + size > STACK_BYTES):
            yield Stack(tuple(held))
            held, nbytes = [], 0
        held.append(row)
        held_shapes = shapes
        nbytes += size
    if held:
        yield Stack(tuple(held))


def _is_even(fitted: FittedInput) -> bool:
    """Return True when all rows have one shape and one size."""
    return isinstance(fitted.rows, np.ndarray) and fitted.spec.datatype != "BYTES"


def _bytes(fitted: FittedInput, row: int) -> int:
    if fitted.spec.datatype == "BYTES":
        return sum(map(len, fitted.stacked([row]).reshape(-1).tolist()))
    size = DTYPES[fitted.spec.datatype].itemsize
    for length in fitted.shape(row):
        size *= length
    return size
