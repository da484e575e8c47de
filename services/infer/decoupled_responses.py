"""The responses of a decoupled model, as the protocol has them: each says whether it is the last one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.infer.models.version import Version
from services.infer.requests import response as answer
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.decoupled import Response
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb

FINAL = "triton_final_response"
"""Parameter of a response: there are no more."""
WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"
"""Parameter of a request: a last response that carries nothing is sent, too."""


async def responses(
    version: Version, call: InferenceRequest, asked: pb.ModelInferRequest, deadline: float, tenant: str
) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None]:
    """Raises what `DecoupledScheduler.stream` does; errors of the model's own are responses."""
    assert version.decoupled is not None, "only a decoupled version is asked"
    wants_empty = WANTS_EMPTY_FINAL in asked.parameters and asked.parameters[WANTS_EMPTY_FINAL].bool_param
    async with aclosing(version.decoupled.stream(call, deadline, tenant)) as found:
        async for response in found:
            if response.error is not None:
                yield response.error
            elif wants_empty or not response.is_empty:
                yield _written(response, version, call, asked.id)


def _written(response: Response, version: Version, call: InferenceRequest, id: str) -> pb.ModelInferResponse:
    batched = version.loaded.model.signature.max_batch_size > 0
    made = InferenceResult(response.outputs, ExecutionTimes())
    if response.is_empty:
        written = pb.ModelInferResponse(model_name=version.name, id=id)  # As Triton has it: no version.
    else:
        written = answer.write(made, call, model=version.name, version=version.number, id=id, batched=batched)
    written.parameters[FINAL].bool_param = response.is_final
    return written
