"""top_k against the reference: odd sizes, ties, NaN, infinities, the ends of every integer type."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.top_k import top_k, top_k_reference

DTYPES = ["?", "i1", "u1", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8"]


def values(dtype: str) -> list:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return [0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), float("nan")]
    if kind.kind == "b":
        return [False, True]
    info = np.iinfo(kind)
    return [info.min, info.min + 1, 0, 1, info.max - 1, info.max]


@given(st.data())
def test_equals_the_reference(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n, m = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 33))
    flat = data.draw(st.lists(st.sampled_from(values(dtype)), min_size=n * m, max_size=n * m))
    rows = np.array(flat, dtype).reshape(n, m)
    k = data.draw(st.integers(1, 40))
    got, want = top_k(rows, k), top_k_reference(rows, k)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0])
    assert got[0].dtype == rows.dtype


def test_order_of_ties_and_nan():
    row = np.array([[np.nan, 1, -np.inf, 1, np.inf, np.nan]], "f4")
    assert top_k(row, 6)[1].tolist() == [[4, 1, 3, 2, 0, 5]]
    assert top_k(row, 2)[1].tolist() == [[4, 1]]


def test_long_rows():
    rows = np.random.default_rng(1).integers(0, 1000, (3, 10_007)).astype("f4")
    np.testing.assert_array_equal(top_k(rows, 17)[1], top_k_reference(rows, 17)[1])


def test_the_rows_are_left_alone():
    rows = np.array([[3, 1, 2]], "f4")
    top_k(rows, 2)
    assert rows.tolist() == [[3, 1, 2]]


@pytest.mark.parametrize(("rows", "k"), [(np.ones(3), 1), (np.ones((1, 3)), 0)])
def test_refuses_what_is_not_rows(rows, k):
    with pytest.raises(ValueError, match="expected rows"):
        top_k(rows, k)


def test_refuses_what_has_no_order():
    with pytest.raises(TypeError, match="no order"):
        top_k(np.array([[b"a"]], object), 1)
