"""pad_tokens: all versions that run on the host against plain lists; equal, because nothing is computed.

The GPU's version runs in the simulator: tests/kernels/simulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.pad_tokens import pad_tokens
from tests.kernels.conftest import Place
from tests.long_form import by_form

pytestmark = pytest.mark.filterwarnings("error")
HERE = pytest.mark.parametrize(
    "place", ["reference", "cpu", pytest.param("device", marks=pytest.mark.gpu)], indirect=True
)


def ragged(rng: np.random.Generator, lengths: list[int], dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """With tokens before the first sequence and behind the last, which nobody may read."""
    bounds = np.iinfo(dtype)
    flat = rng.integers(bounds.min, bounds.max, sum(lengths) + 5, dtype, endpoint=True)
    return flat, np.cumsum([2, *lengths], dtype=np.int64)


def expected(flat: np.ndarray, offsets: np.ndarray, width: int, pad_id: int, left: bool) -> tuple[list, list]:
    ids, mask = [], []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        tokens = flat[begin:end].tolist()[:width]
        rest = width - len(tokens)
        ids.append([pad_id] * rest + tokens if left else tokens + [pad_id] * rest)
        mask.append([0] * rest + [1] * len(tokens) if left else [1] * len(tokens) + [0] * rest)
    return ids, mask


def run(place: Place, flat: np.ndarray, offsets: np.ndarray, width: int, dtypes: Any = None, **options: Any) -> Any:
    dtypes = dtypes or (np.int64, np.int64)
    out = tuple(place.put(np.full((offsets.size - 1, width), -77, dtype)) for dtype in dtypes)
    got = pad_tokens(place.put(flat), place.put(offsets), out=out, **options)
    assert got[0] is out[0]
    assert got[1] is out[1]
    return place.get(got[0]).tolist(), place.get(got[1]).tolist()


@HERE
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 7], [0, 0], [40, 1, 33, 12, 0], [129]])
@pytest.mark.parametrize("spare", [0, 1, 9])
def test_equals_lists(place: Place, side: Any, lengths: list[int], spare: int) -> None:
    flat, offsets = ragged(np.random.default_rng(spare), lengths)
    width = max(lengths) + spare
    got = run(place, flat, offsets, width, pad_id=-3, side=side)
    assert got == expected(flat, offsets, width, -3, side == "left")


@HERE
@pytest.mark.parametrize(
    ("tokens", "ids"),
    [(np.int32, np.int32), (np.int32, np.int64), (np.int64, np.int64)],
    ids=["32-32", "32-64", "64-64"],
)
@pytest.mark.parametrize("mask", [np.int32, np.int64])
def test_dtypes_keep_every_id(place: Place, tokens: Any, ids: Any, mask: Any) -> None:
    flat, offsets = ragged(np.random.default_rng(1), [4, 9, 0], tokens)
    flat[2:4] = np.iinfo(tokens).min, np.iinfo(tokens).max
    pad = np.iinfo(ids).min
    assert run(place, flat, offsets, 9, (ids, mask), pad_id=pad) == expected(flat, offsets, 9, pad, False)


@HERE
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("width", [0, 1, 5])
def test_truncation_keeps_the_first_tokens(place: Place, side: Any, width: int) -> None:
    flat, offsets = ragged(np.random.default_rng(2), [3, 5, 6, 0, 20])
    got = run(place, flat, offsets, width, side=side, truncate=True)
    assert got == expected(flat, offsets, width, 0, side == "left")


@HERE
def test_no_sequences(place: Place) -> None:
    assert run(place, np.empty(0, np.int32), np.zeros(1, np.int64), 3) == ([], [])


def test_the_width_is_the_longest_or_said() -> None:
    flat, offsets = ragged(np.random.default_rng(3), [2, 6, 1])
    ids, mask = pad_tokens(flat, offsets)
    assert ids.shape == mask.shape == (3, 6)
    assert ids.dtype == mask.dtype == np.int64
    assert pad_tokens(flat, offsets, width=8)[0].shape == (3, 8)
    assert pad_tokens(flat, np.zeros(1, np.int64))[0].shape == (0, 0)


@given(st.lists(st.integers(0, 30), max_size=9), st.integers(0, 40), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=by_form(50, 100))
def test_random_lengths_on_the_cpu(lengths: list[int], width: int, left: bool, seed: int) -> None:
    flat, offsets = ragged(np.random.default_rng(seed), lengths)
    ids, mask = pad_tokens(flat, offsets, width=width, pad_id=9, side="left" if left else "right", truncate=True)
    assert (ids.tolist(), mask.tolist()) == expected(flat, offsets, width, 9, left)


MOST = 2**63 - 1


@pytest.mark.parametrize("place", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize(
    ("offsets", "told"),
    [
        ([0, 4, 3, 10], r"sequence 1 is flat\[4:3\], and flat has 10 tokens"),
        ([-1, 4], r"sequence 0 is flat\[-1:4\]"),
        ([0, 4, 11], r"sequence 1 is flat\[4:11\]"),
        ([0, MOST], r"sequence 0 is flat\[0:9223372036854775807\]"),
        ([0, MOST, -MOST - 1], r"sequence 0"),
        ([-MOST - 1, MOST], r"sequence 0"),
        ([11], r"sequence 0 is flat\[11:11\]"),
        ([-1], r"sequence 0 is flat\[-1:-1\]"),
        ([], "offsets is empty"),
    ],
)
def test_offsets_that_are_wrong_are_named(place: Place, offsets: list[int], told: str) -> None:
    out = np.full((max(len(offsets) - 1, 0), 20), 5, np.int64), np.full((max(len(offsets) - 1, 0), 20), 5, np.int64)
    with pytest.raises(ValueError, match=told):
        pad_tokens(np.zeros(10, np.int32), np.array(offsets, np.int64), out=out)
    assert all((array == 5).all() for array in out)


FLAT, OFFSETS = np.arange(6, dtype=np.int32), np.array([0, 2, 6], np.int64)


def outputs(ids: Any = np.int64, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((2, width), ids), np.zeros((2, width), np.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"width": 3}, ValueError, "a sequence of 4 tokens in 3 columns; widen, or truncate=True"),
        ({"out": outputs(width=3)}, ValueError, "a sequence of 4 tokens in 3 columns"),
        ({"out": outputs(), "width": 5}, ValueError, r"out\[0\] must have shape \[2, 5\], not \[2, 4\]"),
        ({"width": -1}, ValueError, "width must be 0 or more, not -1"),
        ({"side": "both"}, ValueError, "side must be right or left, not 'both'"),
        ({"pad_id": 2**31, "out": outputs(np.int32)}, ValueError, "pad_id 2147483648 is outside of int32"),
        ({"pad_id": 2**63}, ValueError, "is outside of int64"),
        ({"flat": FLAT.astype(np.int64), "out": outputs(np.int32)}, TypeError, r"out\[0\] is int32, which cannot hold"),
        ({"flat": FLAT.astype(np.uint16)}, TypeError, "flat must be int32 or int64, not uint16"),
        ({"offsets": OFFSETS.astype(np.int32)}, TypeError, "offsets must be int64, not int32"),
        ({"flat": FLAT[::2]}, ValueError, "flat is not C-contiguous"),
        ({"flat": FLAT.reshape(2, 3)}, ValueError, r"flat must have shape \[tokens\], not \[2, 3\]"),
        ({"out": (np.zeros(4, np.int64), np.zeros(4, np.int64))}, ValueError, r"out\[0\] must have shape \[n, width\]"),
        ({"out": outputs(np.float32)}, TypeError, r"out\[0\] must be int32 or int64, not float32"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"flat": FLAT, "offsets": OFFSETS, **arguments}
    with pytest.raises(error, match=told):
        pad_tokens(options.pop("flat"), options.pop("offsets"), **options)
