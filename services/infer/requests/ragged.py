"""Values whose rows differ in shape: images of several sizes, token lists of several lengths.

    Tensor         [rows, ...]        every row has the same shape
    Rows           [row, row, ...]    a list with one array for each row, none of which has a batch dimension

A `Value` is one or the other. Only an input or output that is declared ragged (`TensorSpec.is_ragged`) may be `Rows`;
it may be a Tensor as well. On the wire there are tensors only: `dense` makes one, where the rows allow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from services.infer.error_text import quoted, written
from services.infer.requests import tensors
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument

Rows: TypeAlias = list[Tensor]
Value: TypeAlias = "Tensor | Rows"


def rows(value: Value) -> Rows:
    """One array for each row: views of a tensor, or the rows as they are."""
    # With the dots, a row of one element is an array as well.
    return value if isinstance(value, list) else [value[n, ...] for n in range(len(value))]


def joined(values: Iterable[Value]) -> Rows:
    """The rows of several values, one after the other."""
    return [row for value in values for row in rows(value)]


def parted(value: Value, counts: Sequence[int]) -> list[Value]:
    """The opposite: values with so many rows each. Nothing is copied. Raises ValueError when they do not add up."""
    if len(value) != sum(counts):
        raise ValueError(f"{len(value)} rows are not {sum(counts)}")
    parts: list[Value] = []
    start = 0
    for count in counts:
        parts.append(value[start : start + count])
        start += count
    return parts


def is_even(value: Value) -> bool:
    """Whether all rows have one shape: then it can be a tensor."""
    return not isinstance(value, list) or all(row.shape == value[0].shape for row in value)


def dense(value: Value, spec: TensorSpec, what: str) -> Tensor:
    """The tensor that `value` is; `what` opens the message of an error.

    Raises:
        InvalidArgument: its rows differ in shape. Only a step of an ensemble can be given such a value.
    """
    if not isinstance(value, list):
        return value
    if not value:
        return np.empty((0, *(max(dim, 0) for dim in spec.shape[1:])), spec.datatype.dtype)
    if not is_even(value):
        shapes = list(dict.fromkeys(written(row.shape) for row in value))
        raise InvalidArgument(
            f"{what} {quoted(spec.name)}: its {len(value)} rows have different shapes ({', '.join(shapes[:4])}"
            f"{', ...' if len(shapes) > 4 else ''}), and a tensor has one: send one row in a request, or use the model "
            "as a step of an ensemble"
        )
    return value[0][np.newaxis] if len(value) == 1 else np.stack(value)


def arrays(value: Value) -> Rows:
    """The arrays that it consists of: the tensor, or its rows."""
    return value if isinstance(value, list) else [value]


def size_bytes(value: Value) -> int:
    """What it weighs in a queue."""
    return sum(map(tensors.size_bytes, arrays(value)))
