"""An original becomes a model folder in Triton's layout, or is refused: export, ask both, compare.

A plan (float32 first) whose answers are too far off makes way for the next; the report says which was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from shoal.convert import graph, sample
from shoal.convert.drift import Answers, Drift, Mismatch, measure
from shoal.convert.folder import write_beside
from shoal.convert.onnx_model import OnnxModel, cast
from shoal.convert.original import Original, Port, Tensors, row_count
from shoal.convert.verdict import Bounds, refusal
from shoal.errors import FailedPrecondition

_IN_ONE_FILE = 1_500_000_000
"""Bytes of weights that stay in the .onnx file: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class Rows:
    """What both models are asked: a file's rows, or random ones."""

    file: Path | None = None
    seed: int = 0

    def calls(self, original: Original) -> list[Tensors]:
        if self.file is not None:
            arrays = sample.read(self.file, original.inputs)
            return sample.calls(arrays, original.inputs, is_batched=original.is_batched)
        generator = np.random.default_rng(self.seed)
        return [original.draw(rows, generator) for rows in original.batches]

    def __str__(self) -> str:
        return f"random, seed {self.seed}" if self.file is None else self.file.name


@dataclass(frozen=True)
class Tried:
    """What became of one plan."""

    plan: str
    drift: Drift | None
    """None: its answers cannot be compared, or the exporter cannot do it."""
    refused: str
    """Why; empty when it is accepted."""
    rounded: Drift | None = None
    """Against the original on rows that are rounded to what the converted model takes; None where that changes none."""


@dataclass(frozen=True)
class Conversion:
    """What was made of a file."""

    source: Path
    framework: str
    packages: Mapping[str, str]
    name: str
    folder: Path
    """The model's folder: `<name>/1/model.onnx` and what belongs to it."""
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    size_bytes: int
    rows: str
    """Where the rows of the check came from."""
    batches: Sequence[int]
    """Rows of each call of the check."""
    bounds: Bounds
    tried: Sequence[Tried]
    """The plans in their order; the last one stands."""
    is_batched: bool
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def stands(self) -> Tried:
        return self.tried[-1]


def convert(original: Original, source: Path, name: str, into: Path, rows: Rows, bounds: Bounds) -> Conversion:
    """Writes `into`/<name>/... and says how near it is to `original`. What is refused is written too: the caller
    decides.

    Raises:
        FailedPrecondition: no plan could be exported.
        InvalidArgument: the rows do not fit the model.
    """
    folder = into / name
    (folder / "1").mkdir(parents=True)
    file = folder / "1" / "model.onnx"
    calls = rows.calls(original)
    tried: list[Tried] = []
    converted: OnnxModel | None = None
    for plan in original.plans:
        try:
            _save(graph.settled(original.export(plan)), file)
            converted = OnnxModel(file)
        except FailedPrecondition as err:
            tried.append(Tried(plan.name, None, err.message))
            continue
        tried.append(_try(original, converted, plan.name, calls, bounds))
        if not tried[-1].refused:
            break
    if converted is None:
        raise FailedPrecondition(f"{source.name}: {tried[-1].refused}")
    write_beside(folder, original, converted)
    return Conversion(
        source=source,
        framework=original.framework,
        packages=original.packages,
        name=name,
        folder=folder,
        inputs=converted.inputs,
        outputs=converted.outputs,
        size_bytes=sum(each.stat().st_size for each in (folder / "1").iterdir()),
        rows=str(rows),
        batches=[row_count(call) for call in calls],
        bounds=bounds,
        tried=_written_last(tried),
        is_batched=original.is_batched,
        notes=original.notes,
    )


def _try(original: Original, converted: OnnxModel, plan: str, calls: Sequence[Tensors], bounds: Bounds) -> Tried:
    def drift(asked: Sequence[Tensors]) -> Drift:
        answers = [Answers(original.answer(call), converted.answer(call)) for call in asked]
        return measure(answers, scores=original.scores, tolerance=bounds.relative)

    try:
        seen = drift(calls)
        refused = refusal(seen, bounds)
        rounded_calls = [_rounded(call, original.inputs) for call in calls]
        rounded = drift(rounded_calls) if not _same(calls, rounded_calls) else None
    except Mismatch as err:
        return Tried(plan, None, str(err))
    if refused and rounded is not None and not refusal(rounded, bounds):
        refused += ": only because its inputs are float32, and the data are not"
        refused += ": --float64 takes them as they are" if original.framework == "scikit-learn" else ""
    return Tried(plan, seen, refused, rounded)


def _written_last(tried: Sequence[Tried]) -> Sequence[Tried]:
    """The plan whose file lies there at the end: the last that could be exported."""
    return sorted(tried, key=lambda each: each.drift is not None)


def _rounded(call: Tensors, inputs: Sequence[Port]) -> Tensors:
    return {port.name: cast(call[port.name], port) for port in inputs}


def _same(some: Sequence[Tensors], others: Sequence[Tensors]) -> bool:
    return all(
        np.array_equal(array, other[name], equal_nan=array.dtype.kind == "f")
        for call, other in zip(some, others, strict=True)
        for name, array in call.items()
        if array.dtype.kind == "f"
    )


def _save(model: onnx.ModelProto, file: Path) -> None:
    for old in file.parent.iterdir():
        old.unlink()
    big = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _IN_ONE_FILE
    if big:
        onnx.save_model(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    else:
        onnx.save_model(model, file)
