"""Operation `quantize_rows`: vectors as INT8 with one scale each, a quarter of the bytes to send and to store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kernels.quantize_rows import quantize_rows
from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value


class QuantizeRowsParameters(Parameters):
    """Parameters of `quantize_rows`: none."""


class QuantizeRows:
    """FP32 [size] to INT8 [size] and an FP32 [1] scale; value = quantized * scale."""

    is_batched = True
    only_computes = True
    inputs = (spec("values", "FP32", -1),)
    outputs = (spec("quantized", "INT8", -1), spec("scale", "FP32", 1))

    def __init__(self, parameters: QuantizeRowsParameters, context: OperationContext) -> None:
        self._device = context.device

    def run(self, inputs: Mapping[str, Value]) -> Results:
        quantized, scales = quantize_rows(self._device.to_device(inputs["values"]))
        to_value = self._device.to_value
        return Results({"quantized": to_value(quantized), "scale": to_value(scales.reshape(-1, 1))})

    def example(self) -> Mapping[str, Value]:
        return {"values": np.ones((1, 4), np.float32)}
