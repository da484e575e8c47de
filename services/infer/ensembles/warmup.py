"""The samples of an ensemble's `model_warmup`, sent through its steps before it counts as ready.

Nothing is made up for an ensemble: each of its models has been tried by itself, and what is made up for the first step
(an image that is none) rarely suits it.
"""

from __future__ import annotations

from pathlib import Path

from services.infer.loading import canary, warmup
from services.infer.loading.model_config import Completed
from services.infer.requests import tensors
from services.infer.requests.parameters import NONE
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, WantedOutput, key_of
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.request_scheduler import RequestScheduler
from shoal.errors import FailedPrecondition, ShoalError


async def run(name: str, model: Completed, folder: Path | None, through: RequestScheduler) -> Completed:
    """Runs the samples of the model `name`, whose files lie in `folder`. Returns what is now known of it.

    Raises:
        FailedPrecondition: one of them is wrong, fails, or is answered with what was not promised.
    """
    batched = model.signature.max_batch_size > 0
    for sample in model.config.model_warmup:
        try:
            inputs = warmup.sample_inputs(sample, model, folder)
            outputs = tuple(WantedOutput(spec) for spec in model.signature.outputs)
            rows, size = warmup.sample_rows(sample), sum(tensors.size_bytes(tensor) for tensor in inputs.values())
            call = InferenceRequest(inputs, outputs, rows, size, key_of(inputs, outputs, model.signature), NONE)
            for _ in range(max(sample.count, 1)):
                answer = await through.submit(call)
            model = canary.checked(name, model, list(map(_tensor, answer.outputs)), rows if batched else None)
        except ShoalError as err:
            raise FailedPrecondition(f"model_warmup '{sample.name}': {err.message}") from err
    return model


def _tensor(value: Value) -> Tensor:
    assert not isinstance(value, list), "an ensemble gives tensors"
    return value
