"""Arrays to tensors: what goes out comes back equal, and what cannot go out is named."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.client.inference.arrays import BFloat16, convert, to_tensor
from shoal.client.inference.inference import of_response
from shoal.errors import DataLoss, InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip
from shoal.oip.datatypes import DTYPES

NUMERIC = [name for name in DTYPES if name != "BF16"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def answer(*outputs: tuple[str, str, tuple[int, ...], bytes]) -> oip.ModelInferResponse:
    """An answer with outputs of a name, a datatype, a shape and raw contents."""
    made = oip.ModelInferResponse()
    for name, datatype, shape, raw in outputs:
        made.outputs.add(name=name, datatype=datatype, shape=shape)
        made.raw_output_contents.append(raw)
    return made


def back(tensor) -> np.ndarray:
    return of_response(answer(("y", tensor.datatype, tensor.shape, tensor.raw)))["y"]


@given(st.data(), st.sampled_from(NUMERIC), st.sampled_from("<>="))
def test_numbers_come_back_bit_by_bit(data: st.DataObject, datatype: str, order: str) -> None:
    array = data.draw(hnp.arrays(DTYPES[datatype].newbyteorder(order), SHAPES))
    tensor = to_tensor("x", array)
    assert (tensor.datatype, tensor.shape) == (datatype, array.shape)
    got = back(tensor)
    assert got.shape == array.shape
    # Bits: NaN payloads and -0.0 count.
    assert got.tobytes() == array.astype(DTYPES[datatype]).tobytes()
    assert got.flags.writeable


@pytest.mark.parametrize("value", [np.array(["aé", "bcd"]), np.array([b"a\xff", b"bcd"]), ["aé", "bcd"], "aé"])
def test_every_kind_of_text_array_is_bytes(value: object) -> None:
    tensor = to_tensor("x", value)  # type: ignore[arg-type]
    assert tensor.datatype == "BYTES"
    assert len(back(tensor).reshape(-1)[0]) in (2, 3)


def test_a_scalar_has_no_dimension() -> None:
    assert to_tensor("x", np.float32(1.5)).shape == ()
    assert back(to_tensor("x", np.float32(1.5))) == 1.5


def test_bfloat16_travels_as_its_bits_and_agrees_with_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(7).normal(size=(3, 5)).astype(np.float32) * 1e3
    tensor = to_tensor("x", BFloat16.of(values))
    assert (tensor.datatype, tensor.shape, len(tensor.raw)) == ("BF16", (3, 5), 30)
    assert tensor == to_tensor("x", values.astype(ml_dtypes.bfloat16)) == to_tensor("x", values, "BF16")
    bits = back(tensor)
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(BFloat16(bits).float32(), values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("value", "datatype", "expected"),
    [
        ([[1, 2]], "FP32", np.float32([[1, 2]])),
        ([1.0, 2.0], "INT64", np.int64([1, 2])),
        ([True, False], "UINT8", np.uint8([1, 0])),
        ([0, 1], "BOOL", np.array([False, True])),
        ([0.1], "FP16", np.float16([0.1])),
        ([math.nan, math.inf], "FP16", np.float16([math.nan, math.inf])),
        ([], "INT8", np.int8([])),
        (-128, "INT8", np.int8(-128)),
        ([2**63], "UINT64", np.uint64([2**63])),
    ],
)
def test_lists_become_what_is_asked_for(value: object, datatype: str, expected: np.ndarray) -> None:
    tensor = to_tensor("x", value, datatype)  # type: ignore[arg-type]
    assert tensor.datatype == datatype
    assert tensor.raw == expected.tobytes()


@pytest.mark.parametrize(
    ("value", "datatype", "words"),
    [
        ([1, 300], "UINT8", r"'x': .*300.* at \[1\] is not UINT8"),
        ([-1], "UINT64", "is not UINT64"),
        ([2**63], "INT64", "is not INT64"),
        ([9.3e18], "INT64", "is not INT64"),
        ([1.5], "INT32", "is not INT32"),
        ([math.nan], "INT32", "is not INT32"),
        (np.float16([-math.inf]), "INT32", "is not INT32"),
        ([2], "BOOL", "is not BOOL"),
        ([1e5], "FP16", "is not FP16"),
        (["1"], "FP32", "expected FP32, got"),
        ([1], "BYTES", "expected BYTES"),
        ([1], "FP8", "no datatype 'FP8': use one of"),
        ([[1, 2], [3]], None, "rows must have equal lengths"),
        ([1j], None, "no datatype in the protocol"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), None, "no datatype in the protocol"),
        ([None], None, "element 0 is NoneType"),
        (np.array([b"a", 7], dtype=object), None, "element 1 is int"),
    ],
)
def test_what_cannot_be_sent_is_named(value: object, datatype: str | None, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        to_tensor("x", value, datatype)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [[1e300], [1, 1e39]])
def test_a_number_that_becomes_infinite_is_refused(value: list[float]) -> None:
    for datatype in ("FP16", "FP32", "BF16"):
        with pytest.raises(InvalidArgument, match=f"is not {datatype}"):
            convert("x", np.array(value), datatype)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "words"),
    [
        ("FP32", (2, 3), b"\0" * 20, "is 24 bytes, got 20"),
        ("FP32", (-1, -1), b"\0" * 4, r"shape \[-1,-1\] has a negative dimension"),
        ("FP8", (1,), b"\0", "unknown datatype 'FP8'"),
        ("BYTES", (2,), b"\1\0\0\0a", "2 BYTES elements take at least 8 bytes"),
        ("BYTES", (1,), b"\5\0\0\0a", "element 0 says it has 5 bytes, but 1 are left"),
    ],
)
def test_an_answer_that_does_not_fit_itself_is_data_loss(
    datatype: str, shape: tuple[int, ...], raw: bytes, words: str
) -> None:
    with pytest.raises(DataLoss, match=f"output 'y': .*{words}"):
        of_response(answer(("y", datatype, shape, raw)))


def test_typed_contents_that_do_not_fit_are_data_loss() -> None:
    made = oip.ModelInferResponse()
    made.outputs.add(name="y", datatype="INT8", shape=[1]).contents.int_contents.append(300)
    with pytest.raises(DataLoss, match="output 'y': 300 is not a INT8"):
        of_response(made)


def test_an_array_of_an_answer_can_be_changed() -> None:
    made = oip.ModelInferResponse()
    made.outputs.add(name="y", datatype="FP32", shape=[1]).contents.fp32_contents.append(1)
    for response in (made, answer(("y", "FP32", (1,), bytes(4)))):
        of_response(response)["y"][0] = 5
