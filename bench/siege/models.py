"""Models that are attacked, and the small one that bystanders call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Dims = Sequence[str | int]

ORDERED = """
dynamic_batching { preserve_ordering: true }
instance_group { count: 2 kind: KIND_CPU }
"""
ROWS = """
platform: "ensemble"
max_batch_size: 0
input { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1, 4 ] }
ensemble_scheduling {
  step { model_name: "ordered" model_version: -1
         input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } }
}
parameters { key: "each.ordered" value { string_value: "x" } }
"""


# Responses of 1 MiB, without an end.
MANY = """
import numpy as np

class Model:
    def predict(self, batch):
        while True:
            yield {"y": np.zeros(1 << 18, np.float32)}
"""
MANY_CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
parameters { key: "max_streams" value { string_value: "256" } }
"""


def write(root: Path) -> None:
    """Write the model repository.

    `small` y = 2x [n,4], of the bystanders; `echo` y = x, FP32 [n,k]; `text` y = x, BYTES [n,k]; `attention` [n,t,64],
    whose cost grows with the square of t; `slow` and `ordered` (which preserves the order of its responses) [n,4], some
    milliseconds; `rows`, an ensemble that calls `ordered` for each row; `wide` [n,1], whose y has 50 MB for each row;
    `many`, a decoupled model.
    """
    _put(root, "small", _model([helper.make_node("Add", ["x", "x"], ["y"])], TensorProto.FLOAT, ("n", 4)))
    _put(root, "echo", _model([helper.make_node("Identity", ["x"], ["y"])], TensorProto.FLOAT, ("n", "k")))
    _put(root, "text", _model([helper.make_node("Identity", ["x"], ["y"])], TensorProto.STRING, ("n", "k")))
    _put(root, "attention", _attention())
    _put(root, "slow", _slow(200))
    _put(root, "ordered", _slow(50), ORDERED)
    # Stated: the trial of a guessed batch would leave memory that returns during the first seconds.
    _put(root, "wide", wide(12_500_000), "max_batch_size: 32\n")
    (root / "many" / "1").mkdir(parents=True)
    (root / "many" / "1" / "model.py").write_text(MANY)
    (root / "many" / "config.pbtxt").write_text(MANY_CONFIG)
    (root / "rows" / "1").mkdir(parents=True)
    (root / "rows" / "config.pbtxt").write_text(ROWS)


def _put(root: Path, name: str, model: ModelProto, config: str = "") -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (root / name / "config.pbtxt").write_text(config)


def _model(nodes: Sequence[NodeProto], kind: int, dims: Dims, constants: Sequence[TensorProto] = ()) -> ModelProto:
    inputs, outputs = ([helper.make_tensor_value_info(name, kind, dims)] for name in "xy")
    graph = helper.make_graph(nodes, "siege", inputs, outputs, initializer=list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def wide(columns: int) -> ModelProto:
    """Return a model x [n,1] -> y [n,columns], FP32."""
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", dim))] for name, dim in (("x", 1), ("y", "k"))
    )
    shape = numpy_helper.from_array(np.array([1, columns]), "shape")
    nodes = [helper.make_node("Expand", ["x", "shape"], ["y"])]
    graph = helper.make_graph(nodes, "siege", inputs, outputs, initializer=[shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _attention() -> ModelProto:
    nodes = [
        helper.make_node("Transpose", ["x"], ["keys"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "keys"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "x"], ["y"]),
    ]
    return _model(nodes, TensorProto.FLOAT, ("n", "t", 64))


def _slow(rounds: int) -> ModelProto:
    # The chain depends on x; otherwise ONNX Runtime would compute it once at load.
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["max"], keepdims=0),
        helper.make_node("Mul", ["max", "nought"], ["none"]),
        helper.make_node("Add", ["eye", "none"], ["m0"]),
        *(helper.make_node("MatMul", [f"m{n}", "eye"], [f"m{n + 1}"]) for n in range(rounds)),
        helper.make_node("Gather", [f"m{rounds}", "zero"], ["row"]),
        helper.make_node("Gather", ["row", "zero"], ["one"]),
        helper.make_node("Mul", ["x", "one"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.eye(128, dtype=np.float32), "eye"),
        numpy_helper.from_array(np.array(0, np.int64), "zero"),
        numpy_helper.from_array(np.array(0, np.float32), "nought"),
    ]
    return _model(nodes, TensorProto.FLOAT, ("n", 4), constants)
