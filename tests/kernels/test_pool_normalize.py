"""pool_normalize and l2_normalize: every version against the reference.

Tolerances: a mean adds up to 40 float32 numbers of about 1 one after the other, each time rounding by 2^-24 of the sum:
40 * 6e-8 = 2.4e-6 of it. A length adds up to 1,000 / 16 squares a lane, and the root halves that: 2e-6. Divided, a unit
vector's numbers are below 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.pool_normalize import l2_normalize, pool_normalize, reference
from tests.kernels.conftest import Place

EPS = np.float32(1e-12)


def texts(rng: np.random.Generator, n: int, t: int, d: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Numbers about 0.5 to 1.5 apart from 0, so that sums do not cancel and the tolerance holds."""
    tokens = (rng.uniform(0.5, 1.5, (n, t, d)) * rng.choice([-1, 1], d)).astype(dtype)
    return tokens, (rng.uniform(size=(n, t)) < 0.6).astype(np.int64)


def expected(tokens: np.ndarray, mask: np.ndarray, normalize: bool = True) -> np.ndarray:
    out = np.full((tokens.shape[0], tokens.shape[2]), np.nan, np.float32)
    reference.pool(tokens, mask, EPS, normalize, out)
    return out


def run(place: Place, tokens: np.ndarray, mask: np.ndarray, **options: Any) -> np.ndarray:
    out = place.put(np.full((tokens.shape[0], tokens.shape[2]), np.nan, np.float32))
    assert pool_normalize(place.put(tokens), place.put(mask), out=out, **options) is out
    return place.get(out)


def run_l2(place: Place, x: np.ndarray, **options: Any) -> np.ndarray:
    out = place.put(np.full(x.shape, np.nan, np.float32))
    assert l2_normalize(place.put(x), out=out, **options) is out
    return place.get(out)


@pytest.mark.parametrize(("n", "t", "d"), [(1, 1, 1), (2, 3, 63), (3, 5, 64), (2, 40, 65), (5, 17, 200)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equals_the_reference(place: Place, n: int, t: int, d: int, normalize: bool, dtype: Any) -> None:
    tokens, mask = texts(np.random.default_rng(d), n, t, d, dtype)
    got = run(place, tokens, mask, normalize=normalize)
    np.testing.assert_allclose(got, expected(tokens, mask, normalize), rtol=6e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_])
def test_every_mask(place: Place, dtype: Any) -> None:
    tokens, mask = texts(np.random.default_rng(1), 3, 9, 33)
    given_mask = mask.astype(dtype) if dtype is np.bool_ else (mask * np.array([[1], [-7], [2**31 - 1]])).astype(dtype)
    np.testing.assert_allclose(run(place, tokens, given_mask), expected(tokens, mask), rtol=6e-6)


def test_no_token_counts_gives_zeros(place: Place) -> None:
    tokens, mask = texts(np.random.default_rng(2), 3, 6, 70)
    mask[1] = 0
    for normalize in (True, False):
        got = run(place, tokens, mask, normalize=normalize)
        assert (got[1] == 0).all()
        assert (got[[0, 2]] != 0).all()


def test_padding_is_not_read(place: Place) -> None:
    tokens, mask = texts(np.random.default_rng(3), 2, 8, 65)
    want = expected(tokens, mask)
    tokens[mask == 0] = np.nan
    np.testing.assert_allclose(run(place, tokens, mask), want, rtol=6e-6)


def test_nan_in_a_token_that_counts_is_told(place: Place) -> None:
    tokens, mask = texts(np.random.default_rng(4), 3, 4, 66)
    mask[:] = 1
    tokens[1, 2, 7] = np.nan
    mean = run(place, tokens, mask, normalize=False)
    assert np.isnan(mean[1]).tolist() == [j == 7 for j in range(66)]
    unit = run(place, tokens, mask)
    assert np.isnan(unit[1]).all()
    assert not np.isnan(unit[[0, 2]]).any()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_in(place: Place, shape: tuple[int, int, int]) -> None:
    got = run(place, np.empty(shape, np.float32), np.ones(shape[:2], np.int64))
    assert got.shape == (shape[0], shape[2])
    assert (got == 0).all()


@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 31), (2, 128), (4, 1000)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_l2_equals_the_reference(place: Place, n: int, d: int, dtype: Any) -> None:
    x = np.random.default_rng(d).normal(size=(n, d)).astype(dtype)
    want = np.full(x.shape, np.nan, np.float32)
    reference.l2(x, EPS, want)
    got = run_l2(place, x)
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=1e-30)
    np.testing.assert_allclose(np.square(got, dtype=np.float64).sum(axis=1), 1, rtol=8e-6)


def test_l2_in_place(place: Place) -> None:
    x = np.random.default_rng(5).normal(size=(3, 300)).astype(np.float32)
    want = run_l2(place, x)
    here = place.put(x.copy())
    assert l2_normalize(here, out=here) is here
    np.testing.assert_array_equal(place.get(here), want)


def test_l2_of_what_has_no_direction(place: Place) -> None:
    rows = np.array([[0, -0.0, 0], [np.nan, 1, 2], [np.inf, 1, -1], [3e20, 1, 0], [1e-13, 0, 0]], np.float32)
    got = run_l2(place, rows)
    assert got[0].tolist() == [0, 0, 0]
    assert np.isnan(got[1]).all()
    assert np.isnan(got[2, 0])
    assert got[2, 1:].tolist() == [0, 0]
    assert got[3].tolist() == [0, 0, 0]  # Squares beyond float32.
    assert got[4].tolist() == pytest.approx([0.1, 0, 0])
    assert run_l2(place, rows[4:], eps=1e-13)[0].tolist() == pytest.approx([1, 0, 0])


@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_random_shapes_on_the_cpu(n: int, t: int, d: int, seed: int) -> None:
    tokens, mask = texts(np.random.default_rng(seed), n, t, d)
    np.testing.assert_allclose(pool_normalize(tokens, mask), expected(tokens, mask), rtol=6e-6)


TOKENS, MASK = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"tokens": TOKENS[0]}, ValueError, r"tokens must have shape \[n, t, d\], not \[3, 4\]"),
        ({"tokens": TOKENS.astype(np.float64)}, TypeError, "tokens must be float32 or float16, not float64"),
        ({"tokens": np.zeros((4, 3, 2), np.float32).T}, ValueError, "tokens is not C-contiguous"),
        ({"mask": MASK[:, :2]}, ValueError, r"mask must have shape \[2, 3\], not \[2, 2\]"),
        ({"mask": MASK.astype(np.float32)}, TypeError, "mask must be int64 or int32 or bool, not float32"),
        ({"eps": 0}, ValueError, "eps must be a float32 above 0, not 0"),
        ({"eps": 1e-60}, ValueError, "eps must be a float32 above 0, not 1e-60"),
        ({"eps": float("nan")}, ValueError, "eps must be a float32 above 0, not nan"),
        ({"out": np.zeros((2, 3), np.float32)}, ValueError, r"out must have shape \[2, 4\], not \[2, 3\]"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"tokens": TOKENS, "mask": MASK, **arguments}
    with pytest.raises(error, match=told):
        pool_normalize(options.pop("tokens"), options.pop("mask"), **options)


def test_l2_refuses() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[n, d\], not \[3\]"):
        l2_normalize(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="eps"):
        l2_normalize(np.zeros((1, 3), np.float32), eps=-1)
