"""Responses of infer as bodies of REST.

    ModelInferResponse ──write──> {"outputs": [...]} raw raw ...

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from mesh.rest import tensor_json
from mesh.rest.call import Reply, RestCall
from mesh.rest.infer_request import Wanted
from shoal.inference.v2 import inference_pb2 as pb

BINARY = b"application/octet-stream"
"""Content type of a response with binary tensors."""
HEADER_LENGTH = b"inference-header-content-length"
BINARY_END = b',"parameters":{"binary_data_size":%d}}'
"""Rest of an output's JSON when its data is binary."""


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
