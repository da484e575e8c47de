"""pool_normalize in float64: what the other versions must equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def pool(tokens: Array, mask: Array, eps: np.float32, normalize: bool, out: Array, stream: None = None) -> None:
    for row, text, counts in zip(out, tokens, mask != 0, strict=True):
        pooled = text[counts].sum(axis=0, dtype=np.float64) / max(np.count_nonzero(counts), 1)
        row[:] = _divided(pooled, eps) if normalize else pooled


def l2(x: Array, eps: np.float32, out: Array, stream: None = None) -> None:
    for row, given in zip(out, x, strict=True):
        row[:] = _divided(given.astype(np.float64), eps)


def _divided(row: Array, eps: np.float32) -> Array:
    squares = np.square(row).sum()
    # The others add in float32, and have no more room.
    length = np.inf if squares > np.finfo(np.float32).max else np.sqrt(squares)
    with np.errstate(invalid="ignore"):
        return row / (float(eps) if length < eps else length)
