"""The result of one ensemble request: output tensors, and the summed times of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.infer.ensembles import values
from services.infer.ensembles.fan_out import StepMeasurements
from services.infer.ensembles.plan import EnsemblePlan
from services.infer.ensembles.values import Skipped
from services.infer.requests import ragged
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, StepTimes
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import fits
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument
from shoal.oip.tensors import shape_text

FIRED = "steps"
"""Stands for the reason why a batch was dispatched: each step reports its own reason."""


def output_tensor(
    plan: EnsemblePlan,
    request: InferenceRequest,
    slot_values: Sequence[Value | Skipped | None],
    requested: WantedOutput,
) -> Tensor:
    """Return one requested output; `slot_values` are the values of the plan's slots.

    Raises:
        InvalidArgument: every producer of the output was skipped, the output is ragged, or its shape contradicts the
            ensemble's signature.
    """
    spec = requested.spec
    value = slot_values[plan.slots[spec.name]]
    if value is None or isinstance(value, Skipped):
        if spec.name not in plan.graph.empty_if_skipped:
            raise InvalidArgument(
                f"output '{spec.name}': every step that gives it was skipped for this request: request other "
                f"outputs, or set parameter skipped.{spec.name} to get an empty tensor"
            )
        batched = plan.completed.signature.max_batch_size > 0
        return values.empty(spec.datatype, (request.rows, *spec.shape[1:]) if batched else spec.shape)
    tensor = ragged.dense(value, spec, "output")
    if spec.shape and not fits(tensor.shape, spec.shape):
        raise InvalidArgument(
            f"output '{spec.name}' has shape {shape_text(tensor.shape)}, expected {shape_text(spec.shape)}"
        )
    return tensor


def ensemble_result(
    plan: EnsemblePlan,
    request: InferenceRequest,
    outputs: Sequence[Tensor],
    measurements: Mapping[int, StepMeasurements],
) -> InferenceResult:
    """Return the result with the steps' times; `measurements` has the steps that called their model, by index."""
    measured = measurements.values()
    times = ExecutionTimes(
        request.rows,
        sum([step.gather_ns for step in measured]),
        sum([step.compute_ns for step in measured]),
        sum([step.scatter_ns for step in measured]),
    )
    result = InferenceResult(outputs, times, sum([step.queue_ns for step in measured]), FIRED)
    if request.parameters.explain:
        result.steps = [_step_times(plan, n, measurements.get(n, StepMeasurements())) for n in range(len(plan.steps))]
    return result


def _step_times(plan: EnsemblePlan, index: int, measured: StepMeasurements) -> StepTimes:
    version = plan.steps[index].version
    return StepTimes(
        version.name,
        version.number,
        measured.calls,
        measured.rows,
        measured.queue_ns,
        measured.compute_ns,
        measured.fired,
    )
