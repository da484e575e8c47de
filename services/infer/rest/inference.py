"""infer: from the body of a request to a message, and from a response to a body.

    {"inputs": [...], "outputs": [...]} raw raw ...  ──read──> ModelInferRequest, Wanted
    ModelInferResponse ──write──> {"outputs": [...]} raw raw ...

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import orjson

from mesh.h2.stream import SMALL_BODY
from services.infer.core import InferenceServer
from services.infer.error_text import quoted
from services.infer.fast_path.large_request import LARGE_BYTES, LargeRequest, shared_bytes
from services.infer.requests.request import MAX_PARAMETERS, MAX_TENSORS
from services.infer.rest import tensor_json
from services.infer.rest.call import Reply, RestCall, header_length
from services.infer.rest.json_text import as_object, member
from services.infer.rest.target import Target
from shoal.errors import InvalidArgument, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import MAX_DIMS, count_elements

if TYPE_CHECKING:
    from services.infer.rest.fast_infer import FastRestInfer

BINARY = b"application/octet-stream"
"""Content type of a response with binary tensors."""
HEADER_LENGTH = b"inference-header-content-length"
BINARY_END = b',"parameters":{"binary_data_size":%d}}'
"""Rest of an output's JSON when its data is binary."""

_BINARY_SIZE, _BINARY_DATA, _BINARY_OUTPUT = "binary_data_size", "binary_data", "binary_data_output"
_MAX_INT64, _MAX_UINT64 = (1 << 63) - 1, (1 << 64) - 1
_MAX_CHOICE = "It should be either 'int', 'bool', 'double' or 'string'."


@dataclass(slots=True)
class Wanted:
    """Form of the outputs of a response."""

    all_binary: bool = False
    by_name: dict[str, bool] = field(default_factory=dict)
    """True for an output that is wanted in binary form, False for one as JSON."""

    def is_binary(self, name: str) -> bool:
        return self.by_name.get(name, self.all_binary)


async def infer(server: InferenceServer, fast: FastRestInfer, call: RestCall) -> Reply:
    """Run one inference. `fast` learns from it."""
    body = await call.body()
    length = header_length(call.headers, len(body))
    wanted = Wanted()
    if length == 0:
        message, wanted.all_binary = _raw_request(server, call.target, body), True
    else:
        message = await _message(call, body, len(body) if length is None else length, wanted)
    if server.is_decoupled(message):
        raise Unimplemented("HTTP end point doesn't support models with decoupled transaction policy")
    response = await server.infer(
        message, call.deadline, call.tenant, is_retry=call.is_retry, memory=call, message_bytes=len(body)
    )
    reply = await write(response, wanted, call)
    if length != 0:
        fast.learn(call.target, body, len(body) if length is None else length, message, wanted.is_binary)
    return reply


async def _message(call: RestCall, body: bytes, length: int, wanted: Wanted) -> pb.ModelInferRequest:
    """Return the message of a body with `length` bytes of JSON, and set the form of its outputs."""
    text = body if length == len(body) else body[:length]
    async with call.parsed(text) as document:
        message = await _read(as_object(document, "the request"), memoryview(body)[length:], call.target, wanted)
    # Of a large message, the raw contents are views of the body.
    if len(body) > SMALL_BODY and not shared_bytes(message):
        call.hold(sum(map(len, message.raw_input_contents)))
    return message


def _raw_request(server: InferenceServer, target: Target, body: bytes) -> pb.ModelInferRequest:
    """Return the message of a body without JSON: it is the only input of the model, one row of it."""
    signature = server.models.find(target.model, target.version).loaded.model.signature
    if len(signature.inputs) != 1:
        raise InvalidArgument(
            f"Raw request must only have 1 input (found {len(signature.inputs)}) to be deduced but got "
            f"{len(signature.inputs)} inputs in '{target.model}' model configuration"
        )
    spec = signature.inputs[0]
    dims = list(spec.shape)
    if signature.max_batch_size:
        dims[0] = 1
    free = [at for at, dim in enumerate(dims) if dim < 0]
    if free:
        size = spec.datatype.dtype.itemsize
        known = math.prod(dim for dim in dims if dim >= 0)
        if len(free) > 1 or spec.datatype.is_bytes or not known or len(body) % (known * size):
            raise InvalidArgument(
                f"The shape of Raw request input can not be deduced because there are more than one variable-sized "
                f"dimension, or its {len(body)} bytes do not fit: send the JSON of input {quoted(spec.name)}"
            )
        dims[free[0]] = len(body) // (known * size)
    # The element of a BYTES tensor has its length before it.
    if spec.datatype.is_bytes:
        body = len(body).to_bytes(4, "little") + body
    tensor = pb.ModelInferRequest.InferInputTensor(name=spec.name, datatype=spec.datatype.name, shape=dims)
    return pb.ModelInferRequest(
        model_name=target.model, model_version=target.version, inputs=[tensor], raw_input_contents=[body]
    )


async def _read(document: Mapping[str, Any], rest: memoryview, target: Target, wanted: Wanted) -> pb.ModelInferRequest:
    """Return the message of a request, and set the form of its outputs. Raises InvalidArgument."""
    message = pb.ModelInferRequest(
        model_name=target.model, model_version=target.version, id=member(document, "id", str, "")
    )
    given = dict(member(document, "parameters", dict, {}))
    wanted.all_binary = member(given, _BINARY_OUTPUT, bool, False)
    given.pop(_BINARY_OUTPUT, None)
    set_parameters(message.parameters, given)
    inputs = member(document, "inputs", list)
    if inputs is None:
        raise InvalidArgument("Unable to parse 'inputs': attempt to access non-existing object member 'inputs'")
    for what, tensors in (("inputs", inputs), ("outputs", member(document, "outputs", list, []))):
        if len(tensors) > MAX_TENSORS:
            raise InvalidArgument(f"{what}: the request has {len(tensors)}, at most {MAX_TENSORS} are accepted")
    raw: list[bytes | memoryview] = []
    is_shared = len(rest) > LARGE_BYTES
    at = 0
    for each in inputs:
        tensor, data, size = _input(as_object(each, "an input"))
        message.inputs.append(tensor)
        if size is None:
            raw.append(await _values(tensor, data))
            continue
        if size > len(rest) - at:
            raise InvalidArgument(
                f"unexpected size for input '{tensor.name}', expecting {size - (len(rest) - at)} additional bytes for "
                f"model '{target.model}'"
            )
        part = rest[at : at + size]
        raw.append(part if is_shared else bytes(part))
        at += size
    if at < len(rest):
        raise InvalidArgument(
            f"unexpected additional input data for model '{target.model}': {len(rest) - at} bytes follow the last input"
        )
    for each in member(document, "outputs", list, []):
        _add_output(message, as_object(each, "an output"), wanted)
    if is_shared:
        return cast("pb.ModelInferRequest", LargeRequest(message, cast("Sequence[memoryview]", raw)))
    message.raw_input_contents.extend(cast("Sequence[bytes]", raw))
    return message


def _input(given: Mapping[str, Any]) -> tuple[pb.ModelInferRequest.InferInputTensor, list[Any] | None, int | None]:
    """Return an input, its values, and the size of its binary data: one of these two is None."""
    name, datatype, shape = _required(given, "name", str), _required(given, "datatype", str), given.get("shape")
    if (
        type(shape) is not list
        or len(shape) > MAX_DIMS
        or not all(type(n) is int and 0 <= n <= _MAX_INT64 for n in shape)
    ):
        raise InvalidArgument(
            f"Unable to parse 'shape': input {quoted(name)} needs a list of at most {MAX_DIMS} whole numbers, 0 or more"
        )
    if datatype not in BY_NAME:
        raise InvalidArgument(f"invalid datatype for input {quoted(name)}: {quoted(datatype)}")
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    parameters = dict(member(given, "parameters", dict, {}))
    size = member(parameters, _BINARY_SIZE, int)
    parameters.pop(_BINARY_SIZE, None)
    set_parameters(tensor.parameters, parameters)
    data = given.get("data")
    if (data is None) == (size is None) and "shared_memory_region" not in parameters:
        raise InvalidArgument(
            f"Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters': input "
            f"{quoted(name)} has {'both' if size is not None else 'none'}"
        )
    if size is not None and size < 0:
        raise InvalidArgument(f"Unable to parse 'binary_data_size': input {quoted(name)} needs 0 or more")
    if data is not None and type(data) is not list:
        raise InvalidArgument(f"Unable to parse 'data': input {quoted(name)} needs a list")
    return tensor, data, size


def _required(given: Mapping[str, Any], name: str, kind: type) -> Any:
    found = member(given, name, kind)
    if found is None:
        raise InvalidArgument(f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    return found


async def _values(tensor: pb.ModelInferRequest.InferInputTensor, data: list[Any] | None) -> bytes:
    # Shared memory: the inference reports the error.
    if data is None:
        return b""
    what = f"input {quoted(tensor.name)}"
    elements = count_elements(tensor.shape, what, InvalidArgument)
    return await tensor_json.to_raw(data, BY_NAME[tensor.datatype], elements, len(tensor.shape), what)


def _add_output(message: pb.ModelInferRequest, given: Mapping[str, Any], wanted: Wanted) -> None:
    name = _required(given, "name", str)
    parameters = dict(member(given, "parameters", dict, {}))
    binary = member(parameters, _BINARY_DATA, bool)
    parameters.pop(_BINARY_DATA, None)
    if binary is not None:
        wanted.by_name[name] = binary
    set_parameters(message.outputs.add(name=name).parameters, parameters)


def set_parameters(to: Any, given: Mapping[str, Any]) -> None:
    """Set the parameters of a message, a tensor or an output. Raises InvalidArgument for other than plain values."""
    if len(given) > MAX_PARAMETERS:
        raise InvalidArgument(f"parameters: {len(given)} are given, at most {MAX_PARAMETERS} are accepted")
    for name, value in given.items():
        kind = type(value)
        if kind is bool:
            to[name].bool_param = value
        elif kind is int and -_MAX_INT64 - 1 <= value <= _MAX_INT64:
            to[name].int64_param = value
        elif kind is int and 0 <= value <= _MAX_UINT64:
            to[name].uint64_param = value
        elif kind is float:
            to[name].double_param = value
        elif kind is str:
            to[name].string_param = value
        else:
            raise InvalidArgument(f"parameter {quoted(name)} has invalid type. {_MAX_CHOICE}")


def parameters_of(given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Return the parameters of a message as JSON."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for name, value in given.items()
    }


def begun(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Return the members of a response before its outputs."""
    found: dict[str, Any] = {"id": response.id} if response.id else {}
    found |= {"model_name": response.model_name, "model_version": response.model_version}
    return found | ({"parameters": parameters_of(response.parameters)} if response.parameters else {})


def described(name: str, datatype: str, shape: Sequence[int]) -> bytes:
    """Return the beginning of an output's JSON, before its data."""
    return orjson.dumps({"name": name, "datatype": datatype, "shape": list(shape)})[:-1]


async def write(response: pb.ModelInferResponse, wanted: Wanted, call: RestCall) -> Reply:
    """Return the response of a call."""
    parts = [orjson.dumps(begun(response))[:-1], b',"outputs":[']
    raw: list[bytes] = []
    for number, output in enumerate(response.outputs):
        contents = response.raw_output_contents[number]
        parts += [b"," if number else b"", described(output.name, output.datatype, output.shape)]
        if wanted.is_binary(output.name):
            parts.append(BINARY_END % len(contents))
            raw.append(contents)
            continue
        parts.append(b',"data":[')
        pieces = await tensor_json.to_json(contents, output.datatype, math.prod(output.shape), output.name)
        call.hold_response(sum(map(len, pieces)))
        parts += [*pieces, b"]}"]
    parts.append(b"]}")
    if not raw:
        return Reply(b"".join(parts))
    size = sum(map(len, parts))
    call.hold_response(size + sum(map(len, raw)))
    return Reply(b"".join((*parts, *raw)), BINARY, fields=((HEADER_LENGTH, b"%d" % size),))
