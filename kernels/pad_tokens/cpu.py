"""pad_tokens on the CPU: one copy and one fill per row. Single-threaded: threads were slower for batches of 2 MB."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.arrays import frozen

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def survey_offsets(offsets, size):
    longest = 0
    if offsets[0] < 0 or offsets[0] > size:
        return longest, 0
    for i in range(offsets.size - 1):
        # Check the bounds first, because the difference of two int64 may overflow.
        if offsets[i + 1] < offsets[i] or offsets[i + 1] > size:
            return longest, i
        longest = max(longest, offsets[i + 1] - offsets[i])
    return longest, -1


@njit(nogil=True, cache=True)
def pad_row(tokens, pad, first, ids, mask):
    last = first + tokens.size
    row = ids[first:last]
    # The copy may widen int32 to int64; this loop is vectorised, numba's `row[:] = tokens` is not. An unsigned index
    # needs no check for negative values.
    for j in range(tokens.size):
        row[np.uint64(j)] = tokens[np.uint64(j)]
    mask[first:last] = 1
    ids[:first] = pad
    mask[:first] = 0
    ids[last:] = pad
    mask[last:] = 0


@njit(nogil=True, cache=True)
def pad_rows(flat, offsets, pad, left, ids, mask):
    width = ids.shape[1]
    for i in range(ids.shape[0]):
        length = min(offsets[i + 1] - offsets[i], width)
        tokens = flat[offsets[i] : offsets[i] + length]
        pad_row(tokens, pad, width - length if left else 0, ids[i], mask[i])


def survey(offsets: Array, size: int) -> tuple[int, int]:
    """Return the length of the longest sequence, and the index of the first invalid one or -1."""
    longest, bad = survey_offsets(frozen(offsets), size)
    return longest, bad


def run(flat: Array, offsets: Array, pad_id: int, left: bool, ids: Array, mask: Array, stream: None = None) -> None:
    pad_rows(frozen(flat), frozen(offsets), pad_id, left, ids, mask)
