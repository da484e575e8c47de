"""The request of an inference over REST: from the JSON and the binary tensors of a body to a message.

    {"inputs": [...], "outputs": [...]} raw raw ...  ──read──> ModelInferRequest, raw contents, Wanted

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.rest import tensor_json
from mesh.rest.json_text import as_object, member
from mesh.rest.target import Target
from shoal.errors import InvalidArgument, quoted
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.limits import MAX_DIMS, MAX_PARAMETERS, MAX_TENSORS
from shoal.oip.tensors import count_elements

_BINARY_SIZE, _BINARY_DATA, _BINARY_OUTPUT = "binary_data_size", "binary_data", "binary_data_output"
_CLASSIFICATION = "classification"
# The name of a member, as the gateway's script finds it (mesh.xds.listeners).
_SEQUENCE, _SEQUENCE_MEMBER = b'"sequence_id"', re.compile(rb'"sequence_id"\s*:')
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


Contents = list[bytes | memoryview]
"""Raw contents of the inputs, in order; those of binary tensors are views of the body."""


async def read(
    document: Mapping[str, Any], rest: memoryview, target: Target, wanted: Wanted
) -> tuple[pb.ModelInferRequest, Contents]:
    """Return the message of a request and the raw contents of its inputs, which the message lacks. Set `wanted`.

    `rest`: what follows the JSON in the body. Raises InvalidArgument.
    """
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
    raw: Contents = []
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
        raw.append(rest[at : at + size])
        at += size
    if at < len(rest):
        raise InvalidArgument(
            f"unexpected additional input data for model '{target.model}': {len(rest) - at} bytes follow the last input"
        )
    for each in member(document, "outputs", list, []):
        _add_output(message, as_object(each, "an output"), wanted)
    return message, raw


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
    parameters = _parameters(given)
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


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a tensor. As in Triton, null is none."""
    return {} if given.get("parameters") is None else dict(member(given, "parameters", dict))


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
    parameters = _parameters(given)
    binary = member(parameters, _BINARY_DATA, bool)
    parameters.pop(_BINARY_DATA, None)
    # As in Triton, over REST only: no classification is wanted.
    if type(classes := parameters.get(_CLASSIFICATION)) is int and not classes:
        del parameters[_CLASSIFICATION]
    if binary is not None:
        wanted.by_name[name] = binary
    set_parameters(message.outputs.add(name=name).parameters, parameters)


def check_sequence(message: pb.ModelInferRequest, text: bytes) -> None:
    """Raise InvalidArgument when a step has `sequence_id` more than once in its JSON.

    The gateway chooses the instance by the first, and a parser takes the last: steps would miss their sequence.
    """
    is_step = "sequence_id" in message.parameters
    if is_step and text.count(_SEQUENCE) > 1 and len(_SEQUENCE_MEMBER.findall(text)) > 1:
        raise InvalidArgument("the JSON of the request has 'sequence_id' more than once: send it once")


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
