"""The server's own checks of tensors, beyond the codec's: BOOL and text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.infer.requests import tensors
from shoal.errors import InvalidArgument
from shoal.inference.v2.inference_pb2 import InferTensorContents
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import pack_bytes

BYTES = BY_NAME["BYTES"]


def test_a_bool_is_0_or_1():
    assert tensors.from_raw(b"\1\0", BY_NAME["BOOL"], [2], "x").tolist() == [True, False]
    assert tensors.from_raw(b"", BY_NAME["BOOL"], [0], "x").size == 0
    with pytest.raises(InvalidArgument, match="the byte 0 or 1, got 7"):
        tensors.from_raw(b"\1\7", BY_NAME["BOOL"], [2], "x")


@given(st.lists(st.text(max_size=5), max_size=4))
def test_text_is_str_in_memory(texts):
    raw = tensors.from_raw(pack_bytes(texts), BYTES, [len(texts), 1], "x", text=True)
    typed = InferTensorContents(bytes_contents=[each.encode() for each in texts])
    for got in (raw, tensors.from_contents(typed, BYTES, [len(texts), 1], "x", text=True)):
        assert got.shape == (len(texts), 1)
        assert got.reshape(-1).tolist() == texts


def test_text_that_is_not_utf_8_is_rejected():
    raw = pack_bytes([b"a", b"\xff"])
    assert tensors.from_raw(raw, BYTES, [2], "x").tolist() == [b"a", b"\xff"]
    with pytest.raises(InvalidArgument, match="x: this model's BYTES are text: element 1 is not UTF-8"):
        tensors.from_raw(raw, BYTES, [2], "x", text=True)
    with pytest.raises(InvalidArgument, match="element 0 is not UTF-8"):
        tensors.from_contents(InferTensorContents(bytes_contents=[b"\xff"]), BYTES, [1], "x", text=True)


def test_the_size_of_bytes_is_that_of_their_elements():
    assert tensors.size_bytes(np.zeros((2, 3), np.float32)) == 24
    assert tensors.data_bytes(np.array([b"abc", b""], object)) == 2 * 8 + 3
    # A batch of 64 MiB has no more elements of BYTES than two requests.
    assert tensors.size_bytes(np.array([b""] * 300_000, object)) * 2 > 64 << 20
