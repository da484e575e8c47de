"""Conversion of an original to a model folder in Triton's layout: export, run both models, compare.

Plans are tried in order (float32 first) until one has a small enough drift; the report says which one was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from shoal.convert import graph, sample
from shoal.convert.drift import Drift, Mismatch, OutputPair, measure
from shoal.convert.folder import write_beside
from shoal.convert.onnx_model import OnnxModel, cast
from shoal.convert.original import Original, Port, Tensors, row_count
from shoal.convert.verdict import Bounds, refusal
from shoal.errors import FailedPrecondition

_IN_ONE_FILE = 1_500_000_000
"""Size limit of weights inside the .onnx file, whose protobuf cannot exceed 2 GiB."""


@dataclass(frozen=True)
class Rows:
    """Rows of the comparison: those of a file, or random ones."""

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
class PlanOutcome:
    """Outcome of one plan."""

    plan: str
    drift: Drift | None
    """None: the outputs cannot be compared, or the exporter does not support the plan."""
    refused: str
    """Reason of the refusal; empty when accepted."""
    rounded: Drift | None = None
    """Drift for rows rounded to the converted model's input types; None when rounding changes no row."""


@dataclass(frozen=True)
class Conversion:
    """Report of a conversion."""

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
    """Source of the compared rows."""
    batches: Sequence[int]
    """Number of rows in each compared call."""
    bounds: Bounds
    tried: Sequence[PlanOutcome]
    """Outcomes of the plans; the last one is the plan of the written file."""
    is_batched: bool
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def chosen(self) -> PlanOutcome:
        return self.tried[-1]


def convert(original: Original, source: Path, name: str, into: Path, rows: Rows, bounds: Bounds) -> Conversion:
    """Write `into`/<name>/... and return the report. A refused model is written too; the caller decides about it.

    Raises:
        FailedPrecondition: no plan could be exported.
        InvalidArgument: the rows do not fit the model.
    """
    folder = into / name
    (folder / "1").mkdir(parents=True)
    file = folder / "1" / "model.onnx"
    calls = rows.calls(original)
    tried: list[PlanOutcome] = []
    converted: OnnxModel | None = None
    for plan in original.plans:
        try:
            _save(graph.with_sorted_opsets(original.export(plan)), file)
            converted = OnnxModel(file)
        except FailedPrecondition as err:
            tried.append(PlanOutcome(plan.name, None, err.message))
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


def _try(original: Original, converted: OnnxModel, plan: str, calls: Sequence[Tensors], bounds: Bounds) -> PlanOutcome:
    def drift(calls: Sequence[Tensors]) -> Drift:
        pairs = [OutputPair(original.predict(call), converted.predict(call)) for call in calls]
        return measure(pairs, scores=original.scores, tolerance=bounds.relative)

    try:
        exact = drift(calls)
        refused = refusal(exact, bounds)
        rounded_calls = [_rounded(call, original.inputs) for call in calls]
        rounded = drift(rounded_calls) if not _same(calls, rounded_calls) else None
    except Mismatch as err:
        return PlanOutcome(plan, None, str(err))
    if refused and rounded is not None and not refusal(rounded, bounds):
        refused += ": the cause is the rounding of the rows to the model's float32 inputs"
        refused += ": use --float64 to serve float64 inputs" if original.framework == "scikit-learn" else ""
    return PlanOutcome(plan, exact, refused, rounded)


def _written_last(tried: Sequence[PlanOutcome]) -> Sequence[PlanOutcome]:
    """Return the outcomes with the plan of the written file last: the last plan that could be exported."""
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
