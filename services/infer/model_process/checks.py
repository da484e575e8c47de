"""Whether what a model gave is what it said it would give. A model in a process of its own is not taken at its word."""

from __future__ import annotations

from collections.abc import Sequence

from services.infer.error_text import written
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed


def check_outputs(call: InferenceRequest, outputs: Sequence[Tensor], rows: int | None = None) -> None:
    """`rows`: how many the first dimension must have; None: it is not known, or no batch.

    Raises:
        ModelFailed: names the output, what was expected and what came.
    """
    if len(outputs) != len(call.outputs):
        raise ModelFailed(f"the model process sent {len(outputs)} outputs, expected {len(call.outputs)}")
    for wanted, output in zip(call.outputs, outputs, strict=True):
        spec = wanted.spec
        if output.dtype != spec.datatype.dtype:
            raise ModelFailed(f"output '{spec.name}' is {output.dtype}, expected {spec.datatype.name}")
        if rows is not None and output.shape[:1] != (rows,):
            raise ModelFailed(f"output '{spec.name}' has shape {written(output.shape)} for {rows} rows")
        if spec.shape and not fits(output.shape, spec.shape):
            raise ModelFailed(f"output '{spec.name}' has shape {written(output.shape)}, expected {written(spec.shape)}")
