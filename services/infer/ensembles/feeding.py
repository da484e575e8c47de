"""Requests to a step's model, built from the step's tensors; and checks of the outputs against the model's signature.

Every tensor of a model or a request is checked before it is passed on: a tensor that does not fit would fail a whole
batch with rows of other callers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from services.infer.ensembles import values
from services.infer.ensembles.plan import Feed, PlannedStep
from services.infer.requests import ragged
from services.infer.requests.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, key_of
from services.infer.requests.resident import is_resident
from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from shoal.errors import Internal, InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.tensors import shape_text

StepInputs = Sequence[tuple[Feed, Value]]
"""The inputs of a step with their values; optional inputs may be missing."""


def whole_request(
    step: PlannedStep, fed: StepInputs, parameters: Parameters, source: pb.ModelInferRequest | None
) -> InferenceRequest | None:
    """Return the only request of a step; None when the inputs have no rows.

    Raises:
        InvalidArgument: a tensor does not fit the model's input.
    """
    inputs = {feed.spec.name: _converted(feed, value, step) for feed, value in fed}
    rows = _rows(step, inputs) if step.max_rows else 1
    return _request(step, inputs, rows, parameters, source) if rows else None


def row_request(
    step: PlannedStep, fed: StepInputs, row: int, parameters: Parameters, source: pb.ModelInferRequest | None
) -> InferenceRequest:
    """Return the request for one row of the inputs from `split_rows`. Raises InvalidArgument as `whole_request`."""
    inputs: dict[str, Value] = {}
    for feed, value in fed:
        element = cast("Tensor", value[row] if feed.by_row else value)
        inputs[feed.spec.name] = _converted(feed, element[np.newaxis, ...] if step.max_rows else element, step)
    return _request(step, inputs, 1, parameters, source)


def split_rows(fed: StepInputs) -> tuple[StepInputs, int]:
    """Return the inputs with each row-wise input split into a list of rows, and the number of rows.

    The other inputs become tensors.

    Raises:
        InvalidArgument: two tensors have different numbers of rows, or the rows of a tensor that is used whole
            differ in shape.
    """
    split: list[tuple[Feed, Value]] = []
    first: tuple[Feed, int] | None = None
    for feed, value in fed:
        if not feed.by_row:
            split.append((feed, value))
            continue
        parts = ragged.rows(value)
        if first is not None and len(parts) != first[1]:
            raise InvalidArgument(
                f"tensor '{feed.tensor}' has {len(parts)} rows, and tensor '{first[0].tensor}' has {first[1]}: "
                "tensors that are given row by row must have equal numbers of rows"
            )
        first = first or (feed, len(parts))
        split.append((feed, parts))
    if first is None or not first[1]:
        return split, 0
    # Here, once, rather than for each row.
    return [(feed, value if feed.by_row else _tensor(feed, value)) for feed, value in split], first[1]


def outputs_without_rows(step: PlannedStep) -> list[Value]:
    """Return the outputs of a step whose inputs have no rows: the model is not called."""
    if step.step.each:
        return [[] for _ in step.outputs]
    return [values.empty(output.spec.datatype, (0, *output.spec.shape[1:])) for output in step.outputs]


def check_outputs(step: PlannedStep, outputs: Sequence[Value]) -> None:
    """Check the outputs of a step's model, and make their arrays read-only: several steps may share an array.

    Raises:
        Internal: an output contradicts the model's signature.
    """
    for expected, output in zip(step.outputs, outputs, strict=True):
        if reason := _misfit(expected.spec, output):
            raise Internal(f"output '{expected.spec.name}' {reason}")
        if is_resident(output):
            continue
        for array in ragged.arrays(output):
            array.flags.writeable = False


def row_outputs(step: PlannedStep, outputs: Sequence[Value]) -> list[Tensor]:
    """Return the outputs of a step's model for one row, without the batch dimension.

    Raises:
        Internal: an output contradicts the model's signature.
        InvalidArgument: an output of one row is ragged itself.
    """
    check_outputs(step, outputs)
    if step.max_rows:
        return [ragged.rows(value)[0] for value in outputs]
    return [ragged.dense(value, output.spec, "output") for output, value in zip(step.outputs, outputs, strict=True)]


def _misfit(spec: TensorSpec, value: Value) -> str:
    if isinstance(value, list):
        return next((f"has a row that {reason}" for row in value if (reason := _wrong(spec, row, spec.shape[1:]))), "")
    return _wrong(spec, value, spec.shape)


def _wrong(spec: TensorSpec, tensor: Tensor, shape: Sequence[int]) -> str:
    if tensor.dtype != spec.datatype.dtype:
        return f"is {tensor.dtype}, expected {spec.datatype.name}"
    # A runtime reports the shape () for a tensor whose shape the model's file does not state.
    if spec.shape and not fits(tensor.shape, shape):
        return f"has shape {shape_text(tensor.shape)}, expected {shape_text(shape)}"
    return ""


def _tensor(feed: Feed, value: Value) -> Tensor:
    if not ragged.is_even(value):
        raise InvalidArgument(
            f"input '{feed.spec.name}', tensor '{feed.tensor}': its rows have different shapes, which this model does "
            "not take: give it row by row (parameter each.<step>)"
        )
    return ragged.dense(value, feed.spec, "input")


def _converted(feed: Feed, value: Value, step: PlannedStep) -> Value:
    if not feed.spec.is_ragged:
        value = _tensor(feed, value)
    if feed.changes_text:
        value = _convert_text(feed, value, values.as_text if step.text else values.as_bytes)
    if reason := _misfit(feed.spec, value):
        raise InvalidArgument(f"input '{feed.spec.name}', tensor '{feed.tensor}' {reason}")
    return value


def _convert_text(feed: Feed, value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    try:
        return [change(row) for row in value] if isinstance(value, list) else change(value)
    except ValueError as err:
        raise InvalidArgument(f"input '{feed.spec.name}', tensor '{feed.tensor}': {err}") from err


def _rows(step: PlannedStep, inputs: Mapping[str, Value]) -> int:
    counts = {name: len(tensor) for name, tensor in inputs.items()}
    rows = next(iter(counts.values()), 1)
    if len(set(counts.values())) > 1:
        counted = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise InvalidArgument(f"its inputs have different numbers of rows: {counted}")
    if rows > step.max_rows:
        raise InvalidArgument(
            f"{rows} rows, its model takes {step.max_rows} at most: give them row by row (parameter each.<step>)"
        )
    return rows


def _request(
    step: PlannedStep,
    inputs: Mapping[str, Value],
    rows: int,
    parameters: Parameters,
    source: pb.ModelInferRequest | None,
) -> InferenceRequest:
    size = sum([ragged.size_bytes(value) for value in inputs.values()])
    key = key_of(inputs, step.outputs, step.signature)
    return InferenceRequest(inputs, step.outputs, rows, size, key, parameters, source)
