"""Response messages: from an inference result to the message that the client receives."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
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

RAW_OUTPUT = 0x32
"""Tag of raw contents in a response: the field's number and wire type 2 (length-delimited)."""

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
    is_own: bool = False,
) -> Steps[pb.ModelInferResponse]:
    """Return the response message, in steps: outputs in the order of the request, all raw.

    The raw contents are added to `raw`, if given, and not to the message: protobuf would copy them. `is_own`: the
    memory of the outputs is used for nothing else, so that views of it are not copied either.

    Raises:
        InvalidArgument: the rows of a ragged output differ in shape, so that no tensor can carry them.
    """
    response = pb.ModelInferResponse(model_name=model, model_version=str(version), id=id)
    for requested, output in zip(request.outputs, result.outputs, strict=True):
        yield from _add(response, requested, output, batched=batched, raw=raw, is_own=is_own)
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
    is_own: bool = False,
) -> pb.ModelInferResponse:
    """Write a response as `write_response` does, in the turns of its tenant when it would block the event loop."""
    steps = write_response(
        result, request, model=model, version=version, id=id, batched=batched, raw=raw, is_own=is_own
    )
    is_long = _is_long_write(result, request, copies=raw is None, is_own=is_own)
    return await in_turns(heavy, tenant, steps, is_long=is_long)


def kept(output: Tensor) -> Any:
    """Return the bytes of an output of numbers, for as long as they are needed: the output itself, or a copy.

    A view is copied: it keeps the outputs of a whole batch, or its memory is used for the next batch.
    """
    is_own = output.flags.c_contiguous and not isinstance(output.base, np.ndarray | memoryview)
    return output if is_own else output.tobytes()


def _is_long_write(result: InferenceResult, request: InferenceRequest, *, copies: bool, is_own: bool) -> bool:
    arrays = [array for output in result.outputs for array in ragged.arrays(output)]
    by_element = sum(array.size for array in arrays if array.dtype == object) > _FEW_ELEMENTS
    classes = sum(requested.classes for requested in request.outputs) * request.rows
    copied = (array.nbytes for array in arrays if copies or not (is_own or array.base is None))
    is_large = sum(copied) > _LARGE_BYTES
    return by_element or classes > _FEW_ELEMENTS or is_large


def has_numbers_only(request: InferenceRequest) -> bool:
    """Return True when all requested outputs are numbers, whose memory is their raw contents."""
    return not any(requested.classes or requested.spec.datatype.is_bytes for requested in request.outputs)


def is_large_write(result: InferenceResult, request: InferenceRequest) -> bool:
    """Return True when the raw contents of a response should not be copied: they are large, and numbers alone."""
    size = sum(array.nbytes for output in result.outputs for array in ragged.arrays(output))
    return size > UNJOINED_BYTES and has_numbers_only(request)


def _add(
    response: pb.ModelInferResponse,
    requested: WantedOutput,
    value: Value,
    *,
    batched: bool,
    raw: list[Any] | None,
    is_own: bool,
) -> Steps[None]:
    datatype = requested.spec.datatype
    output = ragged.dense(value, requested.spec, "inference output")
    if requested.classes:
        output = yield from classify(output, requested.spec, requested.classes, batched=batched)
        datatype = BY_NAME["BYTES"]
    response.outputs.add(name=requested.spec.name, datatype=datatype.name, shape=output.shape)
    if raw is not None:
        raw.append(output if is_own and output.flags.c_contiguous else kept(output))
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


def with_raw(response: bytes, raw: Sequence[Any]) -> tuple[list[Any], int]:
    """Return the parts and the size of a response whose raw contents, bytes-like, are not in it."""
    parts: list[Any] = [response]
    size = len(response)
    for contents in raw:
        length = memoryview(contents).nbytes
        opening = tag_and_length(RAW_OUTPUT, length)
        parts += [opening, contents]
        size += len(opening) + length
    return parts, size


def tag_and_length(tag: int, size: int) -> bytes:
    """Return the tag and length of a field of `size` bytes."""
    out = bytearray([tag])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)
