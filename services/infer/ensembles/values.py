"""What flows between the steps of one request: values of `calls.ragged`, or nothing, where a step was skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import numpy as np

from services.infer.requests.tensors import Tensor
from shoal.oip.datatypes import Datatype


class Skipped(Enum):
    """The type of `SKIPPED`."""

    SKIPPED = auto()


SKIPPED = Skipped.SKIPPED


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
