"""tabular on the CPU: row by row, each output column written once.

A category's columns are one comparison each, 8 or 16 at a time: no search, and as much work as writing them is.
No `fastmath`: `v != v` is how a missing value is told.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def rows(numbers: Any, codes: Any, fill: Any, mean: Any, scale: Any, starts: Any, categories: Any, out: Any) -> None:
    f = numbers.shape[1]
    for i in range(out.shape[0]):
        for j in range(f):
            v = numbers[i, j]
            out[i, j] = ((fill[j] if v != v else v) - mean[j]) * scale[j]
        for c in range(codes.shape[1]):
            code = codes[i, c]
            for j in range(np.uint64(starts[c]), np.uint64(starts[c + 1])):
                out[i, np.uint64(f) + j] = np.float32(categories[j] == code)
