"""Tensors on the wire: every datatype, raw and typed, every shape that is odd."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given

EXTREMES = {
    "BOOL": [True, False],
    "INT8": [-128, 127],
    "INT16": [-32768, 32767],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "FP32": [-3.4028234663852886e38, 1.401298464324817e-45],
    "FP64": [-1.7976931348623157e308, 5e-324],
    "BYTES": [b"", "käse \N{FISH}".encode()],
}
RAW = {
    "BOOL": b"\x01\x00",
    "FP16": bytes.fromhex("ff7b 0100"),
    "BF16": bytes.fromhex("80ff c07f"),  # -inf, and a NaN: they are bits, and come back as they were.
    "BYTES": wire.packed(EXTREMES["BYTES"]),
}


def raw(datatype: str) -> bytes:
    """Two elements of `datatype` on the wire."""
    return RAW.get(datatype) or np.array(EXTREMES[datatype], wire.NUMPY[datatype]).tobytes()


@pytest.mark.parametrize("datatype", wire.DATATYPES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_raw_comes_back_bit_for_bit(infer, datatype, shape):
    response = infer(f"same_{datatype.lower()}", Given("x", datatype, shape, raw(datatype)))
    assert wire.raw_of(response, "y") == (datatype, list(shape), raw(datatype))


@pytest.mark.parametrize("datatype", wire.CONTENTS)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_typed_contents_mean_the_same(infer, datatype, shape):
    response = infer(f"same_{datatype.lower()}", Given("x", datatype, shape, values=EXTREMES[datatype]))
    # The response is raw whatever the request was: tritonclient reads nothing else.
    assert wire.raw_of(response, "y") == (datatype, list(shape), raw(datatype))
    assert not response.outputs[0].HasField("contents")


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
@pytest.mark.parametrize("field", ["fp32_contents", "uint_contents", "bytes_contents"])
def test_half_precision_has_no_typed_contents(refused, datatype, field):
    values = [b"ab"] if field == "bytes_contents" else [1]
    asked = wire.request(f"same_{datatype.lower()}", Given("x", datatype, (1, 1), values=values, contents=field))
    message = refused("INVALID_ARGUMENT", asked)
    assert "'x'" in message
    assert datatype in message


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("INT8", 128), ("INT8", -129), ("INT16", 32768), ("UINT8", 256), ("UINT16", 65536), ("INT16", -32769)],
)
def test_a_typed_value_that_its_datatype_cannot_hold(refused, datatype, value):
    asked = wire.request(f"same_{datatype.lower()}", Given("x", datatype, (1, 2), values=[0, value]))
    message = refused("INVALID_ARGUMENT", asked)
    assert "'x'" in message
    assert str(value) in message


@pytest.mark.parametrize("datatype", wire.CONTENTS)
def test_typed_contents_in_the_field_of_another_datatype(refused, datatype):
    field = "fp64_contents" if datatype != "FP64" else "fp32_contents"
    asked = wire.request(f"same_{datatype.lower()}", Given("x", datatype, (1, 1), values=[1], contents=field))
    message = refused("INVALID_ARGUMENT", asked)
    assert field in message
    assert wire.CONTENTS[datatype] in message


def test_nan_infinity_and_minus_zero_survive(infer):
    odd = np.array([[np.nan, np.inf, -np.inf, -0.0]], "<f4")
    for given in (Given("x", "FP32", (1, 4), odd.tobytes()), Given("x", "FP32", (1, 4), values=odd[0].tolist())):
        got = wire.array(infer("same_fp32", given), "y")[0]
        assert math.isnan(got[0])
        assert got[1:3].tolist() == [math.inf, -math.inf]
        assert math.copysign(1, got[3]) == -1


@pytest.mark.parametrize(
    "elements",
    [
        [b""],
        [b"a", b"", b"bc"],
        ["ünïcödé".encode(), "中文".encode(), b"\x00nul"],
        [b"x" * 70_000, b"y"],
        [b"%d" % n for n in range(1000)],
    ],
)
def test_bytes_of_every_length(infer, elements):
    shape = (1, len(elements))
    response = infer("same_bytes", Given("x", "BYTES", shape, wire.packed(elements)))
    assert wire.unpacked(wire.raw_of(response, "y")[2]) == elements
    response = infer("same_bytes", Given("x", "BYTES", shape, values=elements))
    assert wire.unpacked(wire.raw_of(response, "y")[2]) == elements


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x01",
        b"\x05\x00\x00\x00ab",
        b"\xff\xff\xff\xffab",
        wire.packed([b"one"]),
        wire.packed([b"one", b"two", b"three"]),
        wire.packed([b"one", b"two"]) + b"\x00",
    ],
)
def test_bytes_that_are_not_two_elements(refused, sent):
    message = refused("INVALID_ARGUMENT", wire.request("same_bytes", Given("x", "BYTES", (1, 2), sent)))
    assert "'x'" in message


@pytest.mark.parametrize("size", [0, 1, 15, 17, 32])
def test_a_byte_size_that_is_not_the_shape_s(refused, size):
    message = refused("INVALID_ARGUMENT", wire.request("double", Given("x", "FP32", (1, 4), b"\0" * size)))
    assert "'x'" in message
    assert "16" in message


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_typed_contents_of_another_count(refused, count):
    message = refused("INVALID_ARGUMENT", wire.request("double", Given("x", "FP32", (1, 4), values=[1] * count)))
    assert "'x'" in message
    assert str(count) in message


@pytest.mark.parametrize("byte", [2, 255])
def test_a_bool_is_0_or_1(refused, byte):
    message = refused("INVALID_ARGUMENT", wire.request("same_bool", Given("x", "BOOL", (1, 2), bytes([1, byte]))))
    assert str(byte) in message


def test_a_scalar(infer):
    response = infer("scalar", Given("x", "FP32", (), np.float32(7).tobytes()))
    assert wire.raw_of(response, "y") == ("FP32", [], np.float32(7).tobytes())
    assert wire.raw_of(infer("scalar", Given("x", "FP32", (), values=[7])), "y")[2] == np.float32(7).tobytes()


@pytest.mark.parametrize("datatype", wire.DATATYPES)
def test_no_columns_at_all(infer, datatype):
    assert wire.raw_of(infer(f"same_{datatype.lower()}", Given("x", datatype, (2, 0), b"")), "y") == (
        datatype,
        [2, 0],
        b"",
    )


def test_a_model_without_a_batch_dimension(infer, refused):
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    response = infer("flat", Given("x", "FP32", (2, 3), array.tobytes()))
    assert wire.raw_of(response, "y") == ("FP32", [2, 3], array.tobytes())
    for shape in ((1, 2, 3), (3, 2), (6,), (2, 4)):
        size = 4 * math.prod(shape)
        assert "[2,3]" in refused("INVALID_ARGUMENT", wire.request("flat", Given("x", "FP32", shape, b"\0" * size)))


@pytest.mark.parametrize(
    "shape",
    [
        (0, 4),
        (9, 4),
        (1, 5),
        (4,),
        (1, 1, 4),
        (),
        (-1, 4),
        (1, -4),
        (-1, -4),
        (2**62, 4),
        (1, 4, 2**62),
        (2**63 - 1, 4),
    ],
)
def test_shapes_that_are_refused(refused, shape):
    message = refused("INVALID_ARGUMENT", wire.request("double", Given("x", "FP32", shape, b"\0" * 16)))
    assert "'x'" in message


def test_raw_inputs_follow_the_order_of_the_inputs(infer):
    a, b = wire.floats("a", 2, 3), wire.floats("b", 2, 3, start=100)
    for given in ((a, b), (b, a)):
        response = infer("add", *given)
        assert [output.name for output in response.outputs] == ["sum", "difference"]
        assert wire.array(response, "sum")[0].tolist() == [101, 103, 105]
        assert wire.array(response, "difference")[1].tolist() == [-99, -99, -99]


@pytest.mark.parametrize("names", [["sum"], ["difference"], ["difference", "sum"], ["sum", "difference"]])
def test_outputs_come_as_they_are_asked_for(infer, names):
    response = infer("add", wire.floats("a"), wire.floats("b"), outputs=names)
    assert [output.name for output in response.outputs] == names
    assert len(response.raw_output_contents) == len(names)
    for name in names:
        assert wire.array(response, name)[0].tolist() == ([2, 4, 6, 8] if name == "sum" else [0, 0, 0, 0])


def test_a_typed_and_a_raw_input_in_one_request(refused):
    asked = wire.request("add", wire.floats("a"), Given("b", "FP32", (1, 4), values=[1, 2, 3, 4]))
    assert "'b'" in refused("INVALID_ARGUMENT", asked)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_raw_contents_that_are_not_one_for_each_input(refused, count):
    asked = wire.request("add", wire.floats("a"), wire.floats("b"))
    data = asked.raw_input_contents[0]
    asked.raw_input_contents[:] = [data] * count
    message = refused("INVALID_ARGUMENT", asked)
    assert "'a'" in message or "2" in message
