"""tabular: the versions of the host against the reference, and what a row comes to against plain arithmetic.

float32 numbers: two operations, each rounding by 2^-24 of its result, and the reference rounds once: 2^-22 is ample.
The GPU's version runs in the simulator: tests/kernels/simulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.tabular import columns, reference, tabular
from tests.kernels.conftest import Place

HERE = pytest.mark.parametrize(
    "place", ["reference", "cpu", pytest.param("device", marks=pytest.mark.gpu)], indirect=True
)
NAN, INF = float("nan"), float("inf")


def table(
    rng: np.random.Generator, n: int, f: int, sizes: list[int], dtype: Any = "float32", code: Any = np.int64
) -> Any:
    """Columns and rows: a fifth of the numbers missing, a fifth of the codes unknown."""
    made = columns(
        mean=rng.normal(0, 3, f),
        std=rng.uniform(0.1, 4, f),
        fill=rng.normal(0, 3, f),
        categories=[rng.permutation(size * 3)[:size] - 2 for size in sizes],
        dtype=dtype,
    )
    numbers = np.where(rng.uniform(size=(n, f)) < 0.2, NAN, rng.normal(0, 3, (n, f))).astype(dtype)
    codes = np.array([rng.integers(-2, size * 3 + 1, n) for size in sizes], code).reshape(len(sizes), n).T.copy()
    return made, numbers, codes


def expected(made: Any, numbers: np.ndarray, codes: np.ndarray) -> np.ndarray:
    out = np.full((len(numbers), made.width), NAN, np.float32)
    reference.run(made, numbers, codes, out)
    return out


def run(place: Place, made: Any, numbers: np.ndarray, codes: np.ndarray) -> np.ndarray:
    out = place.put(np.full((len(numbers), made.width), NAN, np.float32))
    there = made.on_device() if place.name == "device" else made
    assert tabular(there, place.put(numbers), place.put(codes), out=out) is out
    return place.get(out)


@HERE
@pytest.mark.parametrize(
    ("n", "f", "sizes"), [(1, 1, [1]), (3, 5, [2, 33, 1]), (7, 20, []), (5, 0, [3, 4]), (2, 17, [0, 5])]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("code", [np.int32, np.int64])
def test_equals_the_reference(place: Place, n: int, f: int, sizes: list[int], dtype: str, code: Any) -> None:
    made, numbers, codes = table(np.random.default_rng(n), n, f, sizes, dtype, code)
    np.testing.assert_allclose(run(place, made, numbers, codes), expected(made, numbers, codes), rtol=2.0**-22)


@HERE
def test_one_row_by_hand(place: Place) -> None:
    made = columns(mean=[10, 0, 1], std=[2, 0, 4], fill=[12, 7, 0], categories=[[5, -1, 9], [2**40]])
    numbers = np.array([[14, NAN, INF], [NAN, 3, -INF]], np.float32)
    codes = np.array([[9, 2**40], [4, 2**40 + 1]], np.int64)
    assert run(place, made, numbers, codes).tolist() == [[2, 7, INF, 0, 0, 1, 1], [1, 3, -INF, 0, 0, 0, 0]]


@HERE
def test_without_a_fill_what_is_missing_stays_so(place: Place) -> None:
    made = columns(mean=[1, 2])
    got = run(place, made, np.array([[NAN, 3]], np.float32), np.empty((1, 0), np.int64))
    assert np.isnan(got[0, 0])
    assert got[0, 1] == 1


@HERE
def test_float64_keeps_what_float32_would_lose(place: Place) -> None:
    made = columns(mean=[1.7e9], std=[10], dtype="float64")
    got = run(place, made, np.array([[1.7e9 + 3]], np.float64), np.empty((1, 0), np.int64))
    assert got[0, 0] == pytest.approx(0.3, rel=1e-6)


@HERE
@pytest.mark.parametrize(("n", "f", "sizes"), [(0, 2, [3]), (3, 0, [])])
def test_nothing_in_or_out(place: Place, n: int, f: int, sizes: list[int]) -> None:
    made, numbers, codes = table(np.random.default_rng(0), n, f, sizes)
    assert run(place, made, numbers, codes).shape == (n, f + sum(sizes))


def test_codes_may_be_left_out_where_there_are_no_categories() -> None:
    assert tabular(columns(mean=[1, 1]), np.ones((1, 2), np.float32)).tolist() == [[0, 0]]


@given(st.data())
@settings(max_examples=60)
def test_random_tables_on_the_cpu(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=4))
    given_table = table(rng, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 40)), sizes)
    np.testing.assert_allclose(tabular(*given_table), expected(*given_table), rtol=2.0**-22)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"mean": [1, 2], "std": [1]}, ValueError, "mean has 2 columns, std has 1"),
        ({"mean": [1], "fill": [1, 2]}, ValueError, "mean has 1 columns, fill has 2"),
        ({"mean": [NAN]}, ValueError, "must be finite"),
        ({"mean": [1], "std": [-1]}, ValueError, "std not negative"),
        ({"mean": [[1]]}, ValueError, r"mean must have shape \[f\], not \[1, 1\]"),
        ({"mean": [1e300]}, ValueError, "mean, 1/std and fill must be within float32"),
        ({"mean": [0], "std": [1e-300]}, ValueError, "mean, 1/std and fill must be within float32"),
        ({"categories": [[1, 2, 1]]}, ValueError, r"categories\[0\] must be a list of distinct values"),
        ({"categories": [[1], [[2]]]}, ValueError, r"categories\[1\] must be a list of distinct values"),
        (
            {"categories": [["red"]]},
            TypeError,
            r"categories\[0\] has a value that is not a 64-bit integer: map strings",
        ),
        ({"categories": [[0.5]]}, TypeError, r"categories\[0\] has a value that is not a 64-bit integer"),
        ({"categories": [[2**63]]}, TypeError, r"categories\[0\] has a value that is not a 64-bit integer"),
        ({"dtype": "float16"}, TypeError, "dtype must be float32 or float64, not float16"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_columns_refuse(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        columns(**arguments)


MADE = columns(mean=[0, 0], categories=[[1]])
NUMBERS, CODES = np.zeros((3, 2), np.float32), np.zeros((3, 1), np.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"numbers": NUMBERS[:, :1].copy()}, ValueError, r"numbers must have shape \[n, 2\], not \[3, 1\]"),
        ({"numbers": NUMBERS.astype(np.float64)}, TypeError, "numbers must be float32, not float64"),
        ({"numbers": NUMBERS[:, ::-1]}, ValueError, "numbers is not C-contiguous"),
        ({"codes": None}, ValueError, r"codes must have shape \[3, 1\], not \[3, 0\]"),
        ({"codes": CODES[:2]}, ValueError, r"codes must have shape \[3, 1\], not \[2, 1\]"),
        ({"codes": CODES.astype(np.int16)}, TypeError, "codes must be int64 or int32, not int16"),
        ({"out": np.zeros((3, 2), np.float32)}, ValueError, r"out must have shape \[3, 3\], not \[3, 2\]"),
        ({"stream": object()}, TypeError, "stream= is for arrays on a GPU"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"numbers": NUMBERS, "codes": CODES, **arguments}
    with pytest.raises(error, match=told):
        tabular(MADE, options.pop("numbers"), options.pop("codes"), **options)
