"""From what the model gave to the message that the caller gets."""

from __future__ import annotations

from services.infer import tensors
from services.infer.classification import classify
from services.infer.datatypes import BY_NAME
from services.infer.request import Call, WantedOutput
from services.infer.scheduler import Answer
from services.infer.tensors import Tensor
from shoal.inference.v2 import inference_pb2 as pb


def write(answer: Answer, call: Call, *, model: str, version: int, id: str, batched: bool) -> pb.ModelInferResponse:
    """The response: outputs in the order of the request, all of them raw."""
    response = pb.ModelInferResponse(model_name=model, model_version=str(version), id=id)
    for wanted, output in zip(call.outputs, answer.outputs, strict=True):
        _add(response, wanted, output, batched=batched)
    return response


def _add(response: pb.ModelInferResponse, wanted: WantedOutput, output: Tensor, *, batched: bool) -> None:
    datatype = wanted.spec.datatype
    if wanted.classes:
        output, datatype = classify(output, wanted.spec, wanted.classes, batched=batched), BY_NAME["BYTES"]
    response.outputs.add(name=wanted.spec.name, datatype=datatype.name, shape=output.shape)
    response.raw_output_contents.append(tensors.to_raw(output, datatype))


def explain(response: pb.ModelInferResponse, answer: Answer, replica: str) -> None:
    """Adds who computed it, how many rows were executed together, and how long it waited and took."""
    times = answer.times
    response.parameters["replica"].string_param = replica
    response.parameters["batch_size"].int64_param = times.rows
    response.parameters["queue_us"].int64_param = answer.queue_ns // 1000
    response.parameters["compute_us"].int64_param = (times.gather_ns + times.compute_ns + times.scatter_ns) // 1000
