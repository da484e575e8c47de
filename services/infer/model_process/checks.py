"""Check of a model's outputs against its declaration: a model process is not trusted."""

from __future__ import annotations

from collections.abc import Sequence

from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from shoal.oip.tensors import shape_text


def check_outputs(request: InferenceRequest, outputs: Sequence[Tensor], rows: int | None = None) -> None:
    """Compare number, datatype and shape of `outputs` with the requested outputs.

    Args:
        rows: the size that the first dimension must have; None: unknown, or there is no batch dimension.

    Raises:
        ModelFailed: names the output, the expected and the received value.
    """
    if len(outputs) != len(request.outputs):
        raise ModelFailed(f"the model process sent {len(outputs)} outputs, expected {len(request.outputs)}")
    for requested, output in zip(request.outputs, outputs, strict=True):
        spec = requested.spec
        if output.dtype != spec.datatype.dtype:
            raise ModelFailed(f"output '{spec.name}' is {output.dtype}, expected {spec.datatype.name}")
        if rows is not None and output.shape[:1] != (rows,):
            raise ModelFailed(f"output '{spec.name}' has shape {shape_text(output.shape)} for {rows} rows")
        if spec.shape and not fits(output.shape, spec.shape):
            raise ModelFailed(
                f"output '{spec.name}' has shape {shape_text(output.shape)}, expected {shape_text(spec.shape)}"
            )
