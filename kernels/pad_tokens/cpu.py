"""pad_tokens on the CPU: a sequence is one copy, the rest of its row one fill. Serial: threads lost at 2 MB a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def longest(offsets: Any, size: int, width: int) -> tuple[int, int]:
    """The longest sequence, and the first bad one or -1: one that leaves [0, size), runs backwards or exceeds `width`."""
    most = 0
    if offsets[0] < 0:
        return most, 0
    for i in range(offsets.size - 1):
        length = offsets[i + 1] - offsets[i]
        if length < 0 or offsets[i + 1] > size or length > width:
            return most, i
        most = max(most, length)
    return most, -1


@njit(nogil=True, cache=True)
def rows(flat: Any, offsets: Any, pad: Any, left: bool, ids: Any, mask: Any) -> None:
    width = ids.shape[1]
    for i in range(ids.shape[0]):
        begin = offsets[i]
        length = min(offsets[i + 1] - begin, width)
        first = width - length if left else 0
        ids[i, :first] = pad
        mask[i, :first] = 0
        ids[i, first : first + length] = flat[begin : begin + length]
        mask[i, first : first + length] = 1
        ids[i, first + length :] = pad
        mask[i, first + length :] = 0
