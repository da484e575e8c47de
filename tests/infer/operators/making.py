"""Sessions of operations as the runtime makes them, from a configuration's parameters and some files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from services.infer.operators.kernels_runtime import KernelsRuntime, OperationSession
from services.infer.requests import ragged
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.runtime import About, ExecutionPlacement, RowResults, SessionOptions
from shoal.inference.v2 import model_config_pb2 as pb


def session(
    folder: Path,
    operation: str,
    /,
    placements: Sequence[ExecutionPlacement] = (ExecutionPlacement("cpu"),),
    lanes: GpuStreams | None = None,
    **parameters: str,
) -> OperationSession:
    """A session of `operation`, whose files lie in `folder`; `lanes` are those of the GPUs."""
    said = {"operation": operation, **parameters}
    config = pb.ModelConfig(parameters={key: {"string_value": value} for key, value in said.items()})
    about = About("m", folder=folder, config=config)
    return KernelsRuntime(lanes=lanes).load(
        folder, SessionOptions(intra_op_threads=2, placements=placements, about=about)
    )


def run(made: OperationSession, **inputs: ragged.Value) -> dict[str, ragged.Value]:
    """All outputs by name; fails when a row is unfit."""
    results = rows(made, inputs)
    assert not results.unfit, results.unfit
    return dict(zip([spec.name for spec in made.outputs], results.values, strict=True))


def wrong(made: OperationSession, **inputs: ragged.Value) -> str:
    """What is wrong with the one row that came."""
    return rows(made, inputs).unfit[0]


def rows(made: OperationSession, inputs: Mapping[str, ragged.Value]) -> RowResults:
    given = {
        s.name: ragged.rows(inputs[s.name]) if s.is_ragged else inputs[s.name] for s in made.inputs if s.name in inputs
    }
    return made.run_rows(given, [spec.name for spec in made.outputs])


def check(made: OperationSession, outputs: Mapping[str, ragged.Value], count: int) -> None:
    """That outputs are what the signature promises."""
    for spec in made.outputs:
        value = outputs[spec.name]
        assert len(value) == count, spec.name
        assert isinstance(value, list) <= spec.is_ragged
        for row in ragged.rows(value):
            row = np.asarray(row)
            assert row.dtype == spec.datatype.dtype, spec.name
            assert len(row.shape) == len(spec.shape) - 1, spec.name
            assert all(want in (-1, got) for got, want in zip(row.shape, spec.shape[1:], strict=True)), spec.name
