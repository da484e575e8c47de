"""Values whose rows differ in shape, and when they can be tensors."""

from __future__ import annotations

import numpy as np
import pytest

from services.infer.requests import ragged
from services.infer.requests.signature import TensorSpec
from shoal.errors import InvalidArgument
from shoal.oip.datatypes import BY_NAME

SPEC = TensorSpec("image", BY_NAME["UINT8"], (-1, -1, -1, 3), is_ragged=True)


def row(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), height, np.uint8)


def test_rows_of_a_tensor_are_views_and_arrays():
    tensor = np.arange(6).reshape(3, 2)
    assert all(np.shares_memory(each, tensor) for each in ragged.rows(tensor))
    assert [each.shape for each in ragged.rows(np.arange(3))] == [()] * 3
    assert all(isinstance(each, np.ndarray) for each in ragged.rows(np.arange(3)))


def test_rows_are_bounded_because_they_may_have_no_bytes():
    for tensor in np.empty((1 << 30, 0, 1, 3), np.uint8), np.empty(100_001, np.uint8):
        with pytest.raises(InvalidArgument, match=r"\] is given row by row: expected at most 100000 rows"):
            ragged.joined([tensor])
    assert len(ragged.rows(np.empty((100_000, 0), np.uint8))) == 100_000


def test_joined_rows_can_be_split_again():
    values = [np.zeros((2, 4)), [np.zeros(3), np.zeros(5)], np.zeros((0, 9)), []]
    joined = ragged.joined(values)
    assert [each.shape for each in joined] == [(4,), (4,), (3,), (5,)]
    assert [len(part) for part in ragged.parted(joined, [2, 2, 0, 0])] == [2, 2, 0, 0]
    with pytest.raises(ValueError, match="4 rows are not 3"):
        ragged.parted(joined, [2, 1])


def test_even_rows_are_a_tensor():
    assert ragged.dense([row(2, 3), row(2, 3)], SPEC, "output").shape == (2, 2, 3, 3)
    assert ragged.dense([row(2, 3)], SPEC, "output").shape == (1, 2, 3, 3)
    nothing = ragged.dense([], SPEC, "output")
    assert (nothing.shape, nothing.dtype) == ((0, 0, 0, 3), np.uint8)
    tensor = np.zeros((4, 1, 1, 3), np.uint8)
    assert ragged.dense(tensor, SPEC, "output") is tensor


def test_uneven_rows_are_rejected_with_their_shapes():
    uneven = [row(2, 3), row(4, 5), row(2, 3)]
    assert not ragged.is_even(uneven)
    with pytest.raises(InvalidArgument) as err:
        ragged.dense(uneven, SPEC, "inference output")
    assert "inference output 'image': its 3 rows have different shapes ([2,3,3], [4,5,3])" in str(err.value)
    many = [row(n, 1) for n in range(1, 200)]
    with pytest.raises(InvalidArgument) as err:
        ragged.dense(many, SPEC, "inference output")
    assert len(str(err.value)) < 400


def test_weights():
    text = np.array([b"abc", b""], object)
    assert ragged.size_bytes([row(2, 3), row(1, 1)]) == 18 + 3
    assert ragged.size_bytes(text) == ragged.size_bytes([text[:1], text[1:]])
