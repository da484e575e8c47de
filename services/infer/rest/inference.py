"""infer: from the body of a request to a message (mesh.rest.infer_request), and from its response to a body (response).

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from mesh.h2.stream import SMALL_BODY
from mesh.rest.call import Reply, RestCall, header_length
from mesh.rest.infer_request import Wanted, read
from mesh.rest.json_text import as_object
from mesh.rest.target import Target
from services.infer.core import InferenceServer
from services.infer.error_text import quoted
from services.infer.fast_path.large_request import LARGE_BYTES, LargeRequest
from services.infer.rest.fast_infer import FastRestInfer
from services.infer.rest.response import write
from services.infer.scheduling.crash_guard import is_retry
from shoal.errors import InvalidArgument, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb


async def infer(server: InferenceServer, fast: FastRestInfer, call: RestCall) -> Reply:
    """Run one inference. `fast` learns from it."""
    body = await call.body()
    length = header_length(call, len(body))
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
        is_retry=is_retry(call.headers),
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
