"""quantize_rows on the CPU: reads each row twice, both times in vectors of 8 or 16.

The largest magnitude is computed on integers, because LLVM vectorises a maximum of floats only if NaN may be ignored.
One addition rounds: 1.5 * 2^23 + y has no fraction bits, and its low bits are y rounded to nearest even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.arrays import frozen
from kernels.quantize_rows.reference import LEAST, LEVELS

Array = npt.NDArray[Any]

ROUNDER = np.float32(1.5 * 2**23)
ROUNDER_BITS = np.int32(0x4B400000)


@njit(nogil=True, cache=True)
def largest_of(bits):
    most = np.int32(0)
    for j in range(bits.size):
        most = max(most, bits[j] & np.int32(0x7FFFFFFF))
    return np.int32(most).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def round_row(row, scale, numbers):
    for j in range(row.size):
        numbers[j] = np.float32(row[j] / scale + ROUNDER).view(np.int32) - ROUNDER_BITS


@njit(nogil=True, cache=True)
def quantize_all(x, bits, numbers, scales):
    """Quantize all rows of `x`; `bits` is a view of `x` as int32."""
    for i in range(x.shape[0]):
        most = largest_of(bits[i])
        if LEAST <= most < np.inf:
            scales[i] = most / LEVELS
            round_row(x[i], scales[i], numbers[i])
        else:
            scales[i] = np.float32(0) if most < LEAST else np.float32(np.nan)
            numbers[i] = 0


@njit(nogil=True, cache=True)
def dequantize_all(numbers, scales, out):
    for i in range(out.shape[0]):
        row, scale, into = numbers[i], scales[i], out[i]
        for j in range(row.size):
            into[j] = np.float32(row[j]) * scale


def quantize(x: Array, numbers: Array, scales: Array, stream: None = None) -> None:
    x = frozen(x)
    quantize_all(x, x.view(np.int32), numbers, scales)


def dequantize(numbers: Array, scales: Array, out: Array, stream: None = None) -> None:
    dequantize_all(frozen(numbers), frozen(scales), out)
