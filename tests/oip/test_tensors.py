"""Tensors to the wire and back: every datatype, odd shapes, and data that is no tensor."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.errors import DataLoss, InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from shoal.oip import tensors
from shoal.oip.datatypes import BY_NAME, BY_NUMBER, DTYPES, TABLE, find, of_array

NUMBERS = [datatype for datatype in TABLE if not datatype.is_bytes]
TYPED = [datatype for datatype in TABLE if datatype.contents]
BYTES = BY_NAME["BYTES"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def test_the_table_has_every_datatype_of_a_models_configuration() -> None:
    known = {model_config_pb2.DataType.Value(datatype.config_name): datatype.number for datatype in TABLE}
    assert all(value == number for value, number in known.items())
    assert set(BY_NUMBER) == set(model_config_pb2.DataType.values()) - {model_config_pb2.TYPE_INVALID}
    assert set(DTYPES) == set(BY_NAME) - {"BYTES"}


def test_every_field_of_typed_contents_has_a_datatype() -> None:
    fields = {field.name for field in pb.InferTensorContents.DESCRIPTOR.fields}
    assert {datatype.contents for datatype in TYPED} == fields


@pytest.mark.parametrize("datatype", [each for each in NUMBERS if each.name != "BF16"], ids=lambda each: each.name)
@pytest.mark.parametrize("order", "<>=")
def test_an_array_says_its_datatype(datatype, order) -> None:
    assert of_array(np.zeros(1, datatype.dtype.newbyteorder(order))) is datatype


def test_text_is_bytes_and_other_types_have_no_datatype() -> None:
    assert of_array(np.array([b"a", None], object)) is of_array(np.array(["a"])) is of_array(np.array([b"a"])) is BYTES
    assert of_array(np.array([1j])) is None
    assert of_array(np.array(["2020-01-01"], "datetime64[D]")) is None


def test_an_unknown_datatype_is_named() -> None:
    with pytest.raises(DataLoss, match="output 'y': unknown datatype 'FP8'"):
        find("FP8", "output 'y'", DataLoss)
    with pytest.raises(DataLoss) as err:
        find("x" * 10_000, "y", DataLoss)
    assert len(err.value.message) < 100


@given(st.data(), st.sampled_from(NUMBERS), SHAPES)
def test_raw_numbers_come_back_bit_by_bit(data, datatype, shape) -> None:
    size = math.prod(shape) * datatype.dtype.itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    got = tensors.from_raw(raw, datatype, shape, "x", InvalidArgument)
    assert (got.shape, got.dtype) == (shape, datatype.dtype)
    assert tensors.to_raw(got, datatype) == raw


def test_raw_numbers_are_read_only_views() -> None:
    raw = bytes(16)
    got = tensors.from_raw(raw, BY_NAME["FP32"], [2, 2], "x", InvalidArgument)
    assert np.shares_memory(got, np.frombuffer(raw, np.uint8))
    assert not got.flags.writeable


def test_the_layout_in_memory_does_not_matter() -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    for view in (array.T, array[:, ::-1], np.asfortranarray(array), array[::-1, 1:, ::2]):
        raw = tensors.to_raw(view, BY_NAME["INT32"])
        np.testing.assert_array_equal(tensors.from_raw(raw, BY_NAME["INT32"], view.shape, "x", ValueError), view)


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_raw_bytes_come_back(parts) -> None:
    raw = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    got = tensors.from_raw(raw, BYTES, [len(parts), 1], "x", InvalidArgument)
    assert got.shape == (len(parts), 1)
    assert got.reshape(-1).tolist() == parts
    assert tensors.to_raw(got, BYTES) == tensors.pack_bytes(parts) == raw
    split = tensors.split_bytes(memoryview(raw), len(parts), "x", ValueError)
    assert split == parts
    assert all(type(each) is bytes for each in split)


def test_the_elements_of_a_view_take_no_more_memory_than_those_of_bytes() -> None:
    raw = tensors.pack_bytes([b"two"] * 20_000)
    peaks = []
    tracemalloc.start()
    try:
        for given_raw in (raw, memoryview(raw)):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            assert len(tensors.split_bytes(given_raw, 20_000, "x", ValueError)) == 20_000
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert peaks[1] <= 1.2 * peaks[0]


@given(hnp.arrays(object, SHAPES, elements=st.text(max_size=9) | st.binary(max_size=9), fill=st.nothing()))
def test_text_becomes_utf_8(array) -> None:
    got = tensors.from_raw(tensors.to_raw(array, BYTES), BYTES, array.shape, "x", InvalidArgument)
    assert got.shape == array.shape
    expected = [each.encode() if isinstance(each, str) else each for each in array.reshape(-1)]
    assert got.reshape(-1).tolist() == expected


def test_every_kind_of_bytes_is_packed() -> None:
    elements = [b"ab", "ab", np.bytes_(b"ab"), np.str_("ab"), bytearray(b"ab"), memoryview(np.array([0x6261], "<u2"))]
    assert tensors.pack_bytes(elements) == b"\2\0\0\0ab" * len(elements)


@pytest.mark.parametrize(("elements", "text"), [([b"a", 7], "element 1 is int"), ([None], "element 0 is NoneType")])
def test_an_element_that_is_no_bytes_is_named(elements, text) -> None:
    with pytest.raises(TypeError, match=text):
        tensors.pack_bytes(elements)


def drawn_values(data: st.DataObject, datatype, count: int) -> list:
    """`count` values that `datatype` has."""
    if datatype.is_bytes:
        return data.draw(st.lists(st.binary(max_size=5), min_size=count, max_size=count))
    return data.draw(hnp.arrays(datatype.dtype, count)).tolist()


@given(st.data(), st.sampled_from(TYPED), SHAPES)
def test_typed_contents_mean_the_same_as_raw(data, datatype, shape) -> None:
    values = drawn_values(data, datatype, math.prod(shape))
    contents = pb.InferTensorContents(**{datatype.contents: values})
    got = tensors.from_contents(contents, datatype, shape, "x", InvalidArgument)
    expected = tensors.object_array(values, shape) if datatype.is_bytes else np.array(values, datatype.dtype)
    assert (got.shape, got.dtype) == (shape, datatype.dtype)
    np.testing.assert_array_equal(got.reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("count", [63, 64, 1000])
@pytest.mark.parametrize("datatype", [each for each in TYPED if not each.is_bytes], ids=lambda each: each.name)
def test_few_and_many_typed_values_are_read_alike(datatype, count) -> None:
    limit = 2 if datatype.name == "BOOL" else 100
    values = (np.arange(count) % limit).astype(datatype.dtype)
    if datatype.dtype.kind in "iu":
        values[-2:] = np.iinfo(datatype.dtype.name).min, np.iinfo(datatype.dtype.name).max
    contents = pb.InferTensorContents(**{datatype.contents: values.tolist()})
    got = tensors.from_contents(contents, datatype, [count], "x", InvalidArgument)
    assert got.dtype == datatype.dtype
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("name", ["FP16", "BF16"])
def test_an_empty_tensor_needs_no_typed_contents(name) -> None:
    got = tensors.from_contents(pb.InferTensorContents(), BY_NAME[name], [2, 0], "x", InvalidArgument)
    assert (got.shape, got.dtype) == ((2, 0), DTYPES[name])


@given(st.binary(max_size=40), st.lists(st.integers(-3, 2**63 - 1) | st.integers(0, 4), max_size=4))
@example(b"\xff\xff\xff\xff", [1])
@example(b"\0\0\0\0", [2**62, 0, 2**62])
@example(b"", [0, 2**62])
@example(b"", [0] * 65)
@example(b"", [2**62] * 100_000)
def test_any_data_is_a_tensor_or_an_error_that_names_it(raw, shape) -> None:
    for datatype in TABLE:
        for read, data in ((tensors.from_raw, raw), (tensors.from_contents, pb.InferTensorContents(int_contents=raw))):
            try:
                got = read(data, datatype, shape, "input 'x'", DataLoss)  # type: ignore[operator]
            except DataLoss as err:
                refused = err.message
                assert (refused[:11], len(refused) < 1000) == ("input 'x': ", True)
            else:
                assert list(got.shape) == shape


@pytest.mark.parametrize(
    ("name", "shape", "raw", "text"),
    [
        ("FP32", [2, 3], bytes(20), "byte size mismatch: shape [2,3] of FP32 is 24 bytes, got 20"),
        ("FP32", [-1, -1], bytes(4), "shape [-1,-1] has a negative dimension"),
        ("INT8", [0, 2**32], b"", "more than 2147483648 elements"),
        ("INT8", [1] * 65, b"\0", "(65 dimensions)] has more than 64 dimensions"),
        ("BYTES", [1], b"\2\0\0\0a", "element 0 says it has 2 bytes, but 1 are left"),
        ("BYTES", [1], b"\1\0\0\0ab", "1 bytes are left after 1 BYTES elements"),
        ("BYTES", [2], b"\4\0\0\0abcd", "element 1 of 2 has no length"),
        ("BYTES", [2], b"\1\0\0\0a", "2 BYTES elements take at least 8 bytes with their lengths, got 5"),
        ("BYTES", [1000], b"\0\0\0\0", "take at least 4000 bytes"),
        ("BYTES", [1], b"\2", "take at least 4 bytes"),
    ],
)
def test_raw_contents_that_are_wrong(name, shape, raw, text) -> None:
    for error in (InvalidArgument, DataLoss):
        with pytest.raises(error, match=r"^x: ") as err:
            tensors.from_raw(raw, BY_NAME[name], shape, "x", error)
        assert text in err.value.message


@pytest.mark.parametrize(
    ("name", "field", "values", "shape", "text"),
    [
        ("INT8", "int_contents", [128], [1], "128 is not a INT8 (-128 to 127)"),
        ("INT8", "int_contents", [0, -129], [2], "-129 is not a INT8 (-128 to 127)"),
        ("UINT16", "uint_contents", [0, 65536], [2], "65536 is not a UINT16"),
        ("FP16", "fp32_contents", [1.0], [1], "FP16 has no typed contents"),
        ("BF16", "", [], [1], "BF16 has no typed contents"),
        ("INT64", "int_contents", [1], [1], "INT64 belongs in int64_contents, got int_contents"),
        ("BOOL", "bool_contents", [True], [2], "has 2 elements, bool_contents has 1"),
        ("FP32", "fp32_contents", [1.0], [-1], "negative dimension"),
    ],
)
def test_typed_contents_that_are_wrong(name, field, values, shape, text) -> None:
    contents = pb.InferTensorContents(**({field: values} if field else {}))
    for error in (InvalidArgument, DataLoss):
        with pytest.raises(error, match=r"^x: ") as err:
            tensors.from_contents(contents, BY_NAME[name], shape, "x", error)
        assert text in err.value.message


def message(*raw: bytes, typed: bool = False) -> pb.ModelInferResponse:
    made = pb.ModelInferResponse(raw_output_contents=raw)
    made.outputs.add(name="y", datatype="UINT8", shape=[1])
    made.outputs.add(name="z", datatype="UINT8", shape=[2])
    if typed:
        made.outputs[0].contents.uint_contents.append(7)
        made.outputs[1].contents.uint_contents.extend([8, 9])
    return made


@pytest.mark.parametrize("made", [message(b"\7", b"\x08\x09"), message(typed=True)], ids=["raw", "typed"])
def test_a_message_has_raw_or_typed_contents(made) -> None:
    read = [
        tensors.read_tensor(made.outputs, made.raw_output_contents, index, "output", DataLoss) for index in range(2)
    ]
    assert [(name, array.tolist()) for name, array in read] == [("y", [7]), ("z", [8, 9])]


def test_raw_contents_that_are_not_one_for_each_tensor_are_an_error() -> None:
    made = message(b"\7")
    with pytest.raises(DataLoss, match="output 'y': the message has 2 outputs with 1 raw contents"):
        tensors.read_tensor(made.outputs, made.raw_output_contents, 0, "output", DataLoss)


def test_the_codec_loads_neither_protobuf_nor_grpc() -> None:
    code = "import sys, shoal.oip.tensors, shoal.oip.conversion; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"google", "grpc"} & set(loaded)
