"""pool_normalize on the CPU: tokens that count are added up, a row of numbers at a time; then one pass for the length.

Only the sum of squares may be reordered (`reassoc`), which makes it a vector's; NaN and infinities keep their meaning.
"""

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
def _normalize(row: Any, eps: Any, out: Any) -> None:
    length = np.sqrt(_squares(row))
    factor = np.float32(1) / (eps if length < eps else length)
    for j in range(row.size):
        out[j] = row[j] * factor


@njit(nogil=True, cache=True)
def _mean(tokens: Any, mask: Any, out: Any) -> None:
    out[:] = 0
    count = 0
    for t in range(mask.size):
        if mask[t] != 0:
            count += 1
            token = tokens[t]
            for j in range(out.size):
                out[j] += token[j]
    if count:
        factor = np.float32(1) / np.float32(count)
        for j in range(out.size):
            out[j] *= factor


@njit(nogil=True, cache=True)
def pool_rows(tokens: Any, mask: Any, eps: Any, normalize: bool, out: Any) -> None:
    for i in range(out.shape[0]):
        _mean(tokens[i], mask[i], out[i])
        if normalize:
            _normalize(out[i], eps, out[i])


@njit(nogil=True, cache=True)
def l2_rows(x: Any, eps: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        _normalize(x[i], eps, out[i])


def pool(tokens: Array, mask: Array, eps: np.float32, normalize: bool, out: Array, stream: None = None) -> None:
    pool_rows(tokens.astype(np.float32, copy=False), mask, eps, normalize, out)


def l2(x: Array, eps: np.float32, out: Array, stream: None = None) -> None:
    l2_rows(x.astype(np.float32, copy=False), eps, out)
