"""pool_normalize on the CPU: adds the unmasked tokens, one row of numbers at a time, then scales in a second pass.

Only the sum of squares may be reordered (`reassoc`), which lets LLVM vectorise it. NaN and infinities keep their
meaning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.arrays import frozen

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def sum_of_squares(row):
    total = np.float32(0)
    for j in range(row.size):
        total += row[j] * row[j]
    return total


@njit(nogil=True, cache=True)
def normalize_row(row, eps, out):
    length = np.sqrt(sum_of_squares(row))
    factor = np.float32(1) / (eps if length < eps else length)
    for j in range(row.size):
        out[j] = row[j] * factor


@njit(nogil=True, cache=True)
def mean_of_tokens(tokens, mask, out):
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
def pool_rows(tokens, mask, eps, normalize, out):
    for i in range(out.shape[0]):
        mean_of_tokens(tokens[i], mask[i], out[i])
        if normalize:
            normalize_row(out[i], eps, out[i])


@njit(nogil=True, cache=True)
def l2_rows(x, eps, out):
    for i in range(out.shape[0]):
        normalize_row(x[i], eps, out[i])


def pool(tokens: Array, mask: Array, eps: np.float32, normalize: bool, out: Array, stream: None = None) -> None:
    pool_rows(frozen(tokens.astype(np.float32, copy=False)), frozen(mask), eps, normalize, out)


def l2(x: Array, eps: np.float32, out: Array, stream: None = None) -> None:
    l2_rows(frozen(x.astype(np.float32, copy=False)), eps, out)
