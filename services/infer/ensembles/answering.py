"""The answer to a request: outputs made tensors, and the times of its steps added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.infer.ensembles import values
from services.infer.ensembles.fan_out import Seen
from services.infer.ensembles.plan import EnsemblePlan
from services.infer.ensembles.values import Skipped
from services.infer.error_text import written
from services.infer.requests import ragged
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, StepTimes
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import fits
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument

FIRED = "steps"
"""In place of why a batch was run: each step says its own."""


def output(
    plan: EnsemblePlan, call: InferenceRequest, found: Sequence[Value | Skipped | None], wanted: WantedOutput
) -> Tensor:
    """One output, of what was found by places.

    Raises:
        InvalidArgument: it was skipped, or is no tensor, or not the one that the ensemble promises.
    """
    spec = wanted.spec
    value = found[plan.places[spec.name]]
    if value is None or isinstance(value, Skipped):
        if spec.name not in plan.graph.empty_if_skipped:
            raise InvalidArgument(
                f"output '{spec.name}': every step that gives it was skipped for this request: ask for other "
                f"outputs, or have it empty then (parameter skipped.{spec.name})"
            )
        batched = plan.completed.signature.max_batch_size > 0
        return values.empty(spec.datatype, (call.rows, *spec.shape[1:]) if batched else spec.shape)
    tensor = ragged.dense(value, spec, "output")
    if spec.shape and not fits(tensor.shape, spec.shape):
        raise InvalidArgument(f"output '{spec.name}' has shape {written(tensor.shape)}, expected {written(spec.shape)}")
    return tensor


def answer(
    plan: EnsemblePlan, call: InferenceRequest, outputs: Sequence[Tensor], seen: Mapping[int, Seen]
) -> InferenceResult:
    """All of them, and what the steps took; `seen` is by step, of those that called their model."""
    took = seen.values()
    times = ExecutionTimes(
        call.rows,
        sum([one.gather_ns for one in took]),
        sum([one.compute_ns for one in took]),
        sum([one.scatter_ns for one in took]),
    )
    made = InferenceResult(outputs, times, sum([one.queue_ns for one in took]), FIRED)
    if call.parameters.explain:
        made.steps = [_step_times(plan, n, seen.get(n, Seen())) for n in range(len(plan.steps))]
    return made


def _step_times(plan: EnsemblePlan, index: int, seen: Seen) -> StepTimes:
    version = plan.steps[index].version
    return StepTimes(version.name, version.number, seen.calls, seen.rows, seen.queue_ns, seen.compute_ns, seen.fired)
