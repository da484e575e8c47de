from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _squares(row: Any) -> Any:
    total = np.float32(0)
    for j in range(row.size):
        total += row[j] * row[j]
    return total


@njit(nogil=True, cache=True)
def normalize(row: Any, eps: Any, out: Any) -> None:
    factor = np.float32(1) / max(np.sqrt(_squares(row)), eps)
    for j in range(row.size):
        out[j] = row[j] * factor


@njit(nogil=True, cache=True)
def l2_rows(x: Any, eps: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        normalize(x[i], eps, out[i])


@njit(nogil=True, cache=True)
def pool_rows(tokens: Any, mask: Any, eps: Any, unit: bool, out: Any) -> None:
    for i in range(tokens.shape[0]):
        row = out[i]
        row[:] = 0
        count = 0
        for t in range(tokens.shape[1]):
            if mask[i, t] != 0:
                count += 1
                token = tokens[i, t]
                for j in range(row.size):
                    row[j] += token[j]
        if count:
            factor = np.float32(1) / np.float32(count)
            for j in range(row.size):
                row[j] *= factor
        if unit:
            normalize(row, eps, row)
