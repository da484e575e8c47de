"""pad_tokens on the CPU: a sequence is one copy, the rest of its row one fill. Serial: threads lost at 2 MB a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def survey(offsets: Any, size: int) -> tuple[int, int]:
    """The longest sequence, and the first bad one or -1."""
    longest = 0
    if offsets[0] < 0 or offsets[0] > size:
        return longest, 0
    for i in range(offsets.size - 1):
        # Bounds first: the difference of two int64 may overflow.
        if offsets[i + 1] < offsets[i] or offsets[i + 1] > size:
            return longest, i
        longest = max(longest, offsets[i + 1] - offsets[i])
    return longest, -1


@njit(nogil=True, cache=True)
def _pad_row(tokens: Any, pad: Any, first: int, ids: Any, mask: Any) -> None:
    last = first + tokens.size
    row = ids[first:last]
    # A loop, because it may widen int32 to int64: numba's `row[:] = tokens` does that one by one. Unsigned: no index
    # counts from the end.
    for j in range(tokens.size):
        row[np.uint64(j)] = tokens[np.uint64(j)]
    mask[first:last] = 1
    ids[:first] = pad
    mask[:first] = 0
    ids[last:] = pad
    mask[last:] = 0


@njit(nogil=True, cache=True)
def pad_rows(flat: Any, offsets: Any, pad: Any, left: bool, ids: Any, mask: Any) -> None:
    width = ids.shape[1]
    for i in range(ids.shape[0]):
        length = min(offsets[i + 1] - offsets[i], width)
        tokens = flat[offsets[i] : offsets[i] + length]
        _pad_row(tokens, pad, width - length if left else 0, ids[i], mask[i])


def run(flat: Array, offsets: Array, pad_id: int, left: bool, ids: Array, mask: Array, stream: None = None) -> None:
    pad_rows(flat, offsets, pad_id, left, ids, mask)
