"""Messages become requests, or say what is wrong with them; answers become messages that say what the model said."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.connectors.connector_spec import ConnectorSpec
from services.ingest.connectors.formats import Format
from services.ingest.connectors.message import Message, Partition
from services.ingest.connectors.outcome import MessageFailure, dead_letter
from services.ingest.connectors.tensors import DATATYPES, elements_of, raw_of
from shoal.errors import DataLoss, InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip
from shoal.oip.datatypes import DTYPES

JSON = Format("json", "json", "m", "3")


def body(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1.5, 2]], **changes}
    return json.dumps({"inputs": [tensor]}).encode()


def test_json_is_the_protocols_own() -> None:
    value = {
        "id": "7",
        "parameters": {"explain": True, "n": 3, "f": 0.5, "s": "t"},
        "inputs": [
            {"name": "x", "shape": [2, 2], "datatype": "INT64", "data": [1, 2, 3, 4]},
            {"name": "t", "shape": [1], "datatype": "BYTES", "data": ["grüß"]},
        ],
        "outputs": [{"name": "y"}],
    }
    request = JSON.request(json.dumps(value).encode())
    assert (request.model_name, request.model_version, request.id) == ("m", "3", "7")
    assert [(each.name, each.datatype, list(each.shape)) for each in request.inputs] == [
        ("x", "INT64", [2, 2]),
        ("t", "BYTES", [1]),
    ]
    assert request.raw_input_contents[0] == np.array([1, 2, 3, 4], "<i8").tobytes()
    assert request.raw_input_contents[1] == b"\x06\x00\x00\x00" + "grüß".encode()
    assert request.outputs[0].name == "y"
    assert request.parameters["explain"].bool_param
    assert request.parameters["n"].int64_param == 3


def test_a_record_is_one_row() -> None:
    form = Format("record", "json", "m", inputs={"text": "BYTES", "v": "FP32", "k": "INT32"})
    request = form.request(b'{"text": "hello", "v": [[1, 2], [3, 4]], "k": 7, "more": "is left out"}')
    assert [list(each.shape) for each in request.inputs] == [[1], [1, 2, 2], [1]]
    assert request.raw_input_contents[2] == np.int32(7).tobytes()


def test_bytes_are_one_element() -> None:
    request = Format("bytes", "json", "m", inputs={"image": "BYTES"}).request(b"\xff\xd8")
    assert request.inputs[0].name == "image"
    assert request.raw_input_contents[0] == b"\x02\x00\x00\x00\xff\xd8"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1]", "expected an object"),
        (b"{}", "inputs"),
        (b'{"inputs": []}', "inputs"),
        (b'{"inputs": [7]}', r"inputs\[0\]"),
        (b'{"inputs": [{"name": "x"}]}', "name, shape, datatype and data"),
        (body(datatype="FP99"), "input 'x': datatype 'FP99' is none of"),
        (body(datatype=["FP32"]), "is none of"),
        (body(datatype="BF16"), "as protobuf"),
        (body(shape=[3]), "takes 3 elements, its data has 2"),
        (body(shape=[-1, -2]), "a list of whole numbers"),
        (body(shape="2"), "a list of whole numbers"),
        (body(shape=[1 << 70]), "a list of whole numbers"),
        (body(shape=[1 << 62] * 300), "300 dimensions"),
        (body(shape=[1 << 62] * 64), "its data has 2"),
        (body(data=[[1], [2, 3]]), "rows have the shapes"),
        (body(data=[[1, "2"]]), "element 1 is '2'"),
        (body(data=[[1, None]]), "element 1 is 'None'"),
        (body(data=[[True, 1]]), "element 0 is 'True'"),
        (body(data=[[1e39, 1]]), "element 0"),
        (body(datatype="INT8", data=[[1, 300]]), "element 1 is '300', which is not INT8"),
        (body(datatype="UINT64", data=[[-1, 3]]), "element 0"),
        (body(datatype="BYTES", data=[["a", 3]]), "element 1 is '3'"),
        (body(datatype="BYTES", data=[["a", "\ud800"]]), "element 1 cannot be read"),
        (body(datatype="BYTES", data=[["!", "a"]], parameters={"content_type": "base64"}), "element 0 cannot be read"),
        (json.dumps({"inputs": [], "id": 3}).encode(), "id"),
        (b'{"inputs": [{"name": "x", "datatype": "BOOL", "data": [true]}], "outputs": [3]}', "outputs"),
        (b'{"inputs": [{"name": "x", "datatype": "BOOL", "data": [true]}], "parameters": {"a": []}}', "'a' is"),
        (body(name="\ud800"), "no UTF-8"),
        (body(parameters={"\ud800": 1}), "no UTF-8"),
        (body(parameters={"a": "\ud800"}), "no UTF-8"),
    ],
    ids=range(33),
)  # fmt: skip
def test_what_is_wrong_is_named(value: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        JSON.request(value)


def test_a_record_without_an_input_is_named() -> None:
    with pytest.raises(InvalidArgument, match="the record has no b"):
        Format("record", "json", "m", inputs={"a": "FP32", "b": "FP32"}).request(b'{"a": 1}')


def test_no_protobuf_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"inference\.ModelInferRequest"):
        Format("protobuf", "json", "m").request(b"\xff\xff")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_invalid(value: bytes) -> None:
    for form in (JSON, Format("protobuf", "json", "m"), Format("record", "json", "m", inputs={"a": "FP32"})):
        try:
            assert form.request(value).model_name == "m"
        except InvalidArgument:
            pass


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "data", "\ud800"]), inner),
    max_leaves=5,
)
TENSOR = {
    "name": st.just("x"),
    "datatype": st.sampled_from(DATATYPES),
    "shape": st.just([1]) | st.lists(st.integers(0, 1 << 63), max_size=100),
    "data": st.just([1]),
}


@given(st.data())
def test_any_document_is_a_request_or_a_dead_letter_that_says_why(data: st.DataObject) -> None:
    tensor = data.draw(st.fixed_dictionaries({key: each | ODD for key, each in TENSOR.items()}))
    fields = {"inputs": st.just([tensor]) | ODD, "id": ODD, "outputs": ODD, "parameters": ODD}
    document = data.draw(st.fixed_dictionaries({}, optional=fields))
    made = Message(Partition("0"), 0, "t/0/0", json.dumps(document).encode())
    spec = ConnectorSpec("c", JSON, lambda: pytest.fail("nothing is opened"))
    try:
        JSON.request(made.value)
    except InvalidArgument as err:
        dead_letter(spec, made, MessageFailure(err.code, err.message))


def response(datatype: str, shape: list[int], raw: bytes) -> oip.ModelInferResponse:
    made = oip.ModelInferResponse(model_name="m", model_version="3", id="7", raw_output_contents=[raw])
    made.outputs.add(name="y", datatype=datatype, shape=shape)
    return made


def test_an_answer_in_json() -> None:
    raw = np.array([1.5, math.inf, -math.inf, math.nan], "<f4").tobytes()
    said = json.loads(JSON.encode(response("FP32", [2, 2], raw)))
    assert said["id"] == "7"
    assert said["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [1.5, "Infinity", "-Infinity", "NaN"]}
    ]


def test_bytes_that_are_no_text_are_base64() -> None:
    said = json.loads(JSON.encode(response("BYTES", [1], b"\x01\x00\x00\x00\xff")))["outputs"][0]
    assert said["data"] == ["/w=="]
    again = JSON.request(json.dumps({"inputs": [{**said, "name": "x"}]}).encode())
    assert again.raw_input_contents[0] == b"\x01\x00\x00\x00\xff"


def test_an_answer_in_typed_contents_is_read_too() -> None:
    made = oip.ModelInferResponse(model_name="m")
    made.outputs.add(name="y", datatype="INT8", shape=[2]).contents.int_contents.extend([1, -2])
    assert json.loads(JSON.encode(made))["outputs"][0]["data"] == [1, -2]
    made.outputs[0].contents.int_contents[1] = 300
    with pytest.raises(DataLoss, match="300 is not a INT8"):
        JSON.encode(made)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [("FP32", [2], b"1234"), ("FP32", [1], b"12345"), ("BYTES", [2], b"\1\0\0\0a"), ("BYTES", [1], b"\7\0\0\0a")],
    ids=["short", "long", "few", "cut"],
)
def test_an_answer_that_does_not_fit_itself_is_no_answer(datatype: str, shape: list[int], raw: bytes) -> None:
    with pytest.raises(DataLoss, match="output 'y'"):
        JSON.encode(response(datatype, shape, raw))


@given(st.sampled_from(sorted({*DATATYPES} - {"BYTES"})), st.data())
def test_numbers_survive_json_both_ways(datatype: str, data: st.DataObject) -> None:
    dtype = DTYPES[datatype]
    raw = data.draw(st.binary(min_size=dtype.itemsize * 3, max_size=dtype.itemsize * 3))
    array = np.frombuffer(raw, dtype) if dtype.kind != "b" else np.frombuffer(raw, "u1") % 2 == 1
    elements, is_base64 = elements_of("y", datatype, array)
    again = raw_of("y", datatype, json.loads(json.dumps(elements, allow_nan=False)), is_base64=is_base64)
    np.testing.assert_array_equal(np.frombuffer(again, dtype), array)  # Any NaN equals any: JSON has one.
