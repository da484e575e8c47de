"""Calls of a step's model, made of what flows to it; and its answers, held against what the model promises.

Nothing that came from a model or a request is passed on unseen: a tensor that does not fit would fail a whole batch of
other callers' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from services.infer.ensembles import values
from services.infer.ensembles.plan import Feed, PlannedStep
from services.infer.error_text import written
from services.infer.requests import ragged
from services.infer.requests.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, key_of
from services.infer.requests.resident import is_resident
from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from shoal.errors import Internal, InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb

Given = Sequence[tuple[Feed, Value]]
"""What flows to a step; its optional inputs may be missing."""


def whole_call(
    step: PlannedStep, given: Given, asked: Parameters, source: pb.ModelInferRequest | None
) -> InferenceRequest | None:
    """The one call of a step; None when there are no rows to call its model with.

    Raises:
        InvalidArgument: a tensor is not what the model takes.
    """
    inputs = {feed.spec.name: _fed(feed, value, step) for feed, value in given}
    rows = _rows(step, inputs) if step.max_rows else 1
    return _call(step, inputs, rows, asked, source) if rows else None


def row_call(
    step: PlannedStep, given: Given, row: int, asked: Parameters, source: pb.ModelInferRequest | None
) -> InferenceRequest:
    """The call for one row of what is given row by row. Raises InvalidArgument as `whole_call` does."""
    inputs: dict[str, Value] = {}
    for feed, value in given:
        element = cast("Tensor", value[row] if feed.by_row else value)  # As `by_row` made it.
        inputs[feed.spec.name] = _fed(feed, element[np.newaxis, ...] if step.max_rows else element, step)
    return _call(step, inputs, 1, asked, source)


def by_row(given: Given) -> tuple[Given, int]:
    """The same, with the rows of what is given row by row in lists, and the rest as tensors; and how many rows.

    Raises:
        InvalidArgument: two tensors do not have the same number of rows, or rows differ where a tensor is needed.
    """
    split: list[tuple[Feed, Value]] = []
    first: tuple[Feed, int] | None = None
    for feed, value in given:
        if not feed.by_row:
            split.append((feed, value))
            continue
        parts = ragged.rows(value)
        if first is not None and len(parts) != first[1]:
            raise InvalidArgument(
                f"tensor '{feed.tensor}' has {len(parts)} rows, and tensor '{first[0].tensor}' has {first[1]}: "
                "what is given row by row must have as many"
            )
        first = first or (feed, len(parts))
        split.append((feed, parts))
    if first is None or not first[1]:
        return split, 0
    # Once, and not for each row.
    return [(feed, value if feed.by_row else _tensor(feed, value)) for feed, value in split], first[1]


def none(step: PlannedStep) -> list[Value]:
    """What a step gives when there are no rows to call its model with."""
    if step.step.each:
        return [[] for _ in step.wanted]
    return [values.empty(wanted.spec.datatype, (0, *wanted.spec.shape[1:])) for wanted in step.wanted]


def checked(step: PlannedStep, outputs: Sequence[Value]) -> None:
    """What a step's model gave, to be shared among those that take it.

    Raises:
        Internal: it is not what the model promises.
    """
    for wanted, output in zip(step.wanted, outputs, strict=True):
        if reason := _misfit(wanted.spec, output):
            raise Internal(f"output '{wanted.spec.name}' {reason}")
        if is_resident(output):
            continue
        for array in ragged.arrays(output):
            array.flags.writeable = False  # Several steps may look at it; none may write.


def row_checked(step: PlannedStep, outputs: Sequence[Value]) -> list[Tensor]:
    """What a step's model gave for one row: each output without a batch dimension.

    Raises:
        Internal: it is not what the model promises.
        InvalidArgument: an output has rows of different shapes itself, and a row cannot.
    """
    checked(step, outputs)
    if step.max_rows:
        return [ragged.rows(value)[0] for value in outputs]
    return [ragged.dense(value, wanted.spec, "output") for wanted, value in zip(step.wanted, outputs, strict=True)]


def _misfit(spec: TensorSpec, value: Value) -> str:
    if isinstance(value, list):
        return next((f"has a row that {reason}" for row in value if (reason := _wrong(spec, row, spec.shape[1:]))), "")
    return _wrong(spec, value, spec.shape)


def _wrong(spec: TensorSpec, tensor: Tensor, shape: Sequence[int]) -> str:
    if tensor.dtype != spec.datatype.dtype:
        return f"is {tensor.dtype}, expected {spec.datatype.name}"
    # The runtime says () of a tensor of which the model's file says nothing.
    if spec.shape and not fits(tensor.shape, shape):
        return f"has shape {written(tensor.shape)}, expected {written(shape)}"
    return ""


def _tensor(feed: Feed, value: Value) -> Tensor:
    if not ragged.is_even(value):
        raise InvalidArgument(
            f"input '{feed.spec.name}', tensor '{feed.tensor}': its rows have different shapes, which this model does "
            "not take: give it row by row (parameter each.<step>)"
        )
    return ragged.dense(value, feed.spec, "input")


def _fed(feed: Feed, value: Value, step: PlannedStep) -> Value:
    if not feed.spec.is_ragged:
        value = _tensor(feed, value)
    if feed.changes_text:
        value = _changed(feed, value, values.as_text if step.text else values.as_bytes)
    if reason := _misfit(feed.spec, value):
        raise InvalidArgument(f"input '{feed.spec.name}', tensor '{feed.tensor}' {reason}")
    return value


def _changed(feed: Feed, value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    try:
        return [change(row) for row in value] if isinstance(value, list) else change(value)
    except ValueError as err:
        raise InvalidArgument(f"input '{feed.spec.name}', tensor '{feed.tensor}': {err}") from err


def _rows(step: PlannedStep, inputs: Mapping[str, Value]) -> int:
    counts = {name: len(tensor) for name, tensor in inputs.items()}
    rows = next(iter(counts.values()), 1)
    if len(set(counts.values())) > 1:
        said = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise InvalidArgument(f"its inputs have different numbers of rows: {said}")
    if rows > step.max_rows:
        raise InvalidArgument(
            f"{rows} rows, its model takes {step.max_rows} at most: give them row by row (parameter each.<step>)"
        )
    return rows


def _call(
    step: PlannedStep, inputs: Mapping[str, Value], rows: int, asked: Parameters, source: pb.ModelInferRequest | None
) -> InferenceRequest:
    size = sum([ragged.size_bytes(value) for value in inputs.values()])
    return InferenceRequest(inputs, step.wanted, rows, size, key_of(inputs, step.wanted, step.signature), asked, source)
