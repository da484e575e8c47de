"""A model becomes a smaller one, and a report says what that costs and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.compress.latency import Latency, compare
from shoal.compress.method import Method
from shoal.compress.methods import compress
from shoal.compress.processor import Processor, this_processor
from shoal.convert.drift import Answers, Drift, Mismatch, measure
from shoal.convert.extras import versions
from shoal.convert.onnx_model import OnnxModel
from shoal.convert.original import Port, Tensors, row_count
from shoal.convert.sample import written
from shoal.convert.verdict import Bounds, refusal
from shoal.errors import FailedPrecondition

BATCHES = (1, 16)
"""Rows of the calls that are timed."""
CALIBRATION_ROWS = 1024


@dataclass(frozen=True)
class Rows:
    """What both models are asked."""

    calls: Sequence[Tensors]
    source: str
    """`rows.npz`, `200 recorded requests`, `random`."""
    is_real: bool = True
    """False: they are random, and drift on them says little about drift on data."""


@dataclass(frozen=True)
class Compression:
    """What was made of a model."""

    source: str
    method: Method
    target: Path
    packages: Mapping[str, str]
    original_bytes: int
    compressed_bytes: int
    rows: str
    is_real: bool
    calibrated_on: int
    """Rows that static int8 took its ranges from; 0 for the other methods."""
    processor: Processor
    """The processor that drift and latencies were measured on."""
    drift: Drift
    latencies: Sequence[Latency]
    threads: int
    bounds: Bounds | None
    """None: nobody said what is too much."""
    refused: str
    """Why it is too much; empty when it is not."""
    notes: Sequence[str]


def run(
    method: Method, source: Path, target: Path, rows: Rows, *, name: str, bounds: Bounds | None, threads: int
) -> Compression:
    """Writes `target` and measures it beside `source`.

    Half of the rows are for the ranges of static int8, the other half for the report: drift on rows that the ranges
    were taken from would be flattered.

    Raises:
        FailedPrecondition: the method does not suit the model.
    """
    original = OnnxModel(source, threads=threads)
    if method is Method.STATIC and not rows.is_real:
        raise FailedPrecondition(
            "static int8 takes ranges from real rows: give --data, or name a model of a node that kept requests of it "
            "(`shoal jobs submit --keep-request`)"
        )
    calibration, checked = split(rows.calls) if method is Method.STATIC else ([], list(rows.calls))
    notes = compress(method, source, target, calibration)
    compressed = OnnxModel(target, threads=threads)
    if changed := _changed(original, compressed):
        raise FailedPrecondition(f"{method} changed what the model takes or gives: {changed}")
    try:
        answers = [Answers(original.answer(call), compressed.answer(call)) for call in checked]
        drift = measure(answers, scores=_scores(original))
    except Mismatch as err:
        raise FailedPrecondition(f"{method}: {err}") from err
    return Compression(
        source=name,
        method=method,
        target=target,
        packages=versions("onnxruntime", "onnx"),
        original_bytes=weight(source),
        compressed_bytes=weight(target),
        rows=rows.source,
        is_real=rows.is_real,
        calibrated_on=sum(row_count(call) for call in calibration),
        processor=this_processor(),
        drift=drift,
        latencies=_latencies(original, compressed, checked),
        threads=threads,
        bounds=bounds,
        refused="" if bounds is None else refusal(drift, bounds),
        notes=notes,
    )


def split(calls: Sequence[Tensors]) -> tuple[list[Tensors], list[Tensors]]:
    """Every other row for calibration, 1,024 at most; the rest for the check.

    Raises:
        FailedPrecondition: there is only one.
    """
    taken: list[Tensors] = []
    rest: list[Tensors] = []
    for call in calls:
        if row_count(call) > 1:
            halves = [{name: array[start::2] for name, array in call.items()} for start in (0, 1)]
        else:
            halves = [call, {}] if len(taken) <= len(rest) else [{}, call]
        if sum(map(row_count, taken)) + row_count(halves[0] or call) > CALIBRATION_ROWS:
            halves = [{}, call]
        taken += [halves[0]] if halves[0] else []
        rest += [halves[1]] if halves[1] else []
    if not taken or not rest:
        raise FailedPrecondition("static int8 needs at least 2 rows: one to take ranges from, one to check on")
    return taken, rest


def random_rows(inputs: Sequence[Port], *, is_batched: bool, seed: int) -> Rows:
    """Rows for a model of which there are no data: standard normal numbers; whole numbers 0 and 1.

    Raises:
        FailedPrecondition: an input is text, or has no size to be guessed.
    """
    generator = np.random.default_rng(seed)
    sizes = (1, 2, 7, 54) if is_batched else (1,) * 8
    return Rows([_drawn(inputs, rows, generator, is_batched=is_batched) for rows in sizes], "random", is_real=False)


def _drawn(inputs: Sequence[Port], rows: int, generator: np.random.Generator, *, is_batched: bool) -> Tensors:
    call = {}
    for port in inputs:
        shape = [rows if is_batched and n == 0 else size for n, size in enumerate(port.shape)]
        if port.dtype.kind == "O" or None in shape:
            raise FailedPrecondition(f"no random rows for the input {port.name}, {written(port)}: give --data")
        if port.dtype.kind == "f":
            call[port.name] = generator.standard_normal(shape).astype(port.dtype)  # type: ignore[arg-type]
        else:
            call[port.name] = generator.integers(0, 2, shape).astype(port.dtype)  # type: ignore[arg-type]
    return call


def weight(file: Path) -> int:
    """Bytes of an .onnx file with the weights beside it."""
    return file.stat().st_size + sum(side.stat().st_size for side in file.parent.glob(f"{file.name}*data"))


def _scores(model: OnnxModel) -> frozenset[str]:
    return frozenset(
        port.name
        for port in model.outputs
        if port.dtype.kind == "f" and len(port.shape) == 2 and (port.shape[1] or 0) > 1
    )


def _changed(original: OnnxModel, compressed: OnnxModel) -> str:
    before = [f"{port.name} {port.dtype.name}" for port in (*original.inputs, *original.outputs)]
    after = [f"{port.name} {port.dtype.name}" for port in (*compressed.inputs, *compressed.outputs)]
    return "" if before == after else f"{', '.join(before)} became {', '.join(after)}"


def _latencies(original: OnnxModel, compressed: OnnxModel, calls: Sequence[Tensors]) -> list[Latency]:
    if not original.is_batched:
        return [compare(original, compressed, calls[0], row_count(calls[0]))]
    return [compare(original, compressed, _rows_of(calls, rows), rows) for rows in BATCHES]


def _rows_of(calls: Sequence[Tensors], rows: int) -> Tensors:
    """A call of `rows` rows, made of the largest, again and again."""
    largest = max(calls, key=row_count)
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in largest.items()}
