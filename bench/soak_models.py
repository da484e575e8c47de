"""Models of the soak test: one of each kind, each with an answer that the caller can compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[str | int]

CACHED = """
response_cache { enable: true }
parameters { key: "response_cache_ttl_ms" value { string_value: "200" } }
"""

PLUS_ONE = """
class Model:
    inputs = {"x": ("FP32", [-1, 4])}
    outputs = {"y": ("FP32", [-1, 4])}
    max_batch_size = 16

    def predict(self, batch):
        return {"y": batch["x"] + 1}
"""

COUNTING = """
import numpy as np

class Model:
    def predict(self, batch):
        for number in range(int(batch["n"][0])):
            yield {"i": np.array([number], np.int32)}
"""

COUNTING_CONFIG = """
backend: "python"
input { name: "n" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "i" data_type: TYPE_INT32 dims: [ 1 ] }
model_transaction_policy { decoupled: true }
"""


def write(root: Path) -> None:
    """Write the model repository.

    `double` y = 2x, batched; `triple` y = 3x, with a response cache; `fixed` y = 5x of [2, 3], never batched; `text`
    y = x, BYTES; `slow` y = 2x after some milliseconds; `table` y = 10, 20 or 30 for i = 0, 1, 2, and raises for
    others; `reloaded` y = 7x; `python` y = x + 1; `counting`, decoupled: 0, 1, ... n - 1.
    """
    _put(root, "double", _times(2), "")
    _put(root, "triple", _times(3, ("n", "k")), CACHED)
    _put(root, "fixed", _times(5, (2, 3)), "max_batch_size: 0")
    _put(root, "text", _identity(TensorProto.STRING, ("n", "k")), "")
    _put(root, "slow", _slow(), "")
    _put(root, "table", _table(), "")
    _put(root, "reloaded", _times(7), "")
    _python(root, "python", PLUS_ONE, 'backend: "python"')
    _python(root, "counting", COUNTING, COUNTING_CONFIG)


def _put(root: Path, name: str, model: onnx.ModelProto, config: str) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (root / name / "config.pbtxt").write_text(config)


def _python(root: Path, name: str, source: str, config: str) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(source)
    (root / name / "config.pbtxt").write_text(config)


def _model(
    nodes: Sequence[onnx.NodeProto],
    x: tuple[str, int, Dims],
    y: tuple[str, int, Dims],
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    inputs, outputs = [helper.make_tensor_value_info(*x)], [helper.make_tensor_value_info(*y)]
    graph = helper.make_graph(nodes, "soak", inputs, outputs, initializer=list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _times(factor: float, dims: Dims = ("n", 4)) -> onnx.ModelProto:
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    constants = [numpy_helper.from_array(np.float32(factor), "factor")]
    return _model(nodes, ("x", TensorProto.FLOAT, dims), ("y", TensorProto.FLOAT, dims), constants)


def _identity(kind: int, dims: Dims) -> onnx.ModelProto:
    return _model([helper.make_node("Identity", ["x"], ["y"])], ("x", kind, dims), ("y", kind, dims))


def _table() -> onnx.ModelProto:
    constants = [numpy_helper.from_array(np.array([10, 20, 30], np.float32), "table")]
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"])]
    return _model(nodes, ("i", TensorProto.INT64, ("n", 1)), ("y", TensorProto.FLOAT, ("n", 1)), constants)


def _slow(rounds: int = 150) -> onnx.ModelProto:
    # The chain depends on x; otherwise ONNX Runtime would compute it once at load.
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["max"], keepdims=0),
        helper.make_node("Mul", ["max", "nought"], ["none"]),
        helper.make_node("Add", ["eye", "none"], ["m0"]),
    ]
    nodes += [helper.make_node("MatMul", [f"m{n}", "eye"], [f"m{n + 1}"]) for n in range(rounds)]
    nodes += [
        helper.make_node("Gather", [f"m{rounds}", "zero"], ["row"]),
        helper.make_node("Gather", ["row", "zero"], ["one"]),
        helper.make_node("Mul", ["x", "one"], ["same"]),
        helper.make_node("Add", ["same", "same"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.eye(128, dtype=np.float32), "eye"),
        numpy_helper.from_array(np.int64(0), "zero"),
        numpy_helper.from_array(np.float32(0), "nought"),
    ]
    return _model(nodes, ("x", TensorProto.FLOAT, ("n", 4)), ("y", TensorProto.FLOAT, ("n", 4)), constants)
