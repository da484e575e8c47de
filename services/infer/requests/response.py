"""Response messages: from an inference result to the message that the client receives."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np

from mesh.rpc.fast_call import UNJOINED_BYTES
from mesh.rpc.heavy_work import HeavyWork, Steps
from services.infer.offload import in_turns
from services.infer.requests import ragged
from services.infer.requests.classification import classify
from services.infer.requests.outcome import InferenceResult, StepTimes
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.tensors import Tensor
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import to_raw_steps

# Beyond these, writing a response takes about a millisecond, and waits for its turns.
_LARGE_BYTES = 4 << 20
# BYTES and classes: Python objects, one by one.
_FEW_ELEMENTS = 1 << 13


def write_response(
    result: InferenceResult,
    request: InferenceRequest,
    *,
    model: str,
    version: int,
    id: str,
    batched: bool,
    raw: list[Any] | None = None,
) -> Steps[pb.ModelInferResponse]:
    """Return the response message, in steps: outputs in the order of the request, all raw.

    The raw contents are added to `raw`, if given, and not to the message: protobuf would copy them.

    Raises:
        InvalidArgument: the rows of a ragged output differ in shape, so that no tensor can carry them.
    """
    response = pb.ModelInferResponse(model_name=model, model_version=str(version), id=id)
    for requested, output in zip(request.outputs, result.outputs, strict=True):
        yield from _add(response, requested, output, batched=batched, raw=raw)
    return response


async def write_response_async(
    result: InferenceResult,
    request: InferenceRequest,
    heavy: HeavyWork,
    tenant: str,
    *,
    model: str,
    version: int,
    id: str,
    batched: bool,
    raw: list[Any] | None = None,
) -> pb.ModelInferResponse:
    """Write a response as `write_response` does, in the turns of its tenant when it would block the event loop."""
    steps = write_response(result, request, model=model, version=version, id=id, batched=batched, raw=raw)
    return await in_turns(heavy, tenant, steps, is_long=_is_long_write(result, request, copies=raw is None))


def kept(output: Tensor) -> Any:
    """Return the bytes of an output of numbers, for as long as they are needed: the output itself, or a copy.

    A view is copied: it keeps the outputs of a whole batch, or its memory is used for the next batch.
    """
    is_own = output.flags.c_contiguous and not isinstance(output.base, np.ndarray | memoryview)
    return output if is_own else output.tobytes()


def _is_long_write(result: InferenceResult, request: InferenceRequest, *, copies: bool) -> bool:
    arrays = [array for output in result.outputs for array in ragged.arrays(output)]
    by_element = sum(array.size for array in arrays if array.dtype == object) > _FEW_ELEMENTS
    classes = sum(requested.classes for requested in request.outputs) * request.rows
    is_large = sum(array.nbytes for array in arrays if copies or array.base is not None) > _LARGE_BYTES
    return by_element or classes > _FEW_ELEMENTS or is_large


def is_large_write(result: InferenceResult, request: InferenceRequest) -> bool:
    """Return True when the raw contents of a response should not be copied: they are large, and numbers alone."""
    if any(requested.classes or requested.spec.datatype.is_bytes for requested in request.outputs):
        return False
    return sum(array.nbytes for output in result.outputs for array in ragged.arrays(output)) > UNJOINED_BYTES


def _add(
    response: pb.ModelInferResponse, requested: WantedOutput, value: Value, *, batched: bool, raw: list[Any] | None
) -> Steps[None]:
    datatype = requested.spec.datatype
    output = ragged.dense(value, requested.spec, "inference output")
    if requested.classes:
        output = yield from classify(output, requested.spec, requested.classes, batched=batched)
        datatype = BY_NAME["BYTES"]
    response.outputs.add(name=requested.spec.name, datatype=datatype.name, shape=output.shape)
    if raw is not None:
        raw.append(kept(output))
        return
    contents = yield from to_raw_steps(output, datatype)
    yield
    response.raw_output_contents.append(contents)
    yield


def explain(response: pb.ModelInferResponse, result: InferenceResult, replica: str, cache: str) -> None:
    """Add to the response: replica and version, use of the cache, batch size and trigger, and the times of each stage.

    The times are those of the execution that computed the outputs; all zero for outputs from the cache.
    """
    times = result.times
    explained = response.parameters
    explained["replica"].string_param = replica
    explained["version"].string_param = response.model_version
    explained["cache"].string_param = cache
    explained["batch_size"].int64_param = times.rows
    explained["fired"].string_param = result.fired
    explained["queue_us"].int64_param = result.queue_ns // 1000
    explained["gather_us"].int64_param = times.gather_ns // 1000
    explained["compute_us"].int64_param = times.compute_ns // 1000
    explained["scatter_us"].int64_param = times.scatter_ns // 1000
    for n, step in enumerate(result.steps):
        _explain_step(explained, f"step_{n}_", step)


def _explain_step(explained: MutableMapping[str, pb.InferParameter], prefix: str, step: StepTimes) -> None:
    explained[f"{prefix}model"].string_param = step.model
    explained[f"{prefix}version"].string_param = str(step.version)
    explained[f"{prefix}calls"].int64_param = step.calls
    explained[f"{prefix}batch_size"].int64_param = step.rows
    explained[f"{prefix}fired"].string_param = step.fired
    explained[f"{prefix}queue_us"].int64_param = step.queue_ns // 1000
    explained[f"{prefix}compute_us"].int64_param = step.compute_ns // 1000
