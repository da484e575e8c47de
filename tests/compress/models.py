"""Small ONNX models to make smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def perceptron(path: Path, *, wide: int = 64, dead: bool = False) -> Path:
    """x [N, 16] -> scores [N, 5], by way of `wide` hidden units. `dead`: with parts that nobody reads."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((16, wide)).astype("f4") / 4
    last = generator.standard_normal((wide, 5)).astype("f4") / 8
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "last"], ["scores"]),
    ]
    weights = {"first": first, "last": last}
    if dead:
        nodes += [
            helper.make_node("MatMul", ["x", "copy"], ["again"]),
            helper.make_node("Relu", ["again"], ["nowhere"]),
            helper.make_node("Add", ["hidden", "bias"], ["shifted"]),
            helper.make_node("Add", ["shifted", "bias_too"], ["twice"]),
        ]
        bias = np.full(wide, 0.5, "f4")
        weights |= {"copy": first, "unread": np.ones(1000, "f4"), "bias": bias, "bias_too": bias}
        nodes[1] = helper.make_node("Relu", ["twice"], ["active"])
        nodes[1], nodes[2], nodes[3:] = nodes[5], nodes[6], [nodes[1], nodes[2], *nodes[3:5]]
    return save(path, nodes, weights, ("x", [16]), ("scores", [5]))


def convolutions(path: Path) -> Path:
    """image [N, 3, 16, 16] -> y [N, 8, 16, 16]."""
    kernel = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype("f4") / 5
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return save(path, nodes, {"kernel": kernel}, ("image", [3, 16, 16]), ("y", [8, 16, 16]))


def save(path: Path, nodes: list[Any], weights: dict[str, Any], takes: tuple[str, Any], gives: tuple[str, Any]) -> Path:
    def value(name: str, dims: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *dims])

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [value(*takes)], [value(*gives)], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)
    return path
