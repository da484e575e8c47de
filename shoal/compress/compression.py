"""Compression of one model, with a report of the smaller size, the latency and the drift of the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from shoal.compress.latency import Latency, compare
from shoal.compress.method import Method
from shoal.compress.methods import compress
from shoal.compress.processor import Processor, this_processor
from shoal.convert.drift import Drift, Mismatch, OutputPair, measure
from shoal.convert.extras import versions
from shoal.convert.onnx_model import OnnxModel
from shoal.convert.original import Port, Tensors, row_count
from shoal.convert.sample import written
from shoal.convert.verdict import Bounds, refusal
from shoal.errors import FailedPrecondition

BATCHES = (1, 16)
"""Numbers of rows of the timed calls."""
CALIBRATION_ROWS = 1024


@dataclass(frozen=True)
class Rows:
    """Input rows for both models."""

    calls: Sequence[Tensors]
    source: str
    """`rows.npz`, `200 recorded requests`, `random`."""
    is_real: bool = True
    """False for random rows, whose drift says little about drift on real data."""


@dataclass(frozen=True)
class Compression:
    """Report on a compressed model."""

    source: str
    method: Method
    target: Path
    packages: Mapping[str, str]
    original_bytes: int
    compressed_bytes: int
    rows: str
    is_real: bool
    calibrated_on: int
    """Number of calibration rows of static int8; 0 for the other methods."""
    processor: Processor
    """Processor of the measurements of drift and latencies."""
    drift: Drift
    latencies: Sequence[Latency]
    threads: int
    bounds: Bounds | None
    """Accepted drift; None when the caller set no bounds."""
    refused: str
    """Reason why the drift exceeds the bounds; empty when it does not."""
    notes: Sequence[str]


def run(
    method: Method, source: Path, target: Path, rows: Rows, *, name: str, bounds: Bounds | None, threads: int
) -> Compression:
    """Write the compressed model to `target` and measure it beside `source`.

    For static int8, half of the rows calibrate the ranges, and the other half is for the report: drift on the
    calibration rows would be too small.

    Raises:
        FailedPrecondition: the method cannot be used on the model, or on these rows.
    """
    original = OnnxModel(source, threads=threads)
    if method is Method.STATIC and not rows.is_real:
        raise FailedPrecondition(
            "static int8 is calibrated on real rows: give --data, or name a model of a node that kept requests of it "
            "(`shoal jobs submit --keep-request`)"
        )
    calibration, checked = split(rows.calls) if method is Method.STATIC else ([], list(rows.calls))
    notes = compress(method, source, target, calibration)
    compressed = OnnxModel(target, threads=threads)
    if changed := _changed_ports(original, compressed):
        raise FailedPrecondition(f"{method} changed the inputs or outputs of the model: {changed}")
    try:
        pairs = [OutputPair(original.predict(call), compressed.predict(call)) for call in checked]
        drift = measure(pairs, scores=_scores(original))
    except Mismatch as err:
        raise FailedPrecondition(f"{method}: {err}") from err
    return Compression(
        source=name,
        method=method,
        target=target,
        packages=versions("onnxruntime", "onnx"),
        original_bytes=model_bytes(source),
        compressed_bytes=model_bytes(target),
        rows=rows.source,
        is_real=rows.is_real,
        calibrated_on=sum(row_count(call) for call in calibration),
        processor=this_processor(),
        drift=drift,
        latencies=_latencies(original, compressed, checked),
        threads=threads,
        bounds=bounds,
        refused="" if bounds is None else refusal(drift, bounds),
        notes=[*notes, *_batching(original, target)],
    )


def _batching(original: OnnxModel, target: Path) -> Iterator[str]:
    """Yield a note when the rows of a batch influence each other in the compressed model."""
    graph = onnx.load(target, load_external_data=False).graph
    if original.is_batched and any(node.op_type.startswith("DynamicQuantize") for node in graph.node):
        yield (
            "activations are quantized with one scale for all rows of a batch, so a row's results depend on the rows "
            "beside it: Shoal does not batch this model unless max_batch_size in config.pbtxt is set; "
            "static int8 and float16 batch safely"
        )


def split(calls: Sequence[Tensors]) -> tuple[list[Tensors], list[Tensors]]:
    """Return every other row for calibration, 1,024 at most, and the remaining rows for the check.

    Raises:
        FailedPrecondition: there is only one row.
    """
    calibration: list[Tensors] = []
    rest: list[Tensors] = []
    for call in calls:
        if row_count(call) > 1:
            halves = [{name: array[start::2] for name, array in call.items()} for start in (0, 1)]
        else:
            halves = [call, {}] if len(calibration) <= len(rest) else [{}, call]
        if sum(map(row_count, calibration)) + row_count(halves[0] or call) > CALIBRATION_ROWS:
            halves = [{}, call]
        calibration += [halves[0]] if halves[0] else []
        rest += [halves[1]] if halves[1] else []
    if not calibration or not rest:
        raise FailedPrecondition("static int8 needs at least 2 rows: one to calibrate on, one to check on")
    return calibration, rest


def random_rows(inputs: Sequence[Port], *, is_batched: bool, seed: int) -> Rows:
    """Return random rows for a model without data: standard normal floats, and integers 0 and 1.

    Raises:
        FailedPrecondition: an input is text, or has an unknown size.
    """
    generator = np.random.default_rng(seed)
    sizes = (1, 2, 7, 54) if is_batched else (1,) * 8
    calls = [_random_call(inputs, rows, generator, is_batched=is_batched) for rows in sizes]
    return Rows(calls, "random", is_real=False)


def _random_call(inputs: Sequence[Port], rows: int, generator: np.random.Generator, *, is_batched: bool) -> Tensors:
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


def model_bytes(file: Path) -> int:
    """Return the size of an .onnx file and its external weight files."""
    return file.stat().st_size + sum(side.stat().st_size for side in file.parent.glob(f"{file.name}*data"))


def _scores(model: OnnxModel) -> frozenset[str]:
    return frozenset(
        port.name
        for port in model.outputs
        if port.dtype.kind == "f" and len(port.shape) == 2 and (port.shape[1] or 0) > 1
    )


def _changed_ports(original: OnnxModel, compressed: OnnxModel) -> str:
    before = [f"{port.name} {port.dtype.name}" for port in (*original.inputs, *original.outputs)]
    after = [f"{port.name} {port.dtype.name}" for port in (*compressed.inputs, *compressed.outputs)]
    return "" if before == after else f"{', '.join(before)} became {', '.join(after)}"


def _latencies(original: OnnxModel, compressed: OnnxModel, calls: Sequence[Tensors]) -> list[Latency]:
    if not original.is_batched:
        return [compare(original, compressed, calls[0], row_count(calls[0]))]
    return [compare(original, compressed, _rows_of(calls, rows), rows) for rows in BATCHES]


def _rows_of(calls: Sequence[Tensors], rows: int) -> Tensors:
    """Return a call of `rows` rows: the rows of the largest call, repeated."""
    largest = max(calls, key=row_count)
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in largest.items()}
