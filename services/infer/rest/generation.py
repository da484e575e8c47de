"""generate and generate_stream: the members of a JSON object are inputs of the model, or parameters.

    {"text": "a", "n": [1, 2], "parameters": {...}} ──> ModelInferRequest ──> {"model_name": ..., "answer": "b"}

One response is one object; generate_stream sends each as an event. A value is a text, a number, true or false, or a
flat list of them. Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson

from mesh.rest import tensor_json
from mesh.rest.call import Events, Reply, RestCall
from mesh.rest.infer_request import check_sequence, set_parameters
from mesh.rest.json_text import as_object, member
from mesh.rest.target import Target
from services.infer.core import InferenceServer
from services.infer.error_text import quoted
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.rest.response import begun
from services.infer.scheduling.crash_guard import is_retry
from shoal.errors import Internal, InvalidArgument, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.limits import MAX_TENSORS


async def generate(server: InferenceServer, call: RestCall) -> Reply:
    """Run one inference that has one response."""
    message, size = await _read(server, call)
    found: bytes | None = None
    async with aclosing(_documents(server, call, message, size)) as documents:
        async for document in documents:
            if found is not None:
                found = None
                break
            found = document
    if found is None:
        raise Internal(
            "generate expects model to produce exactly 1 response, use generate stream for model that generates "
            "various number of responses"
        )
    return Reply(found)


async def generate_stream(server: InferenceServer, call: RestCall) -> Events:
    """Run one inference that has any number of responses."""
    message, size = await _read(server, call)
    return _documents(server, call, message, size)


async def _documents(
    server: InferenceServer, call: RestCall, message: pb.ModelInferRequest, size: int
) -> AsyncGenerator[bytes, None]:
    """Yield the responses of a request. Raises the first error of the model."""
    if not server.is_decoupled(message):
        response = await server.infer(
            message,
            call.deadline,
            call.tenant,
            is_retry=is_retry(call.headers),
            memory=call,
            message_bytes=size,
            limits=call.limits,
        )
        yield await _written(response)
        return
    responses = server.responses(message, call.deadline, call.tenant, call, size, call.limits)
    async with aclosing(responses):
        async for found in responses:
            if isinstance(found, ShoalError):
                raise found
            yield await _written(found)


async def _read(server: InferenceServer, call: RestCall) -> tuple[pb.ModelInferRequest, int]:
    """Return the message of a request, and the bytes of its body."""
    body = await call.body()
    target = call.target
    version = server.models.find(target.model, target.version)
    call.slow_s = version.slow_ns / 1e9
    async with call.parsed(body) as document:
        message = await _message(as_object(document, "the request"), version.loaded.model.signature, target)
    check_sequence(message, body)
    return message, len(body)


async def _message(document: Mapping[str, Any], signature: Signature, target: Target) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(
        model_name=target.model, model_version=target.version, id=member(document, "id", str, "")
    )
    parameters = dict(member(document, "parameters", dict, {}))
    if len(document) > MAX_TENSORS:
        raise InvalidArgument(f"the request has {len(document)} members, at most {MAX_TENSORS} are accepted")
    for name, value in document.items():
        spec = signature.inputs_by_name.get(name)
        if spec is not None:
            values = value if type(value) is list else [value]
            shape = _shape(spec, len(values), is_batched=signature.max_batch_size > 0)
            raw = await tensor_json.to_raw(values, spec.datatype, len(values), 1, f"input {quoted(name)}")
            message.inputs.add(name=name, datatype=spec.datatype.name, shape=shape)
            message.raw_input_contents.append(raw)
        elif name not in ("id", "parameters"):
            parameters[name] = value
    set_parameters(message.parameters, parameters)
    return message


def _shape(spec: TensorSpec, count: int, *, is_batched: bool) -> list[int]:
    """Return the shape of one row with `count` values: the first dimension that varies takes what the others leave."""
    dims = list(spec.shape)
    if is_batched:
        dims[0] = 1
    if -1 in dims:
        at = dims.index(-1)
        known = math.prod(dim for dim in dims if dim >= 0)
        dims = [max(dim, 1) for dim in dims]
        dims[at] = count // known if known else 0
    if math.prod(dims) != count:
        raise InvalidArgument(
            f"The schema can not convert input '{spec.name}' to tensor with proper shape: {count} values"
        )
    return dims


async def _written(response: pb.ModelInferResponse) -> bytes:
    parts = [orjson.dumps(begun(response))[:-1]]
    for number, output in enumerate(response.outputs):
        elements = math.prod(output.shape)
        contents = response.raw_output_contents[number]
        pieces = await tensor_json.to_json(contents, output.datatype, elements, output.name)
        opening, closing = (b"", b"") if elements == 1 else (b"[", b"]")
        parts += [b",", orjson.dumps(output.name), b":", opening, *pieces, closing]
    parts.append(b"}")
    return b"".join(parts)
