"""tabular's GPU version against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.tabular import columns, reference, tabular


@pytest.mark.parametrize(
    ("n", "f", "sizes"), [(1, 1, [1]), (5, 4, [2, 9, 0]), (7, 130, []), (4, 0, [3, 4]), (0, 2, [1])]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("code", [np.int32, np.int64])
def test_equals_the_reference(n, f, sizes, dtype, code):
    rng = np.random.default_rng(n)
    made = columns(
        mean=rng.normal(size=f),
        std=rng.uniform(0.1, 2, f),
        fill=rng.normal(size=f),
        categories=[rng.permutation(3 * size)[:size] for size in sizes],
        dtype=dtype,
    )
    numbers = rng.normal(size=(n, f)).astype(dtype)
    numbers[::2] = np.nan
    numbers[1::3] = np.inf
    codes = rng.integers(-1, 9, (n, len(sizes))).astype(code)
    want = np.full((n, made.width), np.nan, np.float32)
    reference.run(made, numbers, codes, want)
    got = tabular(made, numbers, codes, out=np.full_like(want, np.nan))
    np.testing.assert_allclose(got, want, rtol=2.0**-22)  # Two roundings of 2^-24 each, and the reference's one.


def test_without_a_fill_what_is_missing_stays_so():
    assert np.isnan(tabular(columns(mean=[1]), np.array([[np.nan]], np.float32))).all()
