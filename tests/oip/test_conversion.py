"""Conversion of numbers to a datatype: an element keeps its meaning, or is marked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.oip import bfloat16
from shoal.oip.conversion import converted
from shoal.oip.datatypes import BY_NAME, DTYPES

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
FLOATS = st.floats(width=32) | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38])


@given(
    hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64)), SHAPES),
    st.sampled_from([name for name in DTYPES if name != "BF16"]),
)
def test_a_conversion_keeps_every_value_or_marks_it(array: np.ndarray, datatype: str) -> None:
    got, kept = converted(array, BY_NAME[datatype])
    assert (got.dtype, got.shape) == (DTYPES[datatype], array.shape)
    if kept is None:
        kept = np.ones(array.shape, np.bool_)
    assert kept.shape == array.shape
    for one, other, same in zip(got.reshape(-1).tolist(), array.reshape(-1).tolist(), kept.reshape(-1), strict=True):
        if got.dtype.kind == "f":
            assert same == (not math.isfinite(other) or math.isfinite(one))
        else:
            assert same == (one == other)


def test_a_number_beyond_float32_is_no_bfloat16() -> None:
    _, kept = converted(np.array([1.0, 1e300, math.inf]), BY_NAME["BF16"])
    assert kept is not None
    assert kept.tolist() == [True, False, True]


@given(st.lists(FLOATS, max_size=20))
def test_bfloat16_is_the_nearest_of_the_two_neighbours(values: list[float]) -> None:
    wide = np.array(values, dtype=np.float32)
    back = bfloat16.to_float32(bfloat16.to_bits(wide))
    np.testing.assert_array_equal(np.isnan(back), np.isnan(wide))
    for value, got in zip(wide, back, strict=True):
        if not np.isfinite(value):
            assert np.isnan(value) or got == value
            continue
        below = (np.array(value).view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        step = np.array(0x10000, np.uint32)
        with np.errstate(over="ignore"):
            above = (below.view(np.uint32) + step).astype(np.uint32).view(np.float32)
        if np.isfinite(above):
            assert abs(float(got) - float(value)) == min(
                abs(float(below) - float(value)), abs(float(above) - float(value))
            )


def test_bfloat16_is_widened_exactly() -> None:
    assert bfloat16.to_float32(np.array([0x3FC0, 0xC000, 0x7F80], np.uint16)).tolist() == [1.5, -2.0, math.inf]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_bfloat16_keeps_the_shape(shape: tuple[int, ...]) -> None:
    bits = bfloat16.to_bits(np.ones(shape))
    assert (bits.shape, bits.dtype, bfloat16.to_float32(bits).shape) == (shape, np.uint16, shape)
