from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]


@njit(nogil=True, cache=True)
def largest(bits: Any) -> Any:
    most = np.int32(0)
    for j in range(bits.size):
        most = max(most, bits[j] & np.int32(0x7FFFFFFF))
    return np.int32(most).view(np.float32)

MAGIC = np.float32(12582912.0)
MAGIC_BITS = np.int32(0x4B400000)

@njit(nogil=True, cache=True)
def rows(x: Any, bits: Any, quantized: Any, scales: Any) -> None:
    for i in range(x.shape[0]):
        most = largest(bits[i])
        inverse = np.float32(0)
        scale = most / np.float32(127)
        if not most < np.float32(np.inf):
            scale = np.float32(np.nan)
        elif most < np.float32(1.5e-36):
            scale = np.float32(0)
        else:
            inverse = np.float32(127) / most
        scales[i] = scale
        if inverse == 0:
            quantized[i, :] = 0
        else:
            for j in range(x.shape[1]):
                quantized[i, j] = np.int8(np.float32(x[i, j] * inverse + MAGIC).view(np.int32) - MAGIC_BITS)


@njit(nogil=True, cache=True)
def dequantize(quantized: Any, scales: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = np.float32(quantized[i, j]) * scales[i]
