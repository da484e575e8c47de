"""From what the model gave to the message that the caller gets."""

from __future__ import annotations

from collections.abc import MutableMapping

from services.infer.offload import offload_if_long
from services.infer.requests import ragged
from services.infer.requests.classification import classify
from services.infer.requests.outcome import InferenceResult, StepTimes
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, WantedOutput
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import to_raw

# Beyond these, writing a response takes about a millisecond, and is offloaded to a thread.
_LARGE_BYTES = 4 << 20
# BYTES and classes: Python objects, one by one.
_FEW_ELEMENTS = 1 << 13


def write(
    answer: InferenceResult, call: InferenceRequest, *, model: str, version: int, id: str, batched: bool
) -> pb.ModelInferResponse:
    """The response: outputs in the order of the request, all of them raw.

    Raises:
        InvalidArgument: the rows of a ragged output differ in shape, so that no tensor can carry them.
    """
    response = pb.ModelInferResponse(model_name=model, model_version=str(version), id=id)
    for wanted, output in zip(call.outputs, answer.outputs, strict=True):
        _add(response, wanted, output, batched=batched)
    return response


async def write_async(
    answer: InferenceResult, call: InferenceRequest, *, model: str, version: int, id: str, batched: bool
) -> pb.ModelInferResponse:
    """Write a response as `write` does, on a thread when writing would block the event loop."""
    return await offload_if_long(
        lambda: write(answer, call, model=model, version=version, id=id, batched=batched),
        _is_long_write(answer, call),
    )


def _is_long_write(answer: InferenceResult, call: InferenceRequest) -> bool:
    arrays = [array for output in answer.outputs for array in ragged.arrays(output)]
    by_element = sum(array.size for array in arrays if array.dtype == object) > _FEW_ELEMENTS
    classes = sum(wanted.classes for wanted in call.outputs) * call.rows
    return by_element or classes > _FEW_ELEMENTS or sum(array.nbytes for array in arrays) > _LARGE_BYTES


def _add(response: pb.ModelInferResponse, wanted: WantedOutput, value: Value, *, batched: bool) -> None:
    datatype = wanted.spec.datatype
    output = ragged.dense(value, wanted.spec, "inference output")
    if wanted.classes:
        output, datatype = classify(output, wanted.spec, wanted.classes, batched=batched), BY_NAME["BYTES"]
    response.outputs.add(name=wanted.spec.name, datatype=datatype.name, shape=output.shape)
    response.raw_output_contents.append(to_raw(output, datatype))


def explain(response: pb.ModelInferResponse, answer: InferenceResult, replica: str, cache: str) -> None:
    """Adds who answered and whence, how long that took part by part, and with how many rows and why then it was run.

    The times are those of the execution that the outputs come from: all zero when they were kept in the cache.
    """
    times = answer.times
    say = response.parameters
    say["replica"].string_param = replica
    say["version"].string_param = response.model_version
    say["cache"].string_param = cache
    say["batch_size"].int64_param = times.rows
    say["fired"].string_param = answer.fired
    say["queue_us"].int64_param = answer.queue_ns // 1000
    say["gather_us"].int64_param = times.gather_ns // 1000
    say["compute_us"].int64_param = times.compute_ns // 1000
    say["scatter_us"].int64_param = times.scatter_ns // 1000
    for n, step in enumerate(answer.steps):
        _explain_step(say, f"step_{n}_", step)


def _explain_step(say: MutableMapping[str, pb.InferParameter], prefix: str, step: StepTimes) -> None:
    say[f"{prefix}model"].string_param = step.model
    say[f"{prefix}version"].string_param = str(step.version)
    say[f"{prefix}calls"].int64_param = step.calls
    say[f"{prefix}batch_size"].int64_param = step.rows
    say[f"{prefix}fired"].string_param = step.fired
    say[f"{prefix}queue_us"].int64_param = step.queue_ns // 1000
    say[f"{prefix}compute_us"].int64_param = step.compute_ns // 1000
