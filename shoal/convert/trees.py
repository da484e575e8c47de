"""Random rows for models of trees: where trees go wrong is at their thresholds, so that is where most rows lie.

The known trap: a framework compares float64 values with float64 thresholds, the converted model float32 with float32.
A threshold that was rounded up takes one float32 value more to the left than the original does. So a feature's
values are mostly its own thresholds, rounded to the type that is served, and their two neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.convert.original import Array

FLOAT32 = np.dtype("f4")
_NEAR, _MISSING, _FAR = 0.6, 0.08, 0.02
# Of the values: at a threshold; missing; far outside of everything seen. The rest lies evenly between the thresholds.


@dataclass(frozen=True)
class Splits:
    """What a model of trees compares its features with."""

    features: int
    thresholds: Mapping[int, Array] = field(default_factory=dict)
    """Distinct, by feature, in float64. A feature that is not there is not looked at."""
    categories: Mapping[int, Array] = field(default_factory=dict)
    """Numbers of the categories that a feature's sets name."""
    takes_missing: bool = False
    """NaN has a way of its own through the trees."""
    as_zero: float = 0.0
    """Numbers of this size and less are taken for 0, which no data are near: they are drawn as 0."""


def draw(splits: Splits, rows: int, generator: np.random.Generator, dtype: np.dtype[Any] = FLOAT32) -> Array:
    """`[rows, features]` of `dtype`, float32 or float64; NaN only where the trees take missing values."""
    columns = [_column(splits, feature, rows, generator, dtype) for feature in range(splits.features)]
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), dtype)


def _column(splits: Splits, feature: int, rows: int, generator: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    if feature in splits.categories:
        named = splits.categories[feature]
        column = generator.choice([*named, named.max() + 1], rows).astype(dtype)
    else:
        column = _numbers(splits.thresholds.get(feature), rows, generator, dtype)
    column[np.abs(column) <= dtype.type(splits.as_zero)] = 0
    if splits.takes_missing:
        column[generator.random(rows) < _MISSING] = np.nan
    return column


def _numbers(thresholds: Array | None, rows: int, generator: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    # Infinite ones tell only missing values from all others.
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
    """Each value in `dtype`, or the number just below or above."""
    exact = values.astype(dtype)
    towards = generator.choice(np.array([-np.inf, 0.0, np.inf], dtype), values.size)
    return np.where(towards == 0, exact, np.nextafter(exact, towards)).astype(dtype)


def rounded_down(thresholds: Array) -> Array:
    """float64 values that float32 holds, the largest not above each: a float32 x is <= it when x <= the threshold."""
    with np.errstate(over="ignore"):
        near = thresholds.astype(np.float32)
    below = np.nextafter(near, np.float32(-np.inf))
    return np.where(near.astype(np.float64) <= thresholds, near, below).astype(np.float64)
