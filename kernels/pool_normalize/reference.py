"""Reference version of pool_normalize, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def pool(tokens: Array, mask: Array, eps: np.float32, normalize: bool, out: Array, stream: None = None) -> None:
    for row, text, unmasked in zip(out, tokens, mask != 0, strict=True):
        pooled = text[unmasked].sum(axis=0, dtype=np.float64) / max(np.count_nonzero(unmasked), 1)
        row[:] = _normalized(pooled, eps) if normalize else pooled


def l2(x: Array, eps: np.float32, out: Array, stream: None = None) -> None:
    for row, source in zip(out, x, strict=True):
        row[:] = _normalized(source.astype(np.float64), eps)


def _normalized(row: Array, eps: np.float32) -> Array:
    squares = np.square(row).sum()
    # The other versions add in float32, where this sum overflows.
    length = np.inf if squares > np.finfo(np.float32).max else np.sqrt(squares)
    with np.errstate(invalid="ignore"):
        return row / (float(eps) if length < eps else length)
