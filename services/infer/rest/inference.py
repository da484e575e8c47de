"""infer: from the body of a request to a message (mesh.rest.infer_request), and from a response to a body.

    ModelInferResponse ──write──> {"outputs": [...]} raw raw ...

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import orjson

from mesh.h2.stream import SMALL_BODY
from mesh.rest import tensor_json
from mesh.rest.call import Reply, RestCall, header_length
from mesh.rest.infer_request import Wanted, read
from mesh.rest.json_text import as_object
from mesh.rest.target import Target
from services.infer.core import InferenceServer
from services.infer.error_text import quoted
from services.infer.fast_path.large_request import LARGE_BYTES, LargeRequest
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.errors import InvalidArgument, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb

if TYPE_CHECKING:
    from services.infer.rest.fast_infer import FastRestInfer

BINARY = b"application/octet-stream"
"""Content type of a response with binary tensors."""
HEADER_LENGTH = b"inference-header-content-length"
BINARY_END = b',"parameters":{"binary_data_size":%d}}'
"""Rest of an output's JSON when its data is binary."""

_ATTEMPT = ATTEMPT.encode()


def is_retry(call: RestCall) -> bool:
    """Return True when the mesh has sent the request to another instance before."""
    return call.headers.get(_ATTEMPT, b"1") != b"1"


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
    call.slow_s = server.models.find(call.target.model, call.target.version).slow_ns / 1e9
    response = await server.infer(
        message,
        call.deadline,
        call.tenant,
        is_retry=is_retry(call),
        memory=call,
        message_bytes=len(body),
        limits=call.limits,
    )
    reply = await write(response, wanted, call)
    if length != 0:
        fast.learn(call.target, body, len(body) if length is None else length, message, wanted.is_binary)
    return reply


async def _message(call: RestCall, body: bytes, length: int, wanted: Wanted) -> pb.ModelInferRequest:
    """Return the message of a body with `length` bytes of JSON, and set the form of its outputs."""
    text = body if length == len(body) else body[:length]
    rest = memoryview(body)[length:]
    async with call.parsed(text) as document:
        message, raw = await read(as_object(document, "the request"), rest, call.target, wanted)
    if len(rest) > LARGE_BYTES:
        return cast("pb.ModelInferRequest", LargeRequest(message, cast("Sequence[memoryview]", raw)))
    if len(body) > SMALL_BODY:
        call.hold(sum(map(len, raw)))
    message.raw_input_contents.extend(map(bytes, raw))
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
