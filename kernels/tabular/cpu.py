"""tabular on the CPU: row by row, with each output column written once.

Each column of a category is one comparison, 8 or 16 at a time: no search, and no more work than writing the output. No
`fastmath`, because `v != v` detects a missing number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.arrays import frozen
from kernels.tabular.columns import Columns

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def standardise(row, fill, mean, scale, out):
    for j in range(row.size):
        v = row[j]
        out[j] = ((fill[j] if v != v else v) - mean[j]) * scale[j]


@njit(nogil=True, cache=True)
def one_hot(code, categories, out):
    for j in range(categories.size):
        out[j] = np.float32(categories[j] == code)


@njit(nogil=True, cache=True)
def rows(numbers, codes, fill, mean, scale, starts, categories, out):
    f = mean.size
    for i in range(out.shape[0]):
        standardise(numbers[i], fill, mean, scale, out[i, :f])
        for c in range(codes.shape[1]):
            begin, end = starts[c], starts[c + 1]
            one_hot(codes[i, c], categories[begin:end], out[i, f + begin : f + end])


def run(columns: Columns, numbers: Array, codes: Array, out: Array, stream: None = None) -> None:
    c = columns
    rows(frozen(numbers), frozen(codes), c.fill, c.mean, c.scale, c.starts, c.categories, out)
