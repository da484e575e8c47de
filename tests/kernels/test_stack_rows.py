"""stack_rows and split_rows against the reference, at odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.stack_rows import split_rows, stack_rows, stack_rows_reference

DTYPES = ["?", "i1", "<i8", "<u2", "<f2", "<f4", "<f8"]


@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    row=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    spare=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_reference_and_splits_back(counts, row, dtype, spare, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 2 if dtype == "?" else 100, (n, *row)).astype(dtype) for n in counts]
    out = np.empty((sum(counts) + spare, *row), dtype)
    stacked = stack_rows(parts, out)
    np.testing.assert_array_equal(stacked, stack_rows_reference(parts))
    views = split_rows(stacked, counts)
    for part, view in zip(parts, views, strict=True):
        np.testing.assert_array_equal(part, view)
        assert view.size == 0 or np.shares_memory(view, out)


def test_objects_are_stacked_by_reference():
    parts = [np.array([[b"a"], [b"bc"]], object), np.array([[b""]], object)]
    assert stack_rows(parts, np.empty((5, 1), object)).tolist() == [[b"a"], [b"bc"], [b""]]


@pytest.mark.parametrize(
    ("parts", "out"),
    [
        ([], np.empty((1, 1))),
        ([np.ones((2, 1)), np.ones((2, 1))], np.empty((3, 1))),
        ([np.ones((1, 2))], np.empty((1, 3))),
        ([np.ones((1, 2), "f4")], np.empty((1, 2), "f8")),
    ],
)
def test_refuses_what_does_not_fit_and_leaves_the_buffer_alone(parts, out):
    out[:] = 7
    with pytest.raises(ValueError, match="stack_rows"):
        stack_rows(parts, out)
    assert (out == 7).all()


@pytest.mark.parametrize("batch", [np.ones((3, 2)), np.ones(())])
def test_split_refuses_counts_that_do_not_add_up(batch):
    with pytest.raises(ValueError, match="is not 4 rows"):
        split_rows(batch, [1, 3])
