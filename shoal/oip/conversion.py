"""Conversion of arrays of numbers to a datatype, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.oip import bfloat16
from shoal.oip.datatypes import BY_NAME, Datatype


def converted(array: NDArray[Any], datatype: Datatype) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return `array` as the NumPy type of `datatype`, and a mask of the elements that kept their meaning.

    A mask of None means all elements. Rounding of fractions keeps the meaning. An overflow does not, and neither does a
    fraction in an integer type. `datatype` is not BYTES.
    """
    if datatype.name == "BF16":
        wide, kept = converted(array, BY_NAME["FP32"])
        return bfloat16.to_bits(wide), kept
    target = datatype.dtype
    if array.dtype == target:
        return array, None
    with np.errstate(all="ignore"):
        made = array.astype(target)
        return made, _kept(array, made) if array.size else None


def _kept(array: NDArray[Any], made: NDArray[Any]) -> NDArray[np.bool_]:
    if made.dtype.kind == "f":
        finite = np.isfinite(array) if array.dtype.kind == "f" else np.ones(array.shape, np.bool_)
        return np.asarray(~finite | np.isfinite(made))
    if array.dtype.kind == "f":
        # A narrow float would make infinities of the limits below.
        array = array.astype(np.float64)
    same = np.asarray(made.astype(array.dtype) == array)
    if made.dtype.kind in "iu" and array.dtype.kind in "iu":
        # A sign that wraps around comes back equal.
        same &= np.asarray((made < 0) == (array < 0))
    if made.dtype.kind in "iu" and array.dtype.kind == "f":
        limits = np.iinfo(made.dtype)
        # float(max) rounds up to a power of two that no integer type holds, hence `<`.
        same &= np.asarray((array >= float(limits.min)) & (array < float(limits.max) + 1))
    return same
