"""Reference version of quantize_rows in NumPy; the other versions give the same bits. float32 throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

QMAX = np.float32(127)
"""Largest quantized magnitude."""

MIN_ABSMAX = QMAX * np.finfo(np.float32).tiny
"""Rows whose largest magnitude is below this are not scaled: it would give a subnormal scale, or 0."""


def quantize(x: Array, quantized: Array, scales: Array, stream: None = None) -> None:
    """Quantize each row of `x`, float32 [n, m], into `quantized`, int8 [n, m], and `scales`, float32 [n]."""
    for i, row in enumerate(x):
        absmax = np.abs(row).max(initial=np.float32(0))
        if absmax < MIN_ABSMAX:
            quantized[i], scales[i] = 0, 0
        elif absmax < np.inf:
            quantized[i], scales[i] = np.rint(row / (absmax / QMAX)), absmax / QMAX
        else:
            quantized[i], scales[i] = 0, np.nan


def dequantize(quantized: Array, scales: Array, out: Array, stream: None = None) -> None:
    """Write quantized * scales, row by row, to `out`: int8 [n, m] and float32 [n] to float32 [n, m]."""
    np.multiply(quantized, scales[:, None], out=out, dtype=np.float32, casting="same_kind")
