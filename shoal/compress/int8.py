"""Quantization to int8 with ONNX Runtime's tools.

Static quantization scales weights per channel, and activations by their ranges on the calibration rows. The result has
quantize and dequantize pairs around each operator
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). For some models with reshaped biases,
the per-channel output of ONNX Runtime 1.32's tool does not load. Such a model is quantized again per tensor.

Weights and activations are unsigned bytes; weights have the zero point 128. Products of signed weights saturate on
x86-64 processors without VNNI (saturation.py), and 7 bits would cost accuracy on all processors.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from shoal.compress.saturation import saturating_factors
from shoal.convert.onnx_model import OnnxModel, cast
from shoal.convert.original import Tensors
from shoal.errors import FailedPrecondition

# Unsigned weights with the zero point 128: ONNX Runtime's convolutions accept one zero point for all channels.
_CENTRED = {"WeightSymmetric": True}

DYNAMIC_OPERATORS = ("MatMul", "Gemm", "Gather", "LSTM", "GRU", "Attention", "EmbedLayerNormalization")
"""Operators to quantize. No Conv: ONNX Runtime runs a dynamically quantized convolution slower than a float one."""


def dynamic(source: Path, target: Path, calls: Sequence[Tensors]) -> list[str]:
    """Write `target` with int8 weights.

    Raises:
        FailedPrecondition: the model has no operator with weights that can be quantized.
    """
    with _prepared(source, target.parent) as prepared, _quiet():
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=list(DYNAMIC_OPERATORS),
            per_channel=True,
            weight_type=QuantType.QUInt8,
            # A MatMul of two activations has no weights. onnx does not infer the results of operators of ai.onnx.ml,
            # which are float32.
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT, **_CENTRED},
        )
    _check_gain(source, target, "it has no MatMul, Gemm, Gather, LSTM, GRU or Attention with fixed weights: try static")
    _make_lstm_weights_unsigned(target)
    return _portability(target)


STATIC_OPERATORS = ("Conv", "MatMul", "Gemm")
"""Operators to quantize: only those with weights. With others too, the tool fails on the activations of some models."""


def static(source: Path, target: Path, calls: Sequence[Tensors]) -> list[str]:
    """Write `target` with int8 weights and activations.

    Raises:
        FailedPrecondition: the model has no operator with weights that can be quantized.
    """
    notes = []
    with _prepared(source, target.parent) as prepared, _quiet():
        try:
            _quantize(source, prepared, target, calls, per_channel=True)
            OnnxModel(target).predict(calls[0])
        # The tool, and ONNX Runtime with the tool's output, raise errors of any class.
        except Exception:
            _quantize(source, prepared, target, calls, per_channel=False)
            notes.append(
                "weights were quantized per tensor: ONNX Runtime's tool cannot quantize this model per channel"
            )
    _check_gain(source, target, "it has no Conv, MatMul or Gemm with fixed weights")
    return notes + _portability(target)


def _quantize(source: Path, prepared: Path, target: Path, calls: Sequence[Tensors], *, per_channel: bool) -> None:
    rows = _Rows(source, calls)
    quantize_static(
        prepared,
        target,
        rows,
        op_types_to_quantize=list(STATIC_OPERATORS),
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QUInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, **_CENTRED},
    )


class _Rows(CalibrationDataReader):
    """Calibration reader that returns one call after the other."""

    def __init__(self, source: Path, calls: Sequence[Tensors]) -> None:
        inputs = OnnxModel(source).inputs
        self._calls = iter([{port.name: cast(call[port.name], port) for port in inputs} for call in calls])

    def get_next(self) -> Tensors | None:
        return next(self._calls, None)


@contextmanager
def _prepared(source: Path, within: Path) -> Iterator[Path]:
    """Yield a temporary copy of the model with inferred shapes and fused operators, as the tools require.

    The copy lies in `within`, a temporary folder of the caller, which is removed even after a kill.
    """
    with tempfile.TemporaryDirectory(prefix="prepared-", dir=within) as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Symbolic inference needs sympy, and finds more shapes only in transformer models.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        yield prepared


def _check_gain(source: Path, target: Path, otherwise: str) -> None:
    kinds = {node.op_type for node in onnx.load(target, load_external_data=False).graph.node}
    if not any("Linear" in kind or kind.endswith("Integer") or kind.startswith("DynamicQuantize") for kind in kinds):
        raise FailedPrecondition(f"nothing of {source.name} was quantized: {otherwise}")


# Inputs of DynamicQuantizeLSTM (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
_LSTM_WEIGHTS, _LSTM_ZERO_POINTS = (1, 2), (9, 11)


def _make_lstm_weights_unsigned(target: Path) -> None:
    """Add 128 to the weights and zero points of each DynamicQuantizeLSTM, which the tool always makes signed."""
    model = onnx.load(target)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        node.input[index]
        for node in model.graph.node
        if node.op_type == "DynamicQuantizeLSTM"
        for index in (*_LSTM_WEIGHTS, *_LSTM_ZERO_POINTS)
    }
    if not names:
        return
    for name in names:
        signed = numpy_helper.to_array(initializers[name])
        unsigned = (signed.astype(np.int16) + 128).astype(np.uint8)
        initializers[name].CopyFrom(numpy_helper.from_array(unsigned, name))
    onnx.save_model(model, target)


def _portability(target: Path) -> list[str]:
    """Return a note about factors that can saturate. The tools make none, but the source model may contain some."""
    factors = saturating_factors(onnx.load(target))
    if not factors:
        return []
    listed = ", ".join(factors[:3]) + (f" and {len(factors) - 3} others" if len(factors) > 3 else "")
    return [
        f"outputs depend on the processor: without VNNI, products with {listed} can saturate. The source has these "
        "signed 8-bit factors already: quantize the float model instead"
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tools' messages to the root logger and to ONNX Runtime's logger."""
    onnxruntime.set_default_logger_severity(4)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
