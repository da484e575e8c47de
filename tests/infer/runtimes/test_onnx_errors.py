"""Errors of ONNX Runtime, as callers see them: without its source files, and short whatever names a model has."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from services.infer.runtimes.onnx_session import plain

SLASHES = "/" * 1_000_000


def error_of(node: onnx.NodeProto) -> Exception:
    """Return the error of a model of one node, of its load or its run."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [7])
    graph = helper.make_graph([node], "g", inputs, outputs, [shape] if "shape" in node.input else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString())
        session.run(None, {"x": np.ones((1, 4), np.float32)})
    except Exception as err:
        return err
    raise AssertionError("the model runs")


def test_a_failed_node_is_named_without_source_files() -> None:
    message = plain(error_of(helper.make_node("Reshape", ["x", "shape"], ["y"], name="the reshape")))
    assert message.startswith("input_shape_size == requested_shape_size was false")
    assert message.endswith(" (node 'the reshape')")


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("NoSuchOperation", ["x"], ["y"], name=SLASHES),
        helper.make_node("Add", ["x", SLASHES], ["y"]),
        helper.make_node("Reshape", ["x", "shape"], ["y"], name=SLASHES),
    ],
    ids=["operation", "input", "run"],
)
def test_long_names_make_short_errors_in_a_moment(node: onnx.NodeProto) -> None:
    error = error_of(node)
    began = time.thread_time()
    message = plain(error)
    # A search from each slash took half an hour.
    assert time.thread_time() - began < 5
    assert len(message) < 1_300
