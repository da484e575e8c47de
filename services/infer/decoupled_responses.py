"""Response messages of a decoupled model; each states in a parameter whether it is the last one."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from mesh.rpc.heavy_work import HeavyWork
from services.infer.models.version import Version
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.requests.response import has_numbers_only, write_response_async
from services.infer.scheduling.decoupled import Response
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb

FINAL = "triton_final_response"
"""Parameter of a response: True for the last response of a request."""
WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"
"""Parameter of a request: send the last response even when it carries no outputs."""


async def responses(
    version: Version,
    request: InferenceRequest,
    message: pb.ModelInferRequest,
    heavy: HeavyWork,
    deadline: float,
    tenant: str,
    raw: list[Any] | None = None,
) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None]:
    """Yield the response messages of one request; the model's own errors are yielded, too.

    Before a response of numbers is yielded, `raw`, if given, receives its raw contents in place of the message.

    Raises as `DecoupledScheduler.stream` does.
    """
    assert version.decoupled is not None, "callers check that the version is decoupled"
    wants_empty = WANTS_EMPTY_FINAL in message.parameters and message.parameters[WANTS_EMPTY_FINAL].bool_param
    async with aclosing(version.decoupled.stream(request, deadline, tenant)) as found:
        async for response in found:
            if response.error is not None:
                yield response.error
            elif wants_empty or not response.is_empty:
                yield await _response_message(response, version, request, heavy, tenant, message.id, raw)
            del response


async def _response_message(
    response: Response,
    version: Version,
    request: InferenceRequest,
    heavy: HeavyWork,
    tenant: str,
    id: str,
    raw: list[Any] | None,
) -> pb.ModelInferResponse:
    if response.is_empty:
        # As in Triton, an empty response has no version.
        message = pb.ModelInferResponse(model_name=version.name, id=id)
    else:
        batched = version.loaded.model.signature.max_batch_size > 0
        result = InferenceResult(response.outputs, ExecutionTimes())
        began = time.perf_counter_ns()
        message = await write_response_async(
            result,
            request,
            heavy,
            tenant,
            model=version.name,
            version=version.number,
            id=id,
            batched=batched,
            raw=raw if has_numbers_only(request) else None,
            is_own=True,
        )
        version.statistics.wrote(time.perf_counter_ns() - began, request.trace)
    message.parameters[FINAL].bool_param = response.is_final
    return message
