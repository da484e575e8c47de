"""Values between the steps of one request: those of `requests.ragged`, or `SKIPPED` after a skipped step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import numpy as np

from services.infer.requests.tensors import Tensor
from shoal.oip.datatypes import Datatype


class Skipped(Enum):
    """Type of the marker `SKIPPED`."""

    SKIPPED = auto()


SKIPPED = Skipped.SKIPPED


def empty(datatype: Datatype, shape: Sequence[int]) -> Tensor:
    """Return a tensor of this shape whose variable dimensions are 0."""
    return np.zeros([max(dim, 0) for dim in shape], datatype.dtype)


def as_text(tensor: Tensor) -> Tensor:
    """Return a BYTES tensor with `str` elements. Raises ValueError when an element is not UTF-8."""
    try:
        return _mapped(tensor, lambda element: element.decode() if isinstance(element, bytes) else element)
    except UnicodeDecodeError as err:
        raise ValueError(f"its model's BYTES are text, and this is not UTF-8 ({err})") from err


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a BYTES tensor with `bytes` elements."""
    return _mapped(tensor, lambda element: element.encode() if isinstance(element, str) else element)


def _mapped(tensor: Tensor, convert: Callable[[Any], Any]) -> Tensor:
    converted = np.empty(tensor.size, object)
    converted[:] = [convert(element) for element in tensor.reshape(-1)]
    return converted.reshape(tensor.shape)
