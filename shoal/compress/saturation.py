"""Check that 8-bit products of a model cannot saturate. Such a model has equal outputs on every x86-64 processor.

ONNX Runtime multiplies activations as unsigned bytes. For signed weights, a processor without VNNI uses `vpmaddubsw`,
which adds two neighbouring products in 16 bits and saturates:

    255 * 127 + 255 * 127 = 64770, saturated to 32767

VNNI adds four products in 32 bits, and is exact. For unsigned weights, ONNX Runtime widens both sides to 16 bits and
uses `vpmaddwd`, which adds in 32 bits: exact on every processor. Signed weights of 7 bits (-64 to 64) are exact, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from shoal.convert.original import Array

_ACTIVATION = 255
_LOWEST, _HIGHEST = -(2**15), 2**15 - 1

# For each operator that multiplies, the inputs at which signed bytes stay signed. ONNX Runtime makes the first factor
# unsigned.
_SECOND_FACTOR = {
    "MatMul": (1,),
    "Gemm": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "DynamicQuantizeMatMul": (1,),
    "QLinearMatMul": (3,),
    "QGemm": (3,),
    "QAttention": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "ConvInteger": (1,),
    "QLinearConv": (3,),
}


def saturating_factors(model: onnx.ModelProto) -> list[str]:
    """Return the names of the signed 8-bit weights and activations of `model` whose products can saturate.

    An empty list means equal outputs on every x86-64 processor, except for the rounding of float arithmetic.
    """
    signed = {each.name: each for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8}
    # ONNX Runtime fuses a float operator and the DequantizeLinear before it to one operator on bytes.
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, None] = {}
    for node in model.graph.node:
        for name in _second_factors(node):
            source = dequantized.get(name)
            factor = name if source is None else source.input[0]
            if factor in signed:
                if can_saturate(_by_output(node, numpy_helper.to_array(signed[factor]))):
                    found[factor] = None
            # The values of activations are unknown: signed ones, which have a signed zero point, may have any value.
            elif source is not None and len(source.input) > 2 and source.input[2] in signed:
                found[factor] = None
    return list(found)


def can_saturate(by_output: Array) -> bool:
    """Return True when two weights of one row of `by_output`, INT8 [outputs, weights], can saturate.

    The kernel's pairs of weights depend on the operator and its packing, so all pairs are considered.
    """
    if by_output.shape[1] < 2:
        return False
    ordered = np.sort(by_output.astype(np.int64), axis=1)
    lowest, highest = ordered[:, :2].clip(max=0).sum(axis=1), ordered[:, -2:].clip(min=0).sum(axis=1)
    return bool((_ACTIVATION * lowest < _LOWEST).any() or (_ACTIVATION * highest > _HIGHEST).any())


def _second_factors(node: onnx.NodeProto) -> Iterator[str]:
    for index in _SECOND_FACTOR.get(node.op_type, ()):
        if index < len(node.input):
            yield node.input[index]


def _by_output(node: onnx.NodeProto, weights: Array) -> Array:
    """Return `weights` as [outputs, weights of one output]."""
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        return weights.reshape(weights.shape[0], -1)
    if node.op_type == "ConvTranspose" or weights.ndim < 2:
        return weights.reshape(1, -1)
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    columns = weights if transposed else np.swapaxes(weights, -1, -2)
    return columns.reshape(-1, columns.shape[-1])
