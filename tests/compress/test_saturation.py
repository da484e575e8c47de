"""8-bit products of the models that we make cannot saturate, on any x86-64 processor.

No processor without VNNI is needed: the factors in the file decide whether a sum of 16 bits can overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from shoal.compress import int8
from shoal.compress.saturation import can_saturate, saturating_factors
from shoal.convert.onnx_model import OnnxModel
from tests.compress import models

ROWS = {"x": np.random.default_rng(1).standard_normal((20, 16)).astype("f4")}
IMAGES = {"image": np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype("f4")}


def attention(path: Path) -> Path:
    """x [N, 8, 16] -> y [N, 8, 8]: a product of two activations, each a product with weights."""
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal((16, 16)).astype("f4") for name in ("query", "key")}
    nodes = [
        helper.make_node("MatMul", ["x", "query"], ["q"]),
        helper.make_node("MatMul", ["x", "key"], ["k"]),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "turned"], ["y"]),
    ]
    return models.save(path, nodes, weights, ("x", [8, 16]), ("y", [8, 8]))


def gemm(path: Path) -> Path:
    """x [N, 16] -> y [N, 8], with the weights transposed."""
    weights = {"w": np.random.default_rng(0).standard_normal((8, 16)).astype("f4"), "b": np.ones(8, "f4")}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    return models.save(path, nodes, weights, ("x", [16]), ("y", [8]))


def lstm(path: Path) -> Path:
    """x [N, 1, 16] -> y [N, 1, 1, 8]."""
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal((1, 32, wide)).astype("f4") / 4 for name, wide in (("w", 16), ("r", 8))}
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=8)]
    return models.save(path, nodes, weights, ("x", [1, 16]), ("y", [1, 1, 8]))


SEQUENCES = {"x": np.random.default_rng(1).standard_normal((5, 1, 16)).astype("f4")}
WORDS = {"x": np.random.default_rng(1).standard_normal((4, 8, 16)).astype("f4")}


@pytest.mark.parametrize(
    ("make", "source", "call"),
    [
        (int8.dynamic, models.perceptron, ROWS),
        (int8.static, models.perceptron, ROWS),
        (int8.static, models.convolutions, IMAGES),
        (int8.dynamic, attention, WORDS),
        (int8.static, attention, WORDS),
        (int8.dynamic, gemm, ROWS),
        (int8.static, gemm, ROWS),
        (int8.dynamic, lstm, SEQUENCES),
    ],
)
def test_no_product_of_a_quantized_model_can_saturate(
    tmp_path: Path, make: Callable[..., list[str]], source: Callable[[Path], Path], call: dict[str, np.ndarray]
) -> None:
    file = source(tmp_path / "m.onnx")
    notes = make(file, tmp_path / "out.onnx", [call])
    made = onnx.load(tmp_path / "out.onnx")
    assert any(tensor.data_type == TensorProto.UINT8 and tensor.dims for tensor in made.graph.initializer)
    assert saturating_factors(made) == []
    assert notes == []
    want, got = OnnxModel(file).predict(call), OnnxModel(tmp_path / "out.onnx").predict(call)
    assert all(np.corrcoef(want[name].ravel(), got[name].ravel())[0, 1] > 0.99 for name in want)


def test_signed_weights_are_named_and_seven_bits_are_not(tmp_path: Path) -> None:
    file = models.perceptron(tmp_path / "m.onnx")
    options = {"per_channel": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(file, tmp_path / "eight.onnx", **options)
    quantize_dynamic(file, tmp_path / "seven.onnx", reduce_range=True, **options)
    assert saturating_factors(onnx.load(tmp_path / "eight.onnx")) == ["first_quantized", "last_quantized"]
    assert saturating_factors(onnx.load(tmp_path / "seven.onnx")) == []


def test_a_source_with_signed_weights_of_its_own_is_noted(tmp_path: Path) -> None:
    weights = {
        "bytes": np.full((16, 16), 100, "i1"),
        "scale": np.float32(0.01),
        "zero": np.int8(0),
        "last": np.random.default_rng(0).standard_normal((16, 4)).astype("f4"),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["bytes", "scale", "zero"], ["first"]),
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "last"], ["y"]),
    ]
    file = models.save(tmp_path / "m.onnx", nodes, weights, ("x", [16]), ("y", [4]))
    model = onnx.load(file)
    assert saturating_factors(model) == ["bytes"]
    (tmp_path / "same.onnx").write_bytes(file.read_bytes())
    (note,) = int8._portability(tmp_path / "same.onnx")
    assert "without VNNI, products with bytes can saturate" in note


def test_signed_activations_are_named() -> None:
    zero = numpy_helper.from_array(np.int8(0), "zero")
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["k"]),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [zero])
    assert saturating_factors(helper.make_model(graph)) == ["q"]


@pytest.mark.parametrize(
    ("weights", "saturates"),
    [
        # 255 * 128 = 32640 fits in 16 bits, 255 * 129 = 32895 does not.
        ([[64, 64, 0]], False),
        ([[65, 0, 64]], True),
        ([[-64, -64]], False),
        ([[-65, -64]], True),
        # Two of opposite signs take from each other, and two outputs are never added.
        ([[127, -127, 1]], False),
        ([[127], [127]], False),
        ([[127, 1, 0], [0, 100, 100]], True),
    ],
)
def test_saturation_is_decided_by_the_two_largest_weights_of_one_sign(
    weights: list[list[int]], saturates: bool
) -> None:
    array = np.array(weights, "i1")
    assert can_saturate(array) is saturates
    if array.shape[1] < 2:
        return
    # The instruction itself, on the worst activations: 255 where the weight helps, else 0.
    pairs = [row[[i, j]].astype(int) for row in array for i in range(len(row)) for j in range(i)]
    sums = [255 * pair[pair > 0].sum() for pair in pairs] + [255 * pair[pair < 0].sum() for pair in pairs]
    assert any(each != np.clip(each, -32768, 32767) for each in sums) is saturates
