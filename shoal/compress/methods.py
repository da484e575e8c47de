"""Compression methods by name. Each reads one .onnx file and writes another with the same inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from shoal.compress import int8, pruning
from shoal.compress.method import Method
from shoal.convert.original import Tensors
from shoal.errors import FailedPrecondition


def compress(method: Method, source: Path, target: Path, calls: Sequence[Tensors]) -> list[str]:
    """Write the compressed model to `target`, and return notes for the report.

    `calls` are the calibration rows of static int8.

    Raises:
        FailedPrecondition: the method cannot be used on this model; the message says why.
    """
    try:
        return _METHODS[method](source, target, calls)
    except FailedPrecondition:
        raise
    # ONNX Runtime's tools raise errors of any class.
    except Exception as err:
        message = " ".join(str(err).split())[:400]
        raise FailedPrecondition(f"{method}: ONNX Runtime's tool failed: {type(err).__name__}: {message}") from err


def _float16(source: Path, target: Path, calls: Sequence[Tensors]) -> list[str]:
    onnx.save_model(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)
    return ["ONNX Runtime computes most of float16 in float32 on a CPU: expect less memory on it, not less time"]


_METHODS: dict[Method, Callable[[Path, Path, Sequence[Tensors]], list[str]]] = {
    Method.DYNAMIC: int8.dynamic,
    Method.STATIC: int8.static,
    Method.FLOAT16: _float16,
    Method.PRUNE: pruning.prune,
}
