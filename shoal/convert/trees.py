"""Random rows for tree models, mostly at the thresholds, where errors of a conversion show.

The known error: a framework compares float64 values with float64 thresholds, the converted model float32 with float32.
A threshold that was rounded up sends one more float32 value to the left. So most values are thresholds, rounded to the
served type, and their two neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.convert.original import Array

FLOAT32 = np.dtype("f4")
# Shares of the values: at a threshold; missing; far outside the thresholds. The rest is uniform between the thresholds.
_NEAR, _MISSING, _FAR = 0.6, 0.08, 0.02


@dataclass(frozen=True)
class Splits:
    """Thresholds and categories that a tree model compares its features with."""

    features: int
    thresholds: Mapping[int, Array] = field(default_factory=dict)
    """Distinct thresholds in float64, by feature. Features without an entry are unused."""
    categories: Mapping[int, Array] = field(default_factory=dict)
    """Category numbers in the model's sets, by feature."""
    takes_missing: bool = False
    """True when the trees handle NaN separately."""
    as_zero: float = 0.0
    """Values up to this size count as 0. Data are 0 or much larger, so random values in this range become 0."""


def draw(splits: Splits, rows: int, generator: np.random.Generator, dtype: np.dtype[Any] = FLOAT32) -> Array:
    """Return `[rows, features]` of `dtype`, float32 or float64; NaN only where the trees take missing values."""
    columns = [_column(splits, feature, rows, generator, dtype) for feature in range(splits.features)]
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), dtype)


def _column(splits: Splits, feature: int, rows: int, generator: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    if feature in splits.categories:
        known = splits.categories[feature]
        column = generator.choice([*known, known.max() + 1], rows).astype(dtype)
    else:
        column = _numbers(splits.thresholds.get(feature), rows, generator, dtype)
    column[np.abs(column) <= dtype.type(splits.as_zero)] = 0
    if splits.takes_missing:
        column[generator.random(rows) < _MISSING] = np.nan
    return column


def _numbers(thresholds: Array | None, rows: int, generator: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    # Infinite thresholds only separate missing values from the others.
    thresholds = None if thresholds is None else thresholds[np.isfinite(thresholds)]
    if thresholds is None or not thresholds.size:
        return generator.standard_normal(rows).astype(dtype)
    low, high = float(thresholds.min()), float(thresholds.max())
    margin = 0.25 * (high - low) or max(abs(low), 1.0)
    column = generator.uniform(low - margin, high + margin, rows).astype(dtype)
    near = generator.random(rows) < _NEAR
    column[near] = _neighbours(generator.choice(thresholds, int(near.sum())), generator, dtype)
    far = generator.random(rows) < _FAR
    column[far] = generator.choice(np.array([low - 1e3 * margin, 0.0, high + 1e3 * margin]), int(far.sum()))
    return column


def _neighbours(values: Array, generator: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    """Return each value in `dtype`, or the next number below or above it, at random."""
    exact = values.astype(dtype)
    towards = generator.choice(np.array([-np.inf, 0.0, np.inf], dtype), values.size)
    return np.where(towards == 0, exact, np.nextafter(exact, towards)).astype(dtype)


def rounded_down(thresholds: Array) -> Array:
    """Return the largest float32 values not above the thresholds, as float64: `x <= t` is unchanged for float32 x."""
    with np.errstate(over="ignore"):
        near = thresholds.astype(np.float32)
    below = np.nextafter(near, np.float32(-np.inf))
    return np.where(near.astype(np.float64) <= thresholds, near, below).astype(np.float64)
