"""A client's view of a response, in a form that can be compared: what two servers may say differently is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import json_format

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.infer.conformance import wire
from tests.infer.triton.cases import Case

Seen = tuple[str, Any, str]
"""Status code, what came (None with an error), message of the error."""

ANY = "..."
"""Stands for a text that each server writes in its own words."""


def see(stub: GRPCInferenceServiceStub, case: Case) -> Seen:
    """Makes the call and says what came back."""
    method = getattr(stub, case.method)
    try:
        if case.method == "ModelStreamInfer":
            responses = list(method(iter(case.asked), timeout=wire.PATIENCE_S))
            return "OK", [_streamed(response, case.hides) for response in responses], ""
        return "OK", _plain(case, method(case.asked[0], timeout=wire.PATIENCE_S)), ""
    except grpc.RpcError as err:
        code, message = wire.status(err)
        return code, None, message


def _streamed(response: pb.ModelStreamInferResponse, hides: int) -> dict[str, Any]:
    if response.error_message:
        return {"error": ANY, "id": response.infer_response.id}
    seen = infer(response.infer_response)
    if hides:
        seen["outputs"] = [(*about, raw[:-hides]) for *about, raw in seen["outputs"]]
    return seen


_NO_SEQUENCE = {
    "sequence_id": "int64_param: 0",
    "sequence_start": "bool_param: false",
    "sequence_end": "bool_param: false",
}
"""Triton's ensembles say so of requests that are part of no sequence; ours do not."""


def infer(response: pb.ModelInferResponse) -> dict[str, Any]:
    """A response with its outputs as bytes."""
    outputs = [(output.name, *wire.raw_of(response, output.name)) for output in response.outputs]
    parameters = {name: str(value).strip() for name, value in response.parameters.items()}
    parameters = dict(parameters.items() - _NO_SEQUENCE.items())
    return {
        "model": (response.model_name, response.model_version),
        "id": response.id,
        "parameters": parameters,
        "outputs": outputs,
    }


def _plain(case: Case, response: Any) -> Any:
    if isinstance(response, pb.ModelInferResponse):
        return infer(response)
    if isinstance(response, pb.RepositoryIndexResponse):
        return sorted((row.name, row.version, row.state) for row in response.models)
    if isinstance(response, pb.ModelMetadataResponse):
        # KServe's `properties` and the order of versions are nobody's promise.
        response.versions.sort()
    if isinstance(response, (pb.TraceSettingResponse, pb.LogSettingsResponse)):
        return sorted(response.settings)
    return _written(json_format.MessageToDict(response, preserving_proto_field_name=True))


def _written(document: Mapping[str, Any]) -> dict[str, Any]:
    return dict(document)
