"""Ragged values: rows that differ in shape, such as images of several sizes or token lists of several lengths.

    Tensor         [rows, ...]        every row has the same shape
    Rows           [row, row, ...]    a list with one array for each row, none of which has a batch dimension

A `Value` is one or the other. Only an input or output that is declared ragged (`TensorSpec.is_ragged`) may be `Rows`;
it may be a Tensor as well. A message holds tensors only: `dense` makes one, where the rows allow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from services.infer.error_text import quoted
from services.infer.requests import tensors
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument
from shoal.oip.tensors import shape_text

Rows: TypeAlias = list[Tensor]
Value: TypeAlias = "Tensor | Rows"


# As many as `crop_boxes` may be configured to return. A view takes 200 bytes and more, a row may have none.
_MAX_ROWS = 100_000


def rows(value: Value) -> Rows:
    """Return one array for each row: views of a tensor, or the rows themselves.

    Raises:
        InvalidArgument: the tensor has too many rows.
    """
    if isinstance(value, list):
        return value
    if len(value) > _MAX_ROWS:
        raise InvalidArgument(
            f"a tensor of shape {shape_text(value.shape)} is given row by row: expected at most {_MAX_ROWS} rows"
        )
    # With the dots, a row of one element is an array as well.
    return [value[n, ...] for n in range(len(value))]


def joined(values: Iterable[Value]) -> Rows:
    """Return the rows of several values, one after the other."""
    return [row for value in values for row in rows(value)]


def parted(value: Value, counts: Sequence[int]) -> list[Value]:
    """Split a value into values with `counts` rows each, without copies. Raises ValueError for a wrong total."""
    if len(value) != sum(counts):
        raise ValueError(f"{len(value)} rows are not {sum(counts)}")
    parts: list[Value] = []
    start = 0
    for count in counts:
        parts.append(value[start : start + count])
        start += count
    return parts


def is_even(value: Value) -> bool:
    """Return True when all rows have one shape, so that the value can be a tensor."""
    return not isinstance(value, list) or all(row.shape == value[0].shape for row in value)


def dense(value: Value, spec: TensorSpec, what: str) -> Tensor:
    """Return `value` as a tensor; `what` opens the text of an error.

    Raises:
        InvalidArgument: the rows differ in shape. Only a step of an ensemble can take such a value.
    """
    if not isinstance(value, list):
        return value
    if not value:
        return np.empty((0, *(max(dim, 0) for dim in spec.shape[1:])), spec.datatype.dtype)
    if not is_even(value):
        shapes = list(dict.fromkeys(shape_text(row.shape) for row in value))
        raise InvalidArgument(
            f"{what} {quoted(spec.name)}: its {len(value)} rows have different shapes ({', '.join(shapes[:4])}"
            f"{', ...' if len(shapes) > 4 else ''}), and a tensor has one: send one row in a request, or use the model "
            "as a step of an ensemble"
        )
    return value[0][np.newaxis] if len(value) == 1 else np.stack(value)


def arrays(value: Value) -> Rows:
    """Return the arrays of a value: the tensor, or the rows."""
    return value if isinstance(value, list) else [value]


def size_bytes(value: Value) -> int:
    """Return the size of a value in a queue."""
    return sum(map(tensors.size_bytes, arrays(value)))
