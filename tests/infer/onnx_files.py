"""Small real ONNX models, one for each thing that a model can do to a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import magika
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[str | int | None] | None

MAGIKA = Path(magika.__file__).parent / "models/standard_v3_3/model.onnx"


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Dims]],
    outputs: Sequence[tuple[str, int, Dims]],
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        initializer=list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def identity(datatype: int = TensorProto.FLOAT, dims: Dims = ("n", 4)) -> onnx.ModelProto:
    return model([helper.make_node("Identity", ["x"], ["y"])], [("x", datatype, dims)], [("y", datatype, dims)])


def scale(factor: float = 2.0, dims: Dims = ("n", 4)) -> onnx.ModelProto:
    """y = factor * x."""
    return model(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        [("x", TensorProto.FLOAT, dims)],
        [("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(np.float32(factor), "factor")],
    )


def add() -> onnx.ModelProto:
    """sum = a + b, difference = a - b; rows of any length."""
    dims = ("n", "k")
    return model(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])],
        [("a", TensorProto.FLOAT, dims), ("b", TensorProto.FLOAT, dims)],
        [("sum", TensorProto.FLOAT, dims), ("difference", TensorProto.FLOAT, dims)],
    )


def endless() -> onnx.ModelProto:
    """y = x, after a loop that does not end."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, None),
        ],
    )
    return model(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)],
        [("x", TensorProto.FLOAT, ("n", 4))],
        [("y", TensorProto.FLOAT, ("n", 4))],
        [numpy_helper.from_array(np.array(True), "true")],
    )


def counting() -> onnx.ModelProto:
    """y = n, after a loop of n rounds."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Add", ["v", "one"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.INT64, [1]),
        ],
    )
    return model(
        [
            helper.make_node("Squeeze", ["n"], ["rounds"]),
            helper.make_node("Loop", ["rounds", "true", "zero"], ["y"], body=body),
        ],
        [("n", TensorProto.INT64, (1,))],
        [("y", TensorProto.INT64, (1,))],
        [
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.array([0]), "zero"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )


def lookup() -> onnx.ModelProto:
    """y = table[i], of 3 entries: raises for any other index."""
    return model(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", TensorProto.INT64, ("n", 1))],
        [("y", TensorProto.FLOAT, ("n", 1))],
        [numpy_helper.from_array(np.array([10, 20, 30], np.float32), "table")],
    )


def mixing() -> onnx.ModelProto:
    """y = x minus the mean over the first dimension: that dimension is free, and no batch."""
    return model(
        [helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]), helper.make_node("Sub", ["x", "mean"], ["y"])],
        [("x", TensorProto.FLOAT, ("n", 4))],
        [("y", TensorProto.FLOAT, ("n", 4))],
    )


def brightness(datatype: int = TensorProto.UINT8, dims: Dims = ("n", 4)) -> onnx.ModelProto:
    """y = x divided by the largest x of the whole batch, of integers."""
    return model(
        [
            helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["float"], ["largest"], keepdims=0),
            helper.make_node("Max", ["largest", "one"], ["positive"]),
            helper.make_node("Div", ["float", "positive"], ["y"]),
        ],
        [("x", datatype, dims)],
        [("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(np.float32(1), "one")],
    )


def embedding(tokens: int, *, mixes: bool) -> onnx.ModelProto:
    """y = table[ids] of `tokens` entries, `mixes`: minus the mean over all rows, whose dimensions are free."""
    table = numpy_helper.from_array(np.arange(tokens, dtype=np.float32)[:, None] ** 2, "table")
    subtracted = "mean" if mixes else "zero"
    return model(
        [
            helper.make_node("Gather", ["table", "ids"], ["embedded"]),
            helper.make_node("ReduceMean", ["embedded"], ["mean"], axes=[0]),
            helper.make_node("Sub", ["embedded", subtracted], ["y"]),
        ],
        [("ids", TensorProto.INT64, ("n", "t"))],
        [("y", TensorProto.FLOAT, ("n", "t", 1))],
        [table, numpy_helper.from_array(np.float32(0), "zero")],
    )


def reshaping() -> onnx.ModelProto:
    """y = x reshaped to `shape`: raises when that does not hold x."""
    return model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, ("k",)), ("shape", TensorProto.INT64, (2,))],
        [("y", TensorProto.FLOAT, (None, None))],
    )


def expanding() -> onnx.ModelProto:
    """y has as many zeros as the number in `count`: its size depends on the data of an input, and not on its shape."""
    return model(
        [helper.make_node("ConstantOfShape", ["count"], ["y"])],
        [("count", TensorProto.INT64, (1,))],
        [("y", TensorProto.FLOAT, (None,))],
    )


def broken() -> onnx.ModelProto:
    """Raises for every input: 4 elements into 5."""
    return model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, (1, 4))],
        [("y", TensorProto.FLOAT, (1, 5))],
        [numpy_helper.from_array(np.array([1, 5], np.int64), "shape")],
    )


def unservable() -> onnx.ModelProto:
    """y has a datatype that no response can carry: the model cannot be loaded."""
    return cast(TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN)


def parsing() -> onnx.ModelProto:
    """y = the INT64 number that the text x holds; raises for other text, also for empty text."""
    return cast(TensorProto.STRING, TensorProto.INT64, (1, 4))


def loudness(dims: Dims = ("n", 4)) -> onnx.ModelProto:
    """y = x rounded to 1/255 of the largest |x| of the whole batch: dynamic quantization of ordinary operators."""
    return model(
        [
            helper.make_node("Abs", ["x"], ["size"]),
            helper.make_node("ReduceMax", ["size"], ["largest"], keepdims=0),
            helper.make_node("Add", ["largest", "tiny"], ["positive"]),
            helper.make_node("Div", ["positive", "steps"], ["step"]),
            helper.make_node("Div", ["x", "step"], ["quotient"]),
            helper.make_node("Round", ["quotient"], ["level"]),
            helper.make_node("Mul", ["level", "step"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, dims)],
        [("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(np.float32(1e-9), "tiny"), numpy_helper.from_array(np.float32(255), "steps")],
    )


def dynamically_quantized() -> onnx.ModelProto:
    """y = i as FP32 through DynamicQuantizeLinear: exact for 0 and 1, so that no trial with small numbers finds it."""
    return model(
        [
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        [("i", TensorProto.INT64, ("n", 4))],
        [("y", TensorProto.FLOAT, ("n", 4))],
    )


def slow(rounds: int = 200) -> onnx.ModelProto:
    """y = 2x after some milliseconds of arithmetic, whatever the number of rows."""
    matrix = numpy_helper.from_array(np.eye(128, dtype=np.float32), "eye")
    # It starts from x, or it would be computed once and for all when the model is loaded.
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
    return model(
        nodes,
        [("x", TensorProto.FLOAT, ("n", 4))],
        [("y", TensorProto.FLOAT, ("n", 4))],
        [
            matrix,
            numpy_helper.from_array(np.int64(0), "zero"),
            numpy_helper.from_array(np.float32(0), "nought"),
        ],
    )


def cast(source: int, target: int, dims: Dims = ("n", 4)) -> onnx.ModelProto:
    return model([helper.make_node("Cast", ["x"], ["y"], to=target)], [("x", source, dims)], [("y", target, dims)])


def accumulating(control: int = TensorProto.FLOAT, corrid: int = TensorProto.INT64) -> onnx.ModelProto:
    """A stateful model: total = sum of x so far (a state), product = product of 1 + x so far (another); `told` is what
    the controls START, END and READY hold, and `id` what CORRID does. Raises when x is above 1000."""
    rows: Dims = ("n", 1)
    nodes = [
        helper.make_node("Add", ["total_in", "x"], ["total"]),
        helper.make_node("Identity", ["total"], ["total_out"]),
        helper.make_node("Add", ["x", "one"], ["factor"]),
        helper.make_node("Mul", ["product_in", "factor"], ["product_out"]),
        helper.make_node("Identity", ["product_out"], ["product"]),
        *(helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT) for name in ("START", "END", "READY")),
        helper.make_node("Concat", ["START_f", "END_f", "READY_f"], ["told"], axis=1),
        # Looked up, so that an x that is too large raises.
        helper.make_node("Div", ["x", "thousand"], ["small"]),
        helper.make_node("Cast", ["small"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["zero"]),
        helper.make_node("Cast", ["zero"], ["zero_id"], to=corrid),
        helper.make_node("Add", ["CORRID", "zero_id"], ["id"]),
    ]
    return model(
        nodes,
        [
            ("x", TensorProto.FLOAT, rows),
            ("total_in", TensorProto.FLOAT, rows),
            ("product_in", TensorProto.FLOAT, rows),
            *((name, control, rows) for name in ("START", "END", "READY")),
            ("CORRID", corrid, rows),
        ],
        [
            ("total", TensorProto.FLOAT, rows),
            ("product", TensorProto.FLOAT, rows),
            ("total_out", TensorProto.FLOAT, rows),
            ("product_out", TensorProto.FLOAT, rows),
            ("told", TensorProto.FLOAT, ("n", 3)),
            ("id", corrid, rows),
        ],
        [
            numpy_helper.from_array(np.float32(1), "one"),
            numpy_helper.from_array(np.float32(1000), "thousand"),
            numpy_helper.from_array(np.array([0], np.float32), "table"),
        ],
    )


def pairs() -> onnx.ModelProto:
    """y = sum of x[i] * x[j] over all pairs of a row's elements: a run takes memory of the square of their number."""
    return model(
        [
            helper.make_node("Transpose", ["x"], ["column"], perm=[1, 0]),
            helper.make_node("MatMul", ["column", "x"], ["products"]),
            helper.make_node("ReduceSum", ["products"], ["y"], keepdims=0),
        ],
        [("x", TensorProto.FLOAT, (1, "k"))],
        [("y", TensorProto.FLOAT, ())],
    )


def remembering() -> onnx.ModelProto:
    """A stateful model: its state is every x so far, and `count` their number."""
    return model(
        [
            helper.make_node("Concat", ["seen_in", "x"], ["seen_out"], axis=1),
            helper.make_node("Shape", ["seen_out"], ["count"], start=1),
        ],
        [("x", TensorProto.FLOAT, (1, "k")), ("seen_in", TensorProto.FLOAT, (1, "m"))],
        [("count", TensorProto.INT64, (1,)), ("seen_out", TensorProto.FLOAT, (1, "n"))],
    )


def summing() -> onnx.ModelProto:
    """A stateful model: total = sum of all elements of x so far (a state), rows of any length."""
    return model(
        [
            helper.make_node("ReduceSum", ["x", "axes"], ["row"], keepdims=1),
            helper.make_node("Add", ["total_in", "row"], ["total"]),
            helper.make_node("Identity", ["total"], ["total_out"]),
        ],
        [("x", TensorProto.FLOAT, ("n", "k")), ("total_in", TensorProto.FLOAT, ("n", 1))],
        [("total", TensorProto.FLOAT, ("n", 1)), ("total_out", TensorProto.FLOAT, ("n", 1))],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
