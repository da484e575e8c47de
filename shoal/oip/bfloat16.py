"""Conversion between float32 and the bits of bfloat16, a type that NumPy does not have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_bits(values: Any) -> NDArray[np.uint16]:
    """Round `values` (anything that becomes float32) to the nearest bfloat16, ties to even; NaN stays NaN."""
    wide = np.ascontiguousarray(values, dtype="<f4")
    raw = wide.view("<u4").astype(np.uint64)
    rounded = ((raw + 0x7FFF + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
    # A NaN whose payload lies in the lower half would round to infinity: the quiet bit keeps it a NaN.
    quiet = ((raw >> np.uint64(16)) | np.uint64(0x40)).astype("<u2")
    return np.where(np.isnan(wide), quiet, rounded).reshape(np.shape(values))


def to_float32(bits: Any) -> NDArray[np.float32]:
    """Return the same values as float32: exact."""
    wide: NDArray[np.float32] = (np.asarray(bits).astype("<u4") << np.uint32(16)).view("<f4")
    return wide
