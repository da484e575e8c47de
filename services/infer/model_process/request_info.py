"""What a request says about itself besides its tensors, for models that want to know."""

from __future__ import annotations

from typing import Any

from services.infer.requests import parameters
from services.infer.requests.request import InferenceRequest
from shoal.inference.v2 import inference_pb2 as pb

SEQUENCE_START, SEQUENCE_END = 1, 2
"""Flags of a request, as Triton numbers them."""


def of(call: InferenceRequest, model: str, version: int) -> dict[str, Any]:
    """As it travels to the model's process."""
    asked = call.source
    said: dict[str, Any] = {"model_name": model, "model_version": version}
    if asked is None:
        return said
    said["request_id"] = asked.id
    if asked.parameters:
        given = asked.parameters
        said["timeout_us"] = call.parameters.timeout_us
        said["parameters"] = {
            name: value for name in given if name not in parameters.KNOWN and (value := _value(given[name])) is not None
        }
        said["correlation_id"] = call.parameters.sequence_id
        said["flags"] = _flag(given, "sequence_start", SEQUENCE_START) | _flag(given, "sequence_end", SEQUENCE_END)
    return said


def _flag(given: Any, name: str, flag: int) -> int:
    return flag if name in given and given[name].bool_param else 0


def _value(parameter: pb.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None
