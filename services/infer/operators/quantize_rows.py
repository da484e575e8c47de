"""Vectors as whole numbers of one byte with a scale for each: a quarter of the bytes to send and to keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kernels.quantize_rows import quantize_rows
from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value


class QuantizeRowsParameters(Parameters):
    """Of `quantize_rows`: it has none."""


class QuantizeRows:
    """FP32 [size] to INT8 [size] and the FP32 [1] to multiply them with."""

    is_batched = True
    only_computes = True
    inputs = (spec("values", "FP32", -1),)
    outputs = (spec("quantized", "INT8", -1), spec("scale", "FP32", 1))

    def __init__(self, parameters: QuantizeRowsParameters, setting: Setting) -> None:
        self._place = setting.place

    def run(self, inputs: Mapping[str, Value]) -> Results:
        quantized, scales = quantize_rows(self._place.put(inputs["values"]))
        give = self._place.give
        return Results({"quantized": give(quantized), "scale": give(scales.reshape(-1, 1))})

    def example(self) -> Mapping[str, Value]:
        return {"values": np.ones((1, 4), np.float32)}
