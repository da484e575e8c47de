"""softmax_topk: every version against the reference, at odd sizes, with ties, NaN and infinities.

Indices are equal: logits are compared, not probabilities. Probabilities: 1e-5 of the value. An exponential is one unit
in the last place off, and a lane adds up to m / 8 of them, each time rounding by 2^-24: 140 * 6e-8 for 1,111 columns.
2^-126 more, below which the CPU's exponential is 0.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.softmax_topk import cpu, reference, softmax_topk
from tests.kernels.conftest import Place
from tests.long_form import by_form

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    1.0,
    -1.0,
    60.0,
    -90.0,
    1e-40,
    -3e38,
    float("-inf"),
    float("inf"),
    float("nan"),
    -float("nan"),
]


def expected(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (logits.shape[0], min(k, logits.shape[1]))
    out = np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int64)
    if out[0].size:
        reference.run(logits, *out)
    return out


def check(logits: np.ndarray, k: int, got: tuple[Any, Any]) -> None:
    probabilities, indices = expected(logits, k)
    np.testing.assert_array_equal(got[1], indices)
    np.testing.assert_allclose(got[0], probabilities, rtol=1e-5, atol=2.0**-126)


def run(place: Place, logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (logits.shape[0], min(k, logits.shape[1]))
    out = place.put(np.full(shape, np.nan, np.float32)), place.put(np.full(shape, -9, np.int64))
    got = softmax_topk(place.put(logits), k, out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    return place.get(got[0]), place.get(got[1])


@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (3, 7, 7), (5, 8, 3), (2, 33, 40), (3, 257, 5), (2, 1111, 50)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equals_the_reference(place: Place, n: int, m: int, k: int, dtype: Any) -> None:
    logits = np.random.default_rng(m).normal(0, 4, (n, m)).astype(dtype)
    check(logits, k, run(place, logits, k))


def test_equal_logits_come_by_index(place: Place) -> None:
    logits = np.random.default_rng(2).integers(-2, 3, (4, 301)).astype(np.float32)
    check(logits, 101, run(place, logits, 101))
    check(np.zeros((2, 70), np.float32), 70, run(place, np.zeros((2, 70), np.float32), 70))


def test_both_zeros_are_one(place: Place) -> None:
    assert run(place, np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32), 4)[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_a_row_without_a_softmax_is_nan_and_still_in_order(place: Place, bad: float) -> None:
    logits = np.random.default_rng(3).normal(size=(3, 40)).astype(np.float32)
    logits[1, [5, 39]] = bad
    got = run(place, logits, 40)
    check(logits, 40, got)
    assert np.isnan(got[0][1]).all()
    assert np.isfinite(got[0][[0, 2]]).all()


def test_minus_infinity_is_probability_zero_and_nothing_else_is_nan(place: Place) -> None:
    masked = np.array([[-np.inf, 1, -np.inf, 1]], np.float32)
    probabilities, indices = run(place, masked, 4)
    assert probabilities.tolist() == [[0.5, 0.5, 0, 0]]
    assert indices.tolist() == [[1, 3, 0, 2]]
    nothing = np.full((1, 3), -np.inf, np.float32)
    probabilities, indices = run(place, nothing, 2)
    assert np.isnan(probabilities).all()
    assert indices.tolist() == [[0, 1]]


def test_large_logits_do_not_overflow(place: Place) -> None:
    logits = np.array([[3e38, 2.9e38, -3e38], [-3e38, -3e38, -3.4e38], [88, 89, 90]], np.float32)
    check(logits, 3, run(place, logits, 3))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(place: Place, shape: tuple[int, int]) -> None:
    probabilities, indices = run(place, np.empty(shape, np.float32), 3)
    assert probabilities.shape == indices.shape == (shape[0], min(3, shape[1]))


@given(st.data())
@settings(max_examples=by_form(80, 200))
def test_special_values_on_the_cpu(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    flat = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=n * m, max_size=n * m))
    logits = np.array(flat, np.float32).reshape(n, m)
    k = data.draw(st.integers(1, 45))
    check(logits, k, softmax_topk(logits, k))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_random_rows_on_the_cpu(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 10, (rng.integers(1, 12), rng.integers(1, 500))).astype(np.float32)
    k = int(rng.integers(1, logits.shape[1] + 1))
    check(logits, k, softmax_topk(logits, k))


def test_the_exponential_is_within_one_unit_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-87.33, 0, 100_001), -np.logspace(-30, 0, 1001)]).astype(np.float32)
    true = np.exp(x.astype(np.float64))
    got = np.array([cpu.exp(value) for value in x])
    assert (np.abs(got - true) <= np.spacing(true.astype(np.float32))).all()
    assert [cpu.exp(np.float32(value)) for value in (-87.4, -1000, -np.inf)] == [0, 0, 0]


@pytest.mark.parametrize("k", [1, 5, 32, 33, 500])
@pytest.mark.parametrize("size", [33, 1_000, 5_003])
def test_rows_in_any_order(size: int, k: int) -> None:
    """Many logits reach the bound, in orders that are bad for a heap or a quicksort."""
    ascending = np.arange(size, dtype=np.float32)
    few = np.random.default_rng(0).integers(0, 4, size).astype(np.float32)
    pipes = np.minimum(ascending, ascending[::-1])
    rows = [ascending, ascending[::-1], np.zeros(size, np.float32), few, pipes, -pipes]
    logits = np.stack([*rows, *[np.append(row[1:], np.float32("nan")) for row in rows]])
    check(logits, k, softmax_topk(logits, k))


def test_long_rows() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (2, 50_257)).astype(np.float32)
    probabilities, indices = softmax_topk(logits, 50)
    want = expected(logits, 50)
    np.testing.assert_array_equal(indices, want[1])
    np.testing.assert_allclose(probabilities, want[0], rtol=4e-4)  # Up to 6,282 terms a lane.


ROWS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"k": 0}, ValueError, "k must be 1 or more, not 0"),
        ({"k": 1.5}, TypeError, "float"),
        ({"logits": ROWS[0]}, ValueError, r"logits must have shape \[n, m\], not \[3\]"),
        ({"logits": ROWS.astype(np.float64)}, TypeError, "logits must be float32 or float16, not float64"),
        ({"logits": ROWS.T}, ValueError, "logits is not C-contiguous"),
        ({"logits": [[1.0]]}, TypeError, "logits must be a NumPy or CuPy array, not builtins.list"),
        (
            {"out": (np.zeros((2, 2), np.float32), np.zeros((2, 1), np.int64))},
            ValueError,
            r"out\[0\] must have shape \[2, 1\]",
        ),
        ({"out": (np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int32))}, TypeError, r"out\[1\] must be int64"),
        ({"stream": object()}, TypeError, "stream= is for arrays on a GPU"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"logits": ROWS, "k": 1, **arguments}
    with pytest.raises(error, match=told):
        softmax_topk(options.pop("logits"), options.pop("k"), **options)


def test_a_read_only_output_is_refused() -> None:
    out = np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int64)
    out[0].flags.writeable = False
    with pytest.raises(ValueError, match=r"out\[0\] is read-only"):
        softmax_topk(ROWS, 1, out=out)


def test_warm_up_compiles_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so the first request compiles nothing."""
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)
    importlib.import_module("kernels.softmax_topk").warm_up()
    before = len(cpu.rows.signatures)
    softmax_topk(ROWS, 2)
    softmax_topk(ROWS.astype(np.float16), 2)
    assert len(cpu.rows.signatures) == before
