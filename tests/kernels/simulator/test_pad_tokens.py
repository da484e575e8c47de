"""pad_tokens' GPU version: the reference's batches, and offsets that nobody has looked at."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.pad_tokens import pad_tokens, reference

MOST = 2**63 - 1


def outputs(n: int, width: int, ids: object = np.int64, mask: object = np.int64) -> tuple[np.ndarray, np.ndarray]:
    return np.full((n, width), -77, ids), np.full((n, width), -77, mask)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("width", [1, 7, 131])
@pytest.mark.parametrize(("tokens", "ids"), [(np.int32, np.int32), (np.int32, np.int64), (np.int64, np.int64)])
def test_equals_the_reference(side, width, tokens, ids):
    rng = np.random.default_rng(width)
    offsets = np.cumsum([2, 3, 0, 7, 1, 130], dtype=np.int64)
    flat = rng.integers(-9, 2**31 - 1, offsets[-1] + 4).astype(tokens)
    for mask in (np.int32, np.int64):
        got = pad_tokens(flat, offsets, out=outputs(5, width, ids, mask), pad_id=-5, side=side, truncate=True)
        want = outputs(5, width, ids, mask)
        reference.run(flat, offsets, -5, side == "left", *want)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize(
    "offsets", [[0, 99], [-5, 3], [8, 2], [MOST, -MOST - 1], [-MOST - 1, MOST], [0, MOST], [-1, -9], [50, 60]]
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_only_what_is_in_flat_is_read(offsets, side):
    flat = np.arange(1, 11, dtype=np.int32)
    ids, mask = pad_tokens(flat, np.array(offsets, np.int64), out=outputs(1, 12), side=side)
    begin = min(max(offsets[0], 0), 10)
    tokens = flat[begin : min(max(offsets[1], begin), 10)].tolist()
    rest = [0] * (12 - len(tokens))
    assert ids[0].tolist() == (tokens + rest if side == "right" else rest + tokens)
    assert mask.sum() == len(tokens)


def test_empty_batches_launch_nothing():
    assert pad_tokens(np.zeros(0, np.int32), np.zeros(1, np.int64), width=4)[0].shape == (0, 4)
    assert pad_tokens(np.zeros(0, np.int32), np.zeros(3, np.int64), width=0)[0].shape == (2, 0)


def test_the_width_must_be_said():
    with pytest.raises(ValueError, match="say width= or out="):
        pad_tokens(np.zeros(1, np.int32), np.zeros(2, np.int64))
