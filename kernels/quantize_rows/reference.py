"""Reference version of quantize_rows in NumPy; the other versions give the same bits. float32 throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LEVELS = np.float32(127)
# A smaller maximum would give a subnormal scale, or 0.
LEAST = LEVELS * np.finfo(np.float32).tiny


def quantize(x: Array, numbers: Array, scales: Array, stream: None = None) -> None:
    for i, row in enumerate(x):
        most = np.abs(row).max(initial=np.float32(0))
        if most < LEAST:
            numbers[i], scales[i] = 0, 0
        elif most < np.inf:
            numbers[i], scales[i] = np.rint(row / (most / LEVELS)), most / LEVELS
        else:
            numbers[i], scales[i] = 0, np.nan


def dequantize(numbers: Array, scales: Array, out: Array, stream: None = None) -> None:
    np.multiply(numbers, scales[:, None], out=out, dtype=np.float32, casting="same_kind")
