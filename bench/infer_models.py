"""Four ONNX models with seeded weights for benchmarks of inference servers, and their expected answers.

tiny   input [N,16] -> output [N,4]         a few microseconds per row: measures the server's own cost
mlp    input [N,256] -> output [N,10]       19 MB of weights: batched rows cost far less than single rows
cnn    input [N,3,64,64] -> output [N,10]   about a millisecond per row: measures the CPU time left for models
latent input [N,16] -> output [N,10]        as cnn, but from a small input: much work, little to send
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

ROWS = 64
"""Number of different requests per model, each with its own answer, so that swapped answers are detected."""

_SHAPES = {"tiny": (16,), "mlp": (256,), "cnn": (3, 64, 64), "latent": (16,)}


@dataclass(frozen=True)
class Sample:
    """A model's requests and answers: `inputs` [ROWS, ...] and `outputs` [ROWS, ...], float32."""

    name: str
    inputs: np.ndarray[Any, np.dtype[np.float32]]
    outputs: np.ndarray[Any, np.dtype[np.float32]]


def save(folder: Path) -> dict[str, Sample]:
    """Write the models to `folder`, and return their expected answers, computed row by row."""
    return {name: _save(name, folder / f"{name}.onnx") for name in _SHAPES}


def session(path: Path) -> onnxruntime.InferenceSession:
    """Return a session of ONNX Runtime with one thread, as in the servers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _save(name: str, path: Path) -> Sample:
    nodes, weights = getattr(_Graph(name), name)()
    shape = _SHAPES[name]
    kind = onnx.TensorProto.FLOAT
    width = 4 if name == "tiny" else 10
    graph = onnx.helper.make_graph(
        nodes,
        name,
        [onnx.helper.make_tensor_value_info("input", kind, ["N", *shape])],
        [onnx.helper.make_tensor_value_info("output", kind, ["N", width])],
        weights,
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    inputs = np.random.default_rng(7).standard_normal((ROWS, *shape)).astype(np.float32)
    run = session(path)
    rows = [run.run(["output"], {"input": inputs[n : n + 1]})[0] for n in range(ROWS)]
    return Sample(name, inputs, np.concatenate(rows))


class _Graph:
    """Nodes and seeded weights of one model."""

    def __init__(self, name: str) -> None:
        self._rng = np.random.default_rng(sum(name.encode()))
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def tiny(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        self._dense("input", "output", 16, 4)
        return self._nodes, self._weights

    def mlp(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        self._relu(self._dense("input", "a", 256, 2048), "b")
        self._relu(self._dense("b", "c", 2048, 2048), "d")
        self._dense("d", "output", 2048, 10)
        return self._nodes, self._weights

    def latent(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        self._weights.append(onnx.numpy_helper.from_array(np.array([-1, 3, 64, 64]), "shape"))
        self._node("Reshape", [self._dense("input", "flat", 16, 3 * 64 * 64), "shape"], "image")
        return self._convolved("image")

    def cnn(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        return self._convolved("input")

    def _convolved(self, image: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        self._relu(self._conv(image, "a", 3, 32, 2), "b")
        self._relu(self._conv("b", "c", 32, 64, 2), "d")
        self._relu(self._conv("d", "e", 64, 64, 1), "f")
        self._relu(self._conv("f", "g", 64, 64, 1), "h")
        self._node("GlobalAveragePool", ["h"], "i")
        self._node("Flatten", ["i"], "j")
        self._dense("j", "output", 64, 10)
        return self._nodes, self._weights

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _weight(self, name: str, shape: tuple[int, ...], fan_in: int) -> str:
        values = (self._rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        self._weights.append(onnx.numpy_helper.from_array(values, name))
        return name

    def _dense(self, source: str, output: str, rows: int, columns: int) -> str:
        weights = [self._weight(f"{output}.w", (rows, columns), rows), self._weight(f"{output}.b", (columns,), columns)]
        return self._node("Gemm", [source, *weights], output)

    def _conv(self, source: str, output: str, inputs: int, outputs: int, stride: int) -> str:
        weight = self._weight(f"{output}.w", (outputs, inputs, 3, 3), 9 * inputs)
        return self._node("Conv", [source, weight], output, pads=[1, 1, 1, 1], strides=[stride, stride])

    def _relu(self, source: str, output: str) -> str:
        return self._node("Relu", [source], output)
