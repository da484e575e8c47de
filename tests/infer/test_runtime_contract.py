"""What every Runtime promises."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from services.infer.onnx_runtime import OnnxRuntime
from services.infer.runtime import ModelFailed, Runtime, Session, SessionOptions
from shoal.errors import FailedPrecondition
from tests.infer import onnx_files

ONE_THREAD = SessionOptions(intra_op_threads=1)


@pytest.fixture(params=[OnnxRuntime])
def runtime(request) -> Runtime:
    return request.param()


@pytest.fixture
def load(runtime: Runtime, tmp_path: Path):
    def load(model: onnx.ModelProto | bytes, options: SessionOptions = ONE_THREAD) -> Session:
        file = tmp_path / "model.onnx"
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return runtime.load(file, options)

    return load


def test_a_session_knows_its_inputs_and_outputs(load):
    session = load(onnx_files.add())
    assert [(s.name, s.datatype.name, s.shape) for s in session.inputs] == [
        ("a", "FP32", (-1, -1)),
        ("b", "FP32", (-1, -1)),
    ]
    assert [s.name for s in session.outputs] == ["sum", "difference"]


def test_it_gives_the_outputs_that_are_asked_for(load):
    session = load(onnx_files.add())
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    difference, total = session.run({"b": b, "a": a}, ["difference", "sum"])
    assert (difference.tolist(), total.tolist()) == ([[-9, -18]], [[11, 22]])
    assert len(session.run({"a": a, "b": b}, ["sum"])) == 1


def test_read_only_inputs_and_outputs_of_their_own(load):
    session = load(onnx_files.identity())
    given = np.ones((2, 4), np.float32)
    given.flags.writeable = False
    (got,) = session.run({"x": given}, ["y"])
    assert not np.shares_memory(given, got)


NUMBERS = {
    name: getattr(TensorProto, name)
    for name in ("BOOL", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "DOUBLE")
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_kind_of_number_comes_back_as_it_went(load, name):
    session = load(onnx_files.identity(NUMBERS[name], ("n", 3)))
    dtype = session.inputs[0].datatype.dtype
    given = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    (got,) = session.run({"x": given}, ["y"])
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, given)


def test_strings_and_bit_patterns(load):
    text = load(onnx_files.identity(TensorProto.STRING, ("n",)))
    assert text.text
    assert text.run({"x": np.array(["é", "", "a\0b"], object)}, ["y"])[0].tolist() == ["é", "", "a\0b"]
    bits = load(onnx_files.identity(TensorProto.BFLOAT16, ("n",)))
    given = np.array([0x3FC0, 0xFF80, 0], np.uint16)
    assert bits.run({"x": given}, ["y"])[0].tolist() == given.tolist()
    assert bits.run({"x": given[:0]}, ["y"])[0].shape == (0,)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (onnx_files.lookup(), {"i": np.array([[3]])}),
        (onnx_files.reshaping(), {"x": np.ones(4, np.float32), "shape": np.array([3, 3])}),
    ],
)
def test_a_model_that_raises_says_so_in_its_own_words(load, model, inputs):
    session = load(model)
    with pytest.raises(ModelFailed) as err:
        session.run(inputs, ["y"])
    message = str(err.value)
    assert message
    for inside in ("/onnxruntime", ".h:", ".cc:", "onnxruntime::", "ONNXRuntimeError", "Non-zero status"):
        assert inside not in message


@pytest.mark.parametrize("data", [b"", b"no model", bytes(1000)])
def test_a_file_that_is_no_model_is_refused(load, data):
    with pytest.raises(FailedPrecondition, match=r"cannot load model\.onnx"):
        load(data)


def test_what_is_no_tensor_is_refused_by_name(load):
    value = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    model = onnx_files.identity()
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.append(helper.make_node("SequenceConstruct", ["x"], ["y"]))
    model.graph.output.append(value)
    with pytest.raises(FailedPrecondition, match="output 'y' is a seq"):
        load(model)


def test_options(load):
    entries = {"session.set_denormal_as_zero": "1"}
    session = load(onnx_files.scale(), SessionOptions(2, inter_op_threads=2, graph_level=-1, entries=entries))
    assert session.run({"x": np.ones((1, 4), np.float32)}, ["y"])[0].tolist() == [[2, 2, 2, 2]]
    with pytest.raises(FailedPrecondition, match="cannot load"):
        load(onnx_files.scale(), SessionOptions(1, entries={"session." + "x" * 5000: "1"}))


def test_many_threads_may_run_one_session(load):
    session = load(onnx_files.scale())

    def run(n: int) -> bool:
        return bool((session.run({"x": np.full((3, 4), n, np.float32)}, ["y"])[0] == 2 * n).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(200)))
    session.close()
