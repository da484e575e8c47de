"""Formats of a connector: decoding of messages to inference requests, and encoding of answers.

    protobuf   a serialised inference.ModelInferRequest           ->  a serialised inference.ModelInferResponse
    json       the body of the inference protocol over REST       ->  the same protocol's response
    record     a JSON object, one row: a value for each input     ->  as json
    bytes      the whole message is one element of one input      ->  as json

A message determines only tensors and parameters: the model is that of the connector.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from google.protobuf.message import DecodeError

from services.ingest.connectors.tensors import check_datatype, elements_of, flat, raw_of
from shoal.errors import DataLoss, InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip
from shoal.oip.tensors import pack_bytes, read_tensor

Input: TypeAlias = Literal["protobuf", "json", "record", "bytes"]
Output: TypeAlias = Literal["protobuf", "json"]

_BASE64 = "content_type"
# Limit on the dimensions of a shape, as in NumPy.
_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Format:
    """Format in which a connector reads and writes messages."""

    reads: Input
    writes: Output
    model: str
    version: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """record: datatypes by input. bytes: the single input."""

    def request(self, value: bytes) -> oip.ModelInferRequest:
        """Return the request in a message.

        Raises:
            InvalidArgument: the message is malformed.
        """
        request = _protobuf(value) if self.reads == "protobuf" else self._read(value)
        request.model_name, request.model_version = self.model, self.version
        return request

    def _read(self, value: bytes) -> oip.ModelInferRequest:
        if self.reads == "bytes":
            return _from_bytes(value, next(iter(self.inputs)))
        document = _object(value)
        try:
            return _from_body(document) if self.reads == "json" else _from_record(document, self.inputs)
        except UnicodeEncodeError as err:
            # JSON allows a lone surrogate ("\\ud800"), which UTF-8 does not.
            raise InvalidArgument(f"a text in the message is no UTF-8: {err}") from None

    def encode(self, response: oip.ModelInferResponse) -> bytes:
        """Return an answer as a message.

        Raises:
            InvalidArgument: the answer has no JSON form. DataLoss: its tensors contradict their shapes or datatypes.
        """
        return response.SerializeToString() if self.writes == "protobuf" else _to_body(response)


def _protobuf(value: bytes) -> oip.ModelInferRequest:
    try:
        return oip.ModelInferRequest.FromString(value)
    except DecodeError:
        raise InvalidArgument("the message is no serialised inference.ModelInferRequest") from None


def _object(value: bytes) -> dict[str, Any]:
    try:
        document = json.loads(value)
    except (ValueError, RecursionError) as err:
        raise InvalidArgument(f"the message is no JSON: {str(err)[:200]}") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"the message is a JSON {type(document).__name__}: expected an object")
    return document


def _from_bytes(value: bytes, name: str) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(raw_input_contents=[pack_bytes([value])])
    request.inputs.add(name=name, datatype="BYTES", shape=[1])
    return request


def _from_record(document: Mapping[str, Any], inputs: Mapping[str, str]) -> oip.ModelInferRequest:
    if missing := [name for name in inputs if name not in document]:
        raise InvalidArgument(f"the record has no {', '.join(missing)}: the model's inputs are {', '.join(inputs)}")
    request = oip.ModelInferRequest()
    for name, datatype in inputs.items():
        elements, shape = flat(f"input {name!r}", document[name])
        request.raw_input_contents.append(raw_of(f"input {name!r}", datatype, elements))
        request.inputs.add(name=name, datatype=datatype, shape=[1, *shape])
    return request


def _from_body(document: Mapping[str, Any]) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(id=_text(document, "id"))
    for index, tensor in enumerate(_list(document, "inputs", is_required=True)):
        _add_input(request, f"inputs[{index}]", tensor)
    for index, output in enumerate(_list(document, "outputs")):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise InvalidArgument(f"outputs[{index}]: expected an object with a name")
        request.outputs.add(name=output["name"])
    _parameters("parameters", document.get("parameters"), request.parameters)
    return request


def _add_input(request: oip.ModelInferRequest, what: str, tensor: Any) -> None:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str) or "data" not in tensor:
        raise InvalidArgument(f"{what}: expected an object with name, shape, datatype and data")
    what = f"input {tensor['name'][:80]!r}"
    datatype = check_datatype(what, tensor.get("datatype"))
    data = tensor["data"] if isinstance(tensor["data"], list) else [tensor["data"]]
    elements, natural = flat(what, data)
    shape = _shape(what, tensor.get("shape", natural), len(elements))
    added = request.inputs.add(name=tensor["name"], datatype=datatype, shape=shape)
    _parameters(f"{what}: parameters", tensor.get("parameters"), added.parameters)
    is_base64 = _BASE64 in added.parameters and added.parameters[_BASE64].string_param == "base64"
    request.raw_input_contents.append(raw_of(what, datatype, elements, is_base64=is_base64))


def _shape(what: str, shape: Any, count: int) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise InvalidArgument(f"{what}: its shape is {str(shape)[:80]}: expected a list of whole numbers")
    if len(shape) > _MAX_DIMENSIONS:
        raise InvalidArgument(f"{what}: its shape has {len(shape)} dimensions: at most {_MAX_DIMENSIONS}")
    if math.prod(shape) != count:
        raise InvalidArgument(f"{what}: its shape {shape} takes {math.prod(shape)} elements, its data has {count}")
    return shape


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"{key}: expected a text, got {str(value)[:80]}")
    return value


def _list(document: Mapping[str, Any], key: str, *, is_required: bool = False) -> list[Any]:
    value = document.get(key, None if is_required else [])
    if not isinstance(value, list) or (is_required and not value):
        raise InvalidArgument(f"{key}: expected a list of tensors, got {str(value)[:80]}")
    return value


def _parameters(what: str, parameters: Any, into: Any) -> None:
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidArgument(f"{what}: expected an object, got {str(parameters)[:80]}")
    for key, value in (parameters or {}).items():
        if isinstance(value, bool):
            into[key].bool_param = value
        elif isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
            into[key].int64_param = value
        elif isinstance(value, float):
            into[key].double_param = value
        elif isinstance(value, str):
            into[key].string_param = value
        else:
            raise InvalidArgument(f"{what}: {key!r} is {str(value)[:80]}: expected true, false, a number or a text")


def _to_body(response: oip.ModelInferResponse) -> bytes:
    body: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        body["id"] = response.id
    if response.parameters:
        body["parameters"] = _values(response.parameters)
    body["outputs"] = [_tensor(response, index) for index in range(len(response.outputs))]
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _tensor(response: oip.ModelInferResponse, index: int) -> dict[str, Any]:
    output = response.outputs[index]
    _, array = read_tensor(response.outputs, response.raw_output_contents, index, "output", DataLoss)
    elements, is_base64 = elements_of(f"output {output.name!r}", output.datatype, array)
    tensor: dict[str, Any] = {
        "name": output.name,
        "datatype": output.datatype,
        "shape": list(output.shape),
        "data": elements,
    }
    if parameters := _values(output.parameters) | ({_BASE64: "base64"} if is_base64 else {}):
        tensor["parameters"] = parameters
    return tensor


def _values(parameters: Mapping[str, oip.InferParameter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, parameter in sorted(parameters.items()):
        if (which := parameter.WhichOneof("parameter_choice")) is not None:
            value = getattr(parameter, which)
            found[key] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return found
