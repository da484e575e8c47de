"""Arrays to the wire and back: what goes out comes back equal, and what cannot go out is named."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.client.arrays import BFloat16, convert, from_contents, from_tensor, to_tensor
from shoal.datatypes import DTYPES
from shoal.errors import DataLoss, InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip

NUMERIC = [name for name in DTYPES if name != "BF16"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@given(st.data(), st.sampled_from(NUMERIC), st.sampled_from("<>="))
def test_numbers_come_back_bit_by_bit(data: st.DataObject, datatype: str, order: str) -> None:
    array = data.draw(hnp.arrays(DTYPES[datatype].newbyteorder(order), SHAPES))
    tensor = to_tensor("x", array)
    assert (tensor.datatype, tensor.shape) == (datatype, array.shape)
    back = from_tensor("x", tensor.datatype, tensor.shape, tensor.raw)
    assert back.shape == array.shape
    assert back.tobytes() == array.astype(DTYPES[datatype]).tobytes()  # Bits: NaN payloads and -0.0 count.
    assert back.flags.writeable


@given(hnp.arrays(object, SHAPES, elements=st.text(max_size=9) | st.binary(max_size=9), fill=st.nothing()))
def test_text_comes_back_as_bytes(array: np.ndarray) -> None:
    tensor = to_tensor("x", array)
    back = from_tensor("x", "BYTES", tensor.shape, tensor.raw)
    assert tensor.datatype == "BYTES"
    assert back.shape == array.shape
    expected = [element.encode() if isinstance(element, str) else element for element in array.reshape(-1)]
    assert list(back.reshape(-1)) == expected


@pytest.mark.parametrize("value", [np.array(["aé", "bcd"]), np.array([b"a\xff", b"bcd"]), ["aé", "bcd"], "aé"])
def test_every_kind_of_text_array_is_bytes(value: object) -> None:
    tensor = to_tensor("x", value)  # type: ignore[arg-type]
    assert tensor.datatype == "BYTES"
    assert len(from_tensor("x", "BYTES", tensor.shape, tensor.raw).reshape(-1)[0]) in (2, 3)


def test_the_layout_in_memory_does_not_matter() -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    for view in (array.T, array[:, ::-1], np.asfortranarray(array), array[::-1, 1:, ::2]):
        tensor = to_tensor("x", view)
        np.testing.assert_array_equal(from_tensor("x", "INT32", tensor.shape, tensor.raw), view)


def test_a_scalar_has_no_dimension() -> None:
    assert to_tensor("x", np.float32(1.5)).shape == ()
    assert from_tensor("x", "FP32", (), np.float32(1.5).tobytes()) == 1.5


FLOATS = st.floats(width=32) | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38])


@given(st.lists(FLOATS, max_size=20))
def test_bfloat16_is_the_nearest_of_the_two_neighbours(values: list[float]) -> None:
    wide = np.array(values, dtype=np.float32)
    back = BFloat16.of(wide).float32()
    np.testing.assert_array_equal(np.isnan(back), np.isnan(wide))
    for value, got in zip(wide, back, strict=True):
        if not np.isfinite(value):
            assert np.isnan(value) or got == value
            continue
        below = (np.array(value).view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        step = np.array(0x10000, np.uint32)
        with np.errstate(over="ignore"):
            above = (below.view(np.uint32) + step).astype(np.uint32).view(np.float32)
        if np.isfinite(above):
            assert abs(float(got) - float(value)) == min(
                abs(float(below) - float(value)), abs(float(above) - float(value))
            )


def test_bfloat16_travels_as_its_bits_and_agrees_with_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(7).normal(size=(3, 5)).astype(np.float32) * 1e3
    tensor = to_tensor("x", BFloat16.of(values))
    assert (tensor.datatype, tensor.shape, len(tensor.raw)) == ("BF16", (3, 5), 30)
    assert tensor == to_tensor("x", values.astype(ml_dtypes.bfloat16)) == to_tensor("x", values, "BF16")
    bits = from_tensor("x", "BF16", tensor.shape, tensor.raw)
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


@given(hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64)), SHAPES), st.sampled_from(NUMERIC))
def test_a_conversion_keeps_every_value_or_is_refused(array: np.ndarray, datatype: str) -> None:
    try:
        got = convert("x", array, datatype)
    except InvalidArgument:
        return
    assert got.dtype == DTYPES[datatype]
    if got.dtype.kind != "f":
        assert got.tolist() == array.tolist()


@pytest.mark.parametrize("datatype", [name for name in [*NUMERIC, "BYTES"] if name != "FP16"])
def test_typed_contents_are_read_too(datatype: str) -> None:
    contents = oip.InferTensorContents()
    if datatype == "BYTES":
        contents.bytes_contents.extend([b"a", b""])
    elif datatype == "BOOL":
        contents.bool_contents.extend([True, False])
    elif datatype in ("FP32", "FP64"):
        getattr(contents, datatype.lower() + "_contents").extend([1.5, -2.0])
    else:
        stem = "uint" if datatype[0] == "U" else "int"
        field = f"{stem}64_contents" if datatype.endswith("64") else f"{stem}_contents"
        getattr(contents, field).extend([1, 2])
    assert from_contents("y", datatype, (2, 1), contents).shape == (2, 1)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "words"),
    [
        ("FP32", (2, 3), b"\0" * 20, r"takes 24 bytes, the answer has 20"),
        ("FP32", (-1, -1), b"\0" * 4, r"shape \[-1, -1\]"),
        ("FP8", (1,), b"\0", "unknown datatype 'FP8'"),
        ("BYTES", (2,), b"\1\0\0\0a", "has 2 elements, the answer 1"),
        ("BYTES", (1,), b"\5\0\0\0a", "element 0 ends beyond"),
        ("BYTES", (1,), b"\5\0", "element 0 ends beyond"),
    ],
)
def test_an_answer_that_does_not_fit_itself_is_data_loss(
    datatype: str, shape: tuple[int, ...], raw: bytes, words: str
) -> None:
    with pytest.raises(DataLoss, match=f"'y'.*{words}"):
        from_tensor("y", datatype, shape, raw)


def test_contents_that_do_not_fit_are_data_loss() -> None:
    with pytest.raises(DataLoss, match="has 2 elements, the answer 1"):
        from_contents("y", "INT8", (2,), oip.InferTensorContents(int_contents=[1]))
    with pytest.raises(DataLoss, match="beyond INT8"):
        from_contents("y", "INT8", (1,), oip.InferTensorContents(int_contents=[300]))
    with pytest.raises(DataLoss, match="no typed contents"):
        from_contents("y", "FP16", (1,), oip.InferTensorContents())
