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
from kernels.quantize_rows.reference import MIN_ABSMAX, QMAX

Array = npt.NDArray[Any]

ROUNDER = np.float32(1.5 * 2**23)
ROUNDER_BITS = np.int32(0x4B400000)


@njit(nogil=True, cache=True)
def absmax_of(bits):
    """Return the largest magnitude of a row, float32; `bits` is the row as int32 [m]. NaN is larger than infinity."""
    absmax = np.int32(0)
    for j in range(bits.size):
        absmax = max(absmax, bits[j] & np.int32(0x7FFFFFFF))
    return np.int32(absmax).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def round_row(row, scale, quantized):
    """Write row / scale, float32 [m], rounded to nearest even, to `quantized`, int8 [m]."""
    for j in range(row.size):
        quantized[j] = np.float32(row[j] / scale + ROUNDER).view(np.int32) - ROUNDER_BITS


@njit(nogil=True, cache=True)
def quantize_all(x, bits, quantized, scales):
    """Quantize all rows of `x`, float32 [n, m], into int8 [n, m] and float32 [n]; `bits` is `x` as int32."""
    for i in range(x.shape[0]):
        absmax = absmax_of(bits[i])
        if MIN_ABSMAX <= absmax < np.inf:
            scales[i] = absmax / QMAX
            round_row(x[i], scales[i], quantized[i])
        else:
            scales[i] = np.float32(0) if absmax < MIN_ABSMAX else np.float32(np.nan)
            quantized[i] = 0


@njit(nogil=True, cache=True)
def dequantize_all(quantized, scales, out):
    """Write quantized * scales, int8 [n, m] and float32 [n], row by row to `out`, float32 [n, m]."""
    for i in range(out.shape[0]):
        row, scale, into = quantized[i], scales[i], out[i]
        for j in range(row.size):
            into[j] = np.float32(row[j]) * scale


def quantize(x: Array, quantized: Array, scales: Array, stream: None = None) -> None:
    x = frozen(x)
    quantize_all(x, x.view(np.int32), quantized, scales)


def dequantize(quantized: Array, scales: Array, out: Array, stream: None = None) -> None:
    dequantize_all(frozen(quantized), frozen(scales), out)
