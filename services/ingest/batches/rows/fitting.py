"""Conversion of a column's cells to rows of a tensor. A value that would lose its meaning fails its row with a reason.

When all rows have one shape, which is the common case, one array is converted; otherwise each row by itself.

    model's row       cells that fit
    []                3.5                                        a value
    [4]               [1, 2, 3, 4]                               values
    [2, 2]            [[1, 2], [3, 4]] or [1, 2, 3, 4]           nested, or in one row where every dimension is fixed
    [-1]              [1], [1, 2]                                any length
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.batches.inputs.piece import Cells
from services.ingest.batches.rows.signature import TensorSpec
from shoal.errors import InvalidArgument
from shoal.oip.conversion import converted
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import Array

_NUMBERS = (bool, int, float, np.bool_, np.number)


class UnfitValue(ValueError):
    """Value that does not fit the model's input; the message has the expected and the actual value."""


@dataclass(frozen=True)
class FittedInput:
    """Rows of one input."""

    spec: TensorSpec
    rows: Array | Sequence[Array | None]
    """Array whose first dimension is the rows, or one array (None: the row failed) for each row."""
    errors: dict[int, str]

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of a row that did not fail."""
        if isinstance(self.rows, np.ndarray):
            return self.rows.shape[1:]
        found = self.rows[row]
        assert found is not None
        return found.shape

    def stacked(self, rows: Sequence[int]) -> Array:
        """Return rows, which have one shape and did not fail, as one array."""
        if isinstance(self.rows, np.ndarray):
            first, last = rows[0], rows[-1]
            return self.rows[first : last + 1] if last - first + 1 == len(rows) else self.rows[list(rows)]
        stack = np.empty((len(rows), *self.shape(rows[0])), BY_NAME[self.spec.datatype].dtype)
        for index, row in enumerate(rows):
            stack[index] = self.rows[row]
        return stack


def fit(spec: TensorSpec, cells: Cells) -> FittedInput:
    """Convert the cells of a column to rows of one input."""
    array = cells if isinstance(cells, np.ndarray) else _regular(cells)
    if array is not None:
        try:
            rows, lost = _fitted(spec, array)
        except UnfitValue:
            # Single rows may still fit, and each of the others gets its own reason.
            pass
        else:
            return FittedInput(spec, rows, {int(row): _lost(spec, cells[row]) for row in np.flatnonzero(lost)})
    found: list[Array | None] = []
    errors: dict[int, str] = {}
    for row, cell in enumerate(cells):
        try:
            found.append(_one(spec, cell))
        except UnfitValue as err:
            errors[row] = str(err)
            found.append(None)
    return FittedInput(spec, found, errors)


def check_array(spec: TensorSpec, column: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Check that rows of `shape` and `dtype` can fit an input.

    Raises:
        InvalidArgument: names the column, the expected and the actual type or shape.
    """
    is_text = dtype.kind in "OSU"
    if is_text is not (spec.datatype == "BYTES") or dtype.kind not in "biufOSU":
        raise InvalidArgument(f"column {column!r} holds {dtype}, and the model takes {spec}")
    try:
        _shaped(spec, np.empty((0, *shape)))
    except UnfitValue as err:
        raise InvalidArgument(f"column {column!r}: {err}") from None


def _one(spec: TensorSpec, cell: Any) -> Array:
    if cell is None:
        raise UnfitValue(f"input {spec.name!r}: no value")
    array = cell[np.newaxis] if isinstance(cell, np.ndarray) else _regular([cell])
    if array is None:
        raise UnfitValue(f"input {spec.name!r}: expected {spec.datatype} {list(spec.shape)}, got {_short(cell)}")
    rows, lost = _fitted(spec, array)
    if lost.any():
        raise UnfitValue(_lost(spec, cell))
    # Not rows[0], which returns a scalar for an array of one element.
    return rows.reshape(rows.shape[1:])


def _regular(cells: Sequence[Any]) -> Array | None:
    """Return the cells as one array of numbers, or of texts or bytes (as objects); None when they are not alike."""
    if not cells:
        return None
    try:
        array = np.array(cells, dtype=object)
    except ValueError:
        return None
    kinds = set(map(type, array.reshape(-1).tolist()))
    if kinds and all(issubclass(kind, str | bytes) for kind in kinds):
        return array
    # Beside one long text, numpy makes each number a text of this length.
    if not all(issubclass(kind, _NUMBERS) for kind in kinds):
        return None
    made = np.asarray(cells)
    return made if made.dtype.kind in "biuf" else None


def _fitted(spec: TensorSpec, array: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Convert `array` to the input's datatype and shape. Return it, and a mask of rows whose values changed."""
    if (array.dtype.kind in "OSU") is not (spec.datatype == "BYTES"):
        what = f"{spec.datatype} {list(spec.shape)}"
        raise UnfitValue(f"input {spec.name!r}: expected {what}, got {_short(array.reshape(-1)[:1].tolist())}")
    shaped = _shaped(spec, array)
    if spec.datatype == "BYTES":
        return _as_bytes(spec, shaped), np.zeros(len(shaped), np.bool_)
    made, kept = converted(shaped, BY_NAME[spec.datatype])
    if kept is None:
        return made, np.zeros(len(shaped), np.bool_)
    return made, np.asarray(~kept.reshape(len(shaped), -1).all(axis=1))


def _shaped(spec: TensorSpec, array: Array) -> Array:
    rows, got, want = len(array), array.shape[1:], spec.shape
    if len(got) == len(want) and all(need in (-1, size) for need, size in zip(want, got, strict=True)):
        return array
    is_fixed = -1 not in want
    if is_fixed and len(got) <= 1 and math.prod(got) == math.prod(want):
        return array.reshape(rows, *want)
    raise UnfitValue(f"input {spec.name!r}: expected the shape {list(want)}, got {list(got)}")


def _as_bytes(spec: TensorSpec, array: Array) -> Array:
    found = np.empty(array.size, object)
    try:
        found[:] = [item.encode() if isinstance(item, str) else item for item in array.reshape(-1).tolist()]
    except UnicodeEncodeError as err:
        raise UnfitValue(f"input {spec.name!r}: not text: {err}") from None
    return found.reshape(array.shape)


def _lost(spec: TensorSpec, cell: Any) -> str:
    return f"input {spec.name!r}: {_short(cell)} is not {spec.datatype}"


def _short(cell: Any) -> str:
    text = repr(cell.tolist() if isinstance(cell, np.ndarray) else cell)
    return text if len(text) <= 80 else text[:77] + "..."
