"""int8, by ONNX Runtime's own tools.

Static: weights by channel, activations by the range that each took on the rows given, as quantize and dequantize pairs
around each operator (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). ONNX Runtime
1.32's tool makes models that do not load of some whose biases are reshaped when weights go by channel, so such a model
is made anew by tensor.

Weights and activations are unsigned bytes; weights have the zero point 128. Products of signed weights saturate on
x86-64 processors without VNNI (saturation.py), and 7 bits would cost accuracy everywhere.
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

_CENTRED = {"WeightSymmetric": True}
"""Unsigned weights with the zero point 128. ONNX Runtime's convolutions take one zero point for all channels."""

DYNAMIC_OPERATORS = ("MatMul", "Gemm", "Gather", "LSTM", "GRU", "Attention", "EmbedLayerNormalization")
"""Without Conv: ONNX Runtime runs a dynamically quantized convolution slower than a float one."""


def dynamic(source: Path, target: Path, calls: Sequence[Tensors]) -> list[str]:
    """Writes `target` with int8 weights. Raises FailedPrecondition when nothing in it can be quantized so."""
    with _prepared(source) as prepared, _quiet():
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=list(DYNAMIC_OPERATORS),
            per_channel=True,
            weight_type=QuantType.QUInt8,
            # A MatMul of two activations has no weights to make smaller. Behind operators of ai.onnx.ml, whose results
            # onnx does not infer, numbers are float32.
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT, **_CENTRED},
        )
    _check_gain(source, target, "it has no MatMul, Gemm, Gather, LSTM, GRU or Attention with fixed weights: try static")
    _make_lstm_weights_unsigned(target)
    return _portability(target)


STATIC_OPERATORS = ("Conv", "MatMul", "Gemm")
"""Those with weights. The tool would do others too, and fails on the activations of some models."""


def static(source: Path, target: Path, calls: Sequence[Tensors]) -> list[str]:
    """Writes `target` with int8 weights and activations. Raises FailedPrecondition when there are no rows, or no
    gain."""
    notes = []
    with _prepared(source) as prepared, _quiet():
        try:
            _quantize(source, prepared, target, calls, per_channel=True)
            OnnxModel(target).answer(calls[0])
        except Exception:  # Whatever the tool, or ONNX Runtime with what it made, comes across.
            _quantize(source, prepared, target, calls, per_channel=False)
            notes.append("weights were quantized by tensor: ONNX Runtime's tool cannot do this model by channel")
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
    """Calls, one after the other, as the calibration wants them."""

    def __init__(self, source: Path, calls: Sequence[Tensors]) -> None:
        inputs = OnnxModel(source).inputs
        self._calls = iter([{port.name: cast(call[port.name], port) for port in inputs} for call in calls])

    def get_next(self) -> Tensors | None:
        return next(self._calls, None)


@contextmanager
def _prepared(source: Path) -> Iterator[Path]:
    """The model with its shapes inferred and its operators fused, as the tools want it."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        # The symbolic inference needs sympy, and finds more shapes only in models of transformers.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        yield prepared


def _check_gain(source: Path, target: Path, otherwise: str) -> None:
    kinds = {node.op_type for node in onnx.load(target, load_external_data=False).graph.node}
    if not any("Linear" in kind or kind.endswith("Integer") or kind.startswith("DynamicQuantize") for kind in kinds):
        raise FailedPrecondition(f"nothing of {source.name} was quantized: {otherwise}")


_LSTM_WEIGHTS, _LSTM_ZERO_POINTS = (1, 2), (9, 11)
"""Inputs of DynamicQuantizeLSTM (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md)."""


def _make_lstm_weights_unsigned(target: Path) -> None:
    """Add 128 to the weights and zero points of each DynamicQuantizeLSTM: the tool makes them signed in any case."""
    model = onnx.load(target)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        node.input[place]
        for node in model.graph.node
        if node.op_type == "DynamicQuantizeLSTM"
        for place in (*_LSTM_WEIGHTS, *_LSTM_ZERO_POINTS)
    }
    if not names:
        return
    for name in names:
        signed = numpy_helper.to_array(initializers[name])
        unsigned = (signed.astype(np.int16) + 128).astype(np.uint8)
        initializers[name].CopyFrom(numpy_helper.from_array(unsigned, name))
    onnx.save_model(model, target)


def _portability(target: Path) -> list[str]:
    """Return a note about factors that can saturate: the tools make none, but the source may have had some."""
    factors = saturating_factors(onnx.load(target))
    if not factors:
        return []
    named = ", ".join(factors[:3]) + (f" and {len(factors) - 3} others" if len(factors) > 3 else "")
    return [
        f"answers depend on the processor: without VNNI, products with {named} can saturate. The source has these "
        "signed 8-bit factors already: quantize the float model instead"
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tools' advice to their callers, which goes to the root logger and to ONNX Runtime's."""
    onnxruntime.set_default_logger_severity(4)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
