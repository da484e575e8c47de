"""What flows between the steps of one request: an array, or rows that need not have one shape (a list of arrays).

A value of shape [n, ...] may be either; rows of different shapes (crops of an image, texts of different lengths) can
only be the second. `SKIPPED` stands for a tensor that no step gives this time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, TypeAlias

import numpy as np

from services.infer.calls.datatypes import Datatype
from services.infer.calls.tensors import Tensor
from services.infer.wording import written

Value: TypeAlias = "Tensor | list[Tensor]"


class Skipped(Enum):
    """The type of `SKIPPED`."""

    SKIPPED = auto()


SKIPPED = Skipped.SKIPPED


def rows(value: Value) -> Sequence[Tensor]:
    """The rows of a value. Raises ValueError when it is an array without a dimension."""
    if isinstance(value, list):
        return value
    if not value.ndim:
        raise ValueError("it has no dimension, and so no rows")
    return [value[n, ...] for n in range(len(value))]  # With the dots, a row of one element is an array as well.


def array(value: Value, datatype: Datatype, shape: Sequence[int]) -> Tensor:
    """A value as one array: [n, ...].

    Args:
        datatype, shape: as promised; what an array of no rows is like.

    Raises:
        ValueError: its rows have different shapes.
    """
    if not isinstance(value, list):
        return value
    if not value:
        return empty(datatype, (0, *shape[1:]))
    first = value[0].shape
    for row in value:
        if row.shape != first:
            raise ValueError(f"its rows have different shapes, {written(first)} and {written(row.shape)}")
    return np.stack(value)


def empty(datatype: Datatype, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape whose free dimensions are 0."""
    return np.zeros([max(dim, 0) for dim in shape], datatype.dtype)


def as_text(tensor: Tensor) -> Tensor:
    """BYTES as `str`. Raises ValueError when an element is not UTF-8."""
    try:
        return _each(tensor, lambda element: element.decode() if isinstance(element, bytes) else element)
    except UnicodeDecodeError as err:
        raise ValueError(f"its model's BYTES are text, and this is not UTF-8 ({err})") from err


def as_bytes(tensor: Tensor) -> Tensor:
    """BYTES as `bytes`."""
    return _each(tensor, lambda element: element.encode() if isinstance(element, str) else element)


def _each(tensor: Tensor, change: Callable[[Any], Any]) -> Tensor:
    changed = np.empty(tensor.size, object)
    changed[:] = [change(element) for element in tensor.reshape(-1)]
    return changed.reshape(tensor.shape)
