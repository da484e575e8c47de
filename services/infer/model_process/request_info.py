"""Request metadata for models that want it: id, timeout, parameters, sequence id and flags."""

from __future__ import annotations

from typing import Any

from services.infer.requests import parameters
from services.infer.requests.request import InferenceRequest
from shoal.inference.v2 import inference_pb2 as pb

SEQUENCE_START, SEQUENCE_END = 1, 2
"""Flags of a request, as Triton numbers them."""


def of(request: InferenceRequest, model: str, version: int) -> dict[str, Any]:
    """Return the metadata of `request` as JSON values, which are sent to the model process."""
    message = request.source
    info: dict[str, Any] = {"model_name": model, "model_version": version}
    if message is None:
        return info
    info["request_id"] = message.id
    if message.parameters:
        raw = message.parameters
        info["timeout_us"] = request.parameters.timeout_us
        info["parameters"] = {
            name: value for name in raw if name not in parameters.KNOWN and (value := _value(raw[name])) is not None
        }
        info["correlation_id"] = request.parameters.sequence_id
        info["flags"] = _flag(raw, "sequence_start", SEQUENCE_START) | _flag(raw, "sequence_end", SEQUENCE_END)
    return info


def _flag(raw: Any, name: str, flag: int) -> int:
    return flag if name in raw and raw[name].bool_param else 0


def _value(parameter: pb.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None
