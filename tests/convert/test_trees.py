"""Rows around thresholds, and thresholds as float32."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.convert import trees

FLOAT64 = st.floats(min_value=-1e30, max_value=1e30)
FLOAT32 = st.floats(width=32, allow_nan=False, min_value=-(2.0**99), max_value=2.0**99)


@given(FLOAT64, FLOAT32)
def test_a_threshold_rounded_down_decides_alike(threshold: float, x: float) -> None:
    """For every float32 x; the one just below, at and above the threshold among them."""
    rounded = trees.rounded_down(np.array([threshold]))[0]
    assert np.float32(rounded) == rounded
    beside = np.float32(threshold)
    for value in (x, beside, np.nextafter(beside, np.float32(np.inf)), np.nextafter(beside, np.float32(-np.inf))):
        assert (float(value) <= threshold) == (float(value) <= rounded)


def test_rows_lie_at_the_thresholds_and_beside_them() -> None:
    threshold = 1 / 3
    splits = trees.Splits(3, {0: np.array([threshold])}, {1: np.array([2, 5])}, takes_missing=True)
    rows = trees.draw(splits, 2000, np.random.default_rng(0))
    assert (rows.shape, rows.dtype) == ((2000, 3), np.float32)
    at = np.float32(threshold)
    for value in (at, np.nextafter(at, np.float32(-1)), np.nextafter(at, np.float32(1))):
        assert (rows[:, 0] == value).sum() > 100
    assert set(rows[~np.isnan(rows[:, 1]), 1]) == {2, 5, 6}  # 6: a category that it does not know.
    assert 50 < np.isnan(rows[:, 2]).sum() < 400


def test_no_missing_values_where_the_trees_take_none() -> None:
    splits = trees.Splits(2, {0: np.array([1.0, np.inf])}, as_zero=1e-3)
    rows = trees.draw(splits, 500, np.random.default_rng(0), np.dtype("f8"))
    assert rows.dtype == np.float64
    assert np.isfinite(rows).all()
    small = np.abs(rows) <= 1e-3
    assert not rows[small].any()
