"""Tensors between the wire and NumPy: every datatype both ways, and bytes that are no tensor."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.infer.calls import tensors
from services.infer.calls.datatypes import BY_CONFIG, BY_NAME
from shoal.errors import InvalidArgument
from shoal.inference.v2 import model_config_pb2
from shoal.inference.v2.inference_pb2 import InferTensorContents

NUMBERS = [datatype for datatype in BY_NAME.values() if not datatype.is_bytes]
shapes = st.lists(st.integers(0, 4), max_size=3)


def test_every_datatype_of_the_configuration_is_known():
    assert set(BY_CONFIG) == set(model_config_pb2.DataType.values()) - {model_config_pb2.TYPE_INVALID}


@given(st.sampled_from(NUMBERS), shapes, st.integers(0, 2**32 - 1))
def test_numbers_there_and_back(datatype, shape, seed):
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * datatype.dtype.itemsize)
    if datatype.name == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    tensor = tensors.from_raw(raw, datatype, shape, "x")
    assert (list(tensor.shape), tensor.dtype) == (shape, datatype.dtype)
    assert tensors.to_raw(tensor, datatype) == raw


def test_raw_numbers_are_views():
    raw = bytes(16)
    assert np.shares_memory(tensors.from_raw(raw, BY_NAME["FP32"], [2, 2], "x"), np.frombuffer(raw, np.uint8))


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_bytes_there_and_back(parts):
    raw = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    tensor = tensors.from_raw(raw, BY_NAME["BYTES"], [len(parts), 1], "x")
    assert tensor.reshape(-1).tolist() == parts
    assert tensors.to_raw(tensor, BY_NAME["BYTES"]) == raw
    contents = InferTensorContents(bytes_contents=parts)
    assert tensors.from_contents(contents, BY_NAME["BYTES"], [len(parts)], "x").tolist() == parts


@given(st.binary(max_size=40), st.lists(st.integers(-3, 2**63 - 1) | st.integers(0, 4), max_size=4))
@example(b"\xff\xff\xff\xff", [1])
@example(b"\0\0\0\0", [2**62, 0, 2**62])
@example(b"", [0, 2**62])
def test_any_bytes_are_a_tensor_or_refused(raw, shape):
    for datatype in BY_NAME.values():
        try:
            tensor = tensors.from_raw(raw, datatype, shape, "input 'x'", text=True)
        except InvalidArgument as err:
            assert err.message.startswith("input 'x'")  # noqa: PT017 - both are right.
        else:
            assert list(tensor.shape) == shape


@pytest.mark.parametrize(
    ("name", "field", "values", "shape", "text"),
    [
        ("INT8", "int_contents", [128], [1], "128 is not a INT8 (-128 to 127)"),
        ("UINT16", "uint_contents", [0, 65536], [2], "65536 is not a UINT16"),
        ("FP16", "fp32_contents", [1.0], [1], "FP16 has no typed contents"),
        ("BF16", "", [], [1], "BF16 has no typed contents"),
        ("INT64", "int_contents", [1], [1], "INT64 belongs in int64_contents, got int_contents"),
        ("BOOL", "bool_contents", [True], [2], "has 2 elements, bool_contents has 1"),
        ("FP32", "fp32_contents", [1.0], [-1], "negative dimension"),
    ],
)
def test_typed_contents_that_are_wrong(name, field, values, shape, text):
    contents = InferTensorContents(**({field: values} if field else {}))
    with pytest.raises(InvalidArgument, match=r"^x: ") as err:
        tensors.from_contents(contents, BY_NAME[name], shape, "x")
    assert text in err.value.message


@pytest.mark.parametrize("name", [d.name for d in NUMBERS if d.contents])
def test_typed_numbers(name):
    datatype = BY_NAME[name]
    got = tensors.from_contents(InferTensorContents(**{datatype.contents: [1, 0]}), datatype, [2, 1], "x")
    assert (got.tolist(), got.dtype) == ([[1], [0]], datatype.dtype)


@pytest.mark.parametrize(
    ("raw", "shape", "text"),
    [
        (b"\2\0\0\0a", [1], "element 0 says it has 2 bytes, but 1 are left"),
        (b"\1\0\0\0ab", [1], "1 bytes are left after 1 BYTES elements"),
        (b"\4\0\0\0abcd", [2], "element 1 of 2 has no length"),
        (b"\0\0\0\0", [1000], "take at least 4000 bytes"),
        (b"\2", [1], "take at least 4 bytes"),
    ],
)
def test_bytes_that_are_wrong(raw, shape, text):
    with pytest.raises(InvalidArgument) as err:
        tensors.from_raw(raw, BY_NAME["BYTES"], shape, "x")
    assert text in err.value.message


def test_a_bool_is_0_or_1():
    with pytest.raises(InvalidArgument, match="the byte 0 or 1, got 7"):
        tensors.from_raw(b"\1\7", BY_NAME["BOOL"], [2], "x")


def test_bf16_is_widened_exactly():
    assert tensors.widened(np.array([0x3FC0, 0xC000, 0x7F80], np.uint16)).tolist() == [1.5, -2.0, math.inf]
