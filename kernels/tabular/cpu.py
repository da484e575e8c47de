"""tabular on the CPU: row by row, each output column written once.

A category's columns are one comparison each, 8 or 16 at a time: no search, and no more work than writing them is.
No `fastmath`: `v != v` is how a missing number is told.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.tabular.columns import Columns

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def _standardise(row: Any, fill: Any, mean: Any, scale: Any, out: Any) -> None:
    for j in range(row.size):
        v = row[j]
        out[j] = ((fill[j] if v != v else v) - mean[j]) * scale[j]


@njit(nogil=True, cache=True)
def _one_hot(code: Any, categories: Any, out: Any) -> None:
    for j in range(categories.size):
        out[j] = np.float32(categories[j] == code)


@njit(nogil=True, cache=True)
def rows(numbers: Any, codes: Any, fill: Any, mean: Any, scale: Any, starts: Any, categories: Any, out: Any) -> None:
    f = mean.size
    for i in range(out.shape[0]):
        _standardise(numbers[i], fill, mean, scale, out[i, :f])
        for c in range(codes.shape[1]):
            begin, end = starts[c], starts[c + 1]
            _one_hot(codes[i, c], categories[begin:end], out[i, f + begin : f + end])


def run(columns: Columns, numbers: Array, codes: Array, out: Array, stream: None = None) -> None:
    c = columns
    rows(numbers, codes, c.fill, c.mean, c.scale, c.starts, c.categories, out)
