"""quantize_rows: bit for bit the reference's numbers and scales; and what comes back is near what went in.

The GPU's version runs in the simulator: tests/kernels/simulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantize_rows import dequantize_rows, quantize_rows, reference
from tests.kernels.conftest import Place
from tests.long_form import by_form

HERE = pytest.mark.parametrize(
    "place", ["reference", "cpu", pytest.param("device", marks=pytest.mark.gpu)], indirect=True
)


def expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.full(x.shape, -99, np.int8), np.full(x.shape[0], 99, np.float32)
    reference.quantize(x, *out)
    return out


def check(x: np.ndarray, got: tuple[np.ndarray, np.ndarray]) -> None:
    numbers, scales = expected(x)
    np.testing.assert_array_equal(got[0], numbers)
    np.testing.assert_array_equal(got[1], scales)  # NaN counts as equal.


def run(place: Place, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = place.put(np.full(x.shape, -99, np.int8)), place.put(np.full(x.shape[0], 99, np.float32))
    got = quantize_rows(place.put(x), out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    return place.get(got[0]), place.get(got[1])


@HERE
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 16), (4, 33), (3, 768), (0, 4), (3, 0)])
def test_equals_the_reference(place: Place, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    check_rows = (rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, (shape[0], 1))).astype(np.float32)
    check(check_rows, run(place, check_rows))


@HERE
def test_halves_go_to_even_numbers(place: Place) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127]], np.float32)
    numbers, scales = run(place, x)
    assert numbers.tolist() == [[127, 0, 2, 2, 0, -2, 126, -127]]
    assert scales.tolist() == [1]


@HERE
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_row_that_cannot_be_scaled_comes_back_as_nan(place: Place, bad: float) -> None:
    x = np.ones((3, 40), np.float32)
    x[1, 39] = bad
    numbers, scales = run(place, x)
    assert np.isnan(scales).tolist() == [False, True, False]
    assert (numbers[1] == 0).all()
    back = place.get(dequantize_rows(place.put(numbers), place.put(scales)))
    assert np.isnan(back[1]).all()
    np.testing.assert_array_equal(back[[0, 2]], x[[0, 2]])


@HERE
def test_zeros_and_what_is_next_to_them(place: Place) -> None:
    least = reference.MIN_ABSMAX
    x = np.array([[0, -0.0], [np.nextafter(least, np.float32(0)), 0], [least, -least], [1e-45, 0]], np.float32)
    numbers, scales = run(place, x)
    assert numbers.tolist() == [[0, 0], [0, 0], [127, -127], [0, 0]]
    assert scales.tolist() == [0, 0, np.finfo(np.float32).tiny, 0]


@HERE
def test_the_largest_float32(place: Place) -> None:
    most = np.finfo(np.float32).max
    numbers, _ = run(place, np.array([[most, -most, 1]], np.float32))
    assert numbers.tolist() == [[127, -127, 0]]


@HERE
@pytest.mark.parametrize("shape", [(2, 5), (3, 129), (0, 3), (2, 0)])
def test_back_again(place: Place, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    numbers = rng.integers(-128, 128, shape).astype(np.int8)
    scales = rng.uniform(0, 3, shape[0]).astype(np.float32)
    out = place.put(np.full(shape, np.nan, np.float32))
    assert dequantize_rows(place.put(numbers), place.put(scales), out=out) is out
    np.testing.assert_array_equal(place.get(out), numbers.astype(np.float32) * scales[:, None])


@given(st.integers(1, 3), st.integers(1, 50), st.integers(0, 2**32 - 1))
@settings(max_examples=by_form(60, 200))
def test_any_bits_on_the_cpu(n: int, m: int, seed: int) -> None:
    """Half of the rows hold any float32 there is, the others finite ones of one size."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**32, (n, m), np.uint32).view(np.float32)
    if seed % 2:
        x = (rng.uniform(-1, 1, (n, m)) * 2.0 ** rng.integers(-149, 128)).astype(np.float32)
    numbers, scales = quantize_rows(x)
    check(x, (numbers, scales))
    back = dequantize_rows(numbers, scales)
    finite = np.isfinite(x).all(axis=1)
    assert np.isnan(back[~finite]).all()
    # Half a step, and the roundings of the quotient and the product: 127 * 2^-23 of a step each.
    off = np.abs(back[finite].astype(np.float64) - x[finite])
    assert (off <= np.maximum(scales[finite, None] * (0.5 + 4e-5), reference.MIN_ABSMAX)).all()


ROWS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"x": ROWS[0]}, ValueError, r"x must have shape \[n, m\], not \[3\]"),
        ({"x": ROWS.astype(np.float16)}, TypeError, "x must be float32, not float16"),
        ({"x": ROWS.T}, ValueError, "x is not C-contiguous"),
        (
            {"out": (np.zeros((2, 3), np.uint8), np.zeros(2, np.float32))},
            TypeError,
            r"out\[0\] must be int8, not uint8",
        ),
        (
            {"out": (np.zeros((2, 3), np.int8), np.zeros(3, np.float32))},
            ValueError,
            r"out\[1\] must have shape \[2\], not \[3\]",
        ),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"x": ROWS, **arguments}
    with pytest.raises(error, match=told):
        quantize_rows(options.pop("x"), **options)


def test_dequantize_refuses() -> None:
    with pytest.raises(TypeError, match="dequantize_rows: numbers must be int8, not float32"):
        dequantize_rows(ROWS, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"dequantize_rows: scales must have shape \[2\], not \[3\]"):
        dequantize_rows(ROWS.astype(np.int8), np.zeros(3, np.float32))
