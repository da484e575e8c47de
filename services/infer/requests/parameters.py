"""Request parameters: the known ones with their types, and those that are rejected.

request   timeout (int64, microseconds), priority, sequence_id, sequence_start, sequence_end, explain,
          triton_enable_empty_final_response; other `triton_...` are reserved and rejected; the rest is the model's own
output    classification (int64)
both      binary_data..., of the protocol's HTTP form, are ignored; shared_memory_... is not supported
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.infer.error_text import quoted
from shoal.errors import InvalidArgument, Unimplemented
from shoal.inference.v2.inference_pb2 import InferParameter

_TYPES = {
    "timeout": ("int64_param",),
    "priority": ("uint64_param", "int64_param"),
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "explain": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}

KNOWN = frozenset(_TYPES)
"""Parameters that the server reads; all others are the model's own."""

_SHARED_MEMORY = "shared_memory_"


@dataclass(frozen=True)
class Parameters:
    """Known parameters of one request."""

    timeout_us: int = 0
    """Longest wait in the queue; 0: no bound of the request's own."""
    priority: int = 0
    """1 runs first; 0: the model's default. Beyond the model's levels it means the default too, as in Triton."""
    explain: bool = False
    """True: the response states who computed it, with how many rows, and the times."""
    sequence_id: int | str = 0
    """Sequence of the step, 0 to 2**64 - 1 or a text; 0 or empty: none."""
    sequence_start: bool = False
    sequence_end: bool = False
    """True for the first, or the last step."""
    inner_call: object = None
    """The call of a model that the request belongs to, an `inner_calls.InnerCall`; None for a client's request."""


NONE = Parameters()
"""Parameters of most requests."""


def read(parameters: Mapping[str, InferParameter]) -> Parameters:
    """Return the known parameters of a request.

    Raises:
        InvalidArgument: a reserved name, a wrong type, or a negative number.
    """
    for name, value in parameters.items():
        if name in _TYPES:
            _check_type(name, value, _TYPES[name], "the request")
        elif name.startswith("triton_"):
            raise InvalidArgument(f"parameter {quoted(name)}: names that start with 'triton_' are reserved")
        for number in ("timeout", "priority"):
            if name == number and value.int64_param < 0:
                raise InvalidArgument(f"parameter '{name}': expected 0 or more, got {value.int64_param}")
    if not parameters:
        return NONE
    timeout, priority, explain = parameters.get("timeout"), parameters.get("priority"), parameters.get("explain")
    return Parameters(
        timeout_us=timeout.int64_param if timeout else 0,
        priority=(priority.uint64_param or priority.int64_param) if priority else 0,
        explain=explain.bool_param if explain else False,
        sequence_id=sequence_id(parameters),
        sequence_start="sequence_start" in parameters and parameters["sequence_start"].bool_param,
        sequence_end="sequence_end" in parameters and parameters["sequence_end"].bool_param,
    )


def sequence_id(parameters: Mapping[str, InferParameter]) -> int | str:
    """Return the sequence id of a request. As in Triton, int64 and uint64 of the same bits are the same id."""
    value = parameters.get("sequence_id")
    if value is None:
        return 0
    if value.WhichOneof("parameter_choice") == "string_param":
        return value.string_param
    return value.uint64_param or value.int64_param % (1 << 64)


def check_input(parameters: Mapping[str, InferParameter], what: str) -> None:
    """Raise Unimplemented when an input refers to shared memory."""
    for name in parameters:
        if name.startswith(_SHARED_MEMORY):
            raise Unimplemented(f"{what}: parameter {quoted(name)}: shared memory is not supported: send the data")


def classes(parameters: Mapping[str, InferParameter], what: str) -> int:
    """Return the number of classes that an output is to be converted to; 0: no conversion.

    Raises:
        InvalidArgument: `classification` has another type, or is less than 1.
        Unimplemented: the output refers to shared memory.
    """
    check_input(parameters, what)
    if "classification" not in parameters:
        return 0
    value = parameters["classification"]
    _check_type("classification", value, ("int64_param",), what)
    if value.int64_param < 1:
        raise InvalidArgument(f"{what}: parameter 'classification': expected 1 or more, got {value.int64_param}")
    return value.int64_param


def _check_type(name: str, value: InferParameter, types: tuple[str, ...], what: str) -> None:
    got = value.WhichOneof("parameter_choice")
    if got not in types:
        raise InvalidArgument(
            f"invalid value type for '{name}' parameter of {what}: "
            f"expected {' or '.join(types)}, got {got or 'nothing'}"
        )
