"""What every Runtime promises."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper

from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.operators.kernels_runtime import KernelsRuntime
from services.infer.remote.remote_runtime import RemoteRuntime
from services.infer.runtimes.multi_device import MultiDeviceSession
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.reshape import ReshapedSession, Reshapes
from services.infer.runtimes.runtime import About, ModelFailed, Runtime, Session, SessionOptions
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NAME, DTYPES
from tests.infer import onnx_files
from tests.infer.loading.test_canary import with_default
from tests.infer.runtimes.runtime_models import (
    OPERATIONS,
    OnnxModels,
    OperationModels,
    RemoteModels,
    ShoalModels,
    TritonModels,
)
from tests.infer.runtimes.simulated_gpu import on_simulated_gpu
from tests.long_form import by_form

ONE_THREAD = SessionOptions(intra_op_threads=1)


class Reshaping(OnnxRuntime):
    """What stands around a session promises what the session does: as a model with a `reshape` somewhere has it."""

    def load(self, file: Path, options: SessionOptions) -> Session:
        return ReshapedSession(super().load(file, options), Reshapes({}, {}))


class Spreading(OnnxRuntime):
    """As on two devices."""

    def load(self, file: Path, options: SessionOptions) -> Session:
        return MultiDeviceSession([(super(Spreading, self).load(file, options), 2) for _ in range(2)])


RUNTIMES = {
    "onnx": (OnnxRuntime, OnnxModels()),
    "onnx reshaped": (Reshaping, OnnxModels()),
    "onnx on two devices": (Spreading, OnnxModels()),
    "onnx on a GPU stream": (on_simulated_gpu, OnnxModels()),
    "onnx in a process": (IsolatedOnnxRuntime, OnnxModels()),
    "onnx shared": (partial(IsolatedOnnxRuntime, isolation="shared"), OnnxModels()),
    "python": (PythonRuntime, ShoalModels()),
    "python shared": (partial(PythonRuntime, isolation="shared"), ShoalModels()),
    "triton's python shared": (partial(PythonRuntime, isolation="shared"), TritonModels()),
    "triton's python": (PythonRuntime, TritonModels()),
    "python on a thread": (PythonRuntime, ShoalModels()),
    "triton's python on a thread": (PythonRuntime, TritonModels()),
    "kernels": (partial(KernelsRuntime, OPERATIONS), OperationModels()),
    "remote": (RemoteRuntime, ShoalModels()),
}
IN_A_PROCESS = {"handles_missing_inputs", "reshapes"}
SAYS = {
    "onnx": {"only_computes", "allows_trial_run"},
    "onnx reshaped": {"only_computes", "allows_trial_run", "reshapes"},
    "onnx on two devices": {"allows_trial_run"},
    "onnx on a GPU stream": {"allows_trial_run"},
    "onnx in a process": {"allows_trial_run", "reshapes"},
    "onnx shared": {"allows_trial_run", "reshapes"},
    "python": IN_A_PROCESS,
    "python shared": IN_A_PROCESS,
    "python on a thread": IN_A_PROCESS,
    "triton's python": {*IN_A_PROCESS, "wants_requests"},
    "triton's python shared": {*IN_A_PROCESS, "wants_requests"},
    "triton's python on a thread": {*IN_A_PROCESS, "wants_requests"},
    "kernels": {"takes_rows", "only_computes"},
    "remote": {"handles_missing_inputs"},
}
# Each combines two of the other kinds, and has no code of its own.
COMBINED = ("triton's python shared", "triton's python on a thread")
KINDS = by_form([name for name in RUNTIMES if name not in COMBINED], [*RUNTIMES])
WITH_FILES = [name for name in KINDS if name != "kernels"]
ONNX = ["onnx", "onnx reshaped", "onnx on two devices", "onnx on a GPU stream", "onnx in a process", "onnx shared"]


ACROSS_A_BORDER = {"onnx in a process", "onnx shared", "python", "triton's python", "remote"}
"""One for each way on which tensors leave the process: elsewhere their size is that of an array in memory."""

# All tests of a runtime run together: they share its sessions, and each session may be a process.
of_kinds = partial(pytest.mark.parametrize, "kind", scope="module")


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def runtime(kind: str) -> Runtime:
    return RUNTIMES[kind][0]()


@pytest.fixture(scope="module")
def models(kind: str) -> OnnxModels | ShoalModels:
    return RUNTIMES[kind][1]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteModels]:
    """Another server, started by the first remote model."""
    with ExitStack() as stack:
        yield RemoteModels(tmp_path_factory.mktemp("far"), stack)


@pytest.fixture(scope="module")
def load(kind: str, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory, far: RemoteModels):
    """Load a model, or take its session from an earlier test; with `options` the session is a new one."""
    sessions: dict[bytes, Session] = {}
    with ExitStack() as loaded:

        def new(model: bytes, options: SessionOptions) -> Session:
            folder = tmp_path_factory.mktemp("model")
            if kind == "remote":
                return runtime.load(folder, replace(options, about=far.serve(model)))
            if kind.endswith("on a thread"):
                about = About("m", config=pb.ModelConfig(parameters={"isolation": {"string_value": "none"}}))
                options = replace(options, about=about)
            if kind == "kernels":
                options = replace(options, about=About("m", config=text_format.Parse(model, pb.ModelConfig())))
            file = folder / runtime.model_file
            if runtime.model_file:
                file.write_bytes(model)
            return runtime.load(file, options)

        def load(model: bytes, options: SessionOptions | None = None) -> Session:
            if options is None and model in sessions:
                return sessions[model]
            session = new(model, options or ONE_THREAD)
            loaded.callback(session.close)
            if options is None:
                sessions[model] = session
            return session

        yield load


def test_a_session_has_its_inputs_and_outputs(load, models):
    session = load(models.add())
    assert [(s.name, s.datatype.name, s.shape) for s in session.inputs] == [
        ("a", "FP32", (-1, -1)),
        ("b", "FP32", (-1, -1)),
    ]
    assert [s.name for s in session.outputs] == ["sum", "difference"]


def test_run_returns_the_requested_outputs(load, models):
    session = load(models.add())
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    difference, total = session.run({"b": b, "a": a}, ["difference", "sum"])
    assert (difference.tolist(), total.tolist()) == ([[-9, -18]], [[11, 22]])
    assert len(session.run({"a": a, "b": b}, ["sum"])) == 1


def test_outputs_do_not_share_memory_with_read_only_inputs(load, models):
    session = load(models.identity())
    given = np.ones((2, 4), np.float32)
    given.flags.writeable = False
    (got,) = session.run({"x": given}, ["y"])
    assert not np.shares_memory(given, got)


def test_every_numeric_datatype_is_preserved(kind, load, models):
    names = [name for name in DTYPES if name != "BF16"]
    given = {name: np.array([[0, 1, 1], [1, 0, 1]], DTYPES[name]) for name in names}
    if kind == "kernels":
        sessions = {name: load(models.identity(name, ("n", 3))) for name in names}
        kinds = {name: session.inputs[0].datatype for name, session in sessions.items()}
        got = [session.run({"x": given[name]}, ["y"])[0] for name, session in sessions.items()]
    else:
        session = load(models.identities(names, ("n", 3)))
        kinds = {spec.name.removeprefix("x_"): spec.datatype for spec in session.inputs}
        got = session.run({f"x_{name}": array for name, array in given.items()}, [f"y_{name}" for name in names])
    assert kinds == {name: BY_NAME[name] for name in names}
    for name, array in zip(names, got, strict=True):
        assert array.dtype == given[name].dtype, name
        np.testing.assert_array_equal(array, given[name], name)


def test_strings(kind, load, models):
    if kind == "onnx on a GPU stream":
        with pytest.raises(
            FailedPrecondition, match=r"gpu_stream 'shared': tensor 'y' is \w+, only numbers are supported"
        ):
            load(models.identity("BYTES", ("n",)))
        return
    session = load(models.identity("BYTES", ("n",)))
    texts = ["é", "", "a\0b"] if session.text else ["é".encode(), b"", b"a\0b\xff"]
    assert session.run({"x": np.array(texts, object)}, ["y"])[0].tolist() == texts


def test_bit_patterns(kind, load, models):
    if kind.startswith("triton's python"):
        pytest.skip("its interface has no BF16")
    if kind == "onnx on a GPU stream":
        pytest.skip("it has none, and says so")
    bits = load(models.identity("BF16", ("n",)))
    given = np.array([0x3FC0, 0xFF80, 0], np.uint16)
    assert bits.run({"x": given}, ["y"])[0].tolist() == given.tolist()
    assert bits.run({"x": given[:0]}, ["y"])[0].shape == (0,)


def test_a_hundred_megabytes_there_and_back(kind, load, models):
    session = load(models.identity("FP32", ("n", 4)))
    given = np.arange(25 << 20 if kind in ACROSS_A_BORDER else 1 << 20, dtype=np.float32).reshape(-1, 4)
    (got,) = session.run({"x": given}, ["y"])
    assert np.array_equal(got, given)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("lookup", {"i": np.array([[3]])}),
        ("reshaping", {"x": np.ones(4, np.float32), "shape": np.array([3, 3])}),
    ],
)
def test_an_error_of_the_model_keeps_its_own_text(load, models, name, inputs):
    session = load(getattr(models, name)())
    for _ in range(2):
        with pytest.raises(ModelFailed) as err:
            session.run(inputs, ["y"])
        message = str(err.value)
        assert message
        for inside in ("/onnxruntime", ".h:", ".cc:", "onnxruntime::", "ONNXRuntimeError", "Non-zero status", "/tmp"):
            assert inside not in message


@of_kinds([kind for kind in WITH_FILES if kind != "remote"])
@pytest.mark.parametrize("data", [b"", b"no model", bytes(1000)])
def test_an_invalid_model_file_is_rejected(load, runtime, data):
    with pytest.raises(FailedPrecondition, match=r"model\.(onnx|py)"):
        load(data)


@of_kinds(ONNX)
def test_an_input_that_is_not_a_tensor_is_rejected_by_name(load):
    value = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    model = onnx_files.identity()
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.append(helper.make_node("SequenceConstruct", ["x"], ["y"]))
    model.graph.output.append(value)
    with pytest.raises(FailedPrecondition, match="output 'y' is a seq"):
        load(model.SerializeToString())


@of_kinds(ONNX)
def test_options(load, models):
    entries = {"session.set_denormal_as_zero": "1"}
    session = load(models.scale(), SessionOptions(2, inter_op_threads=2, graph_level=-1, entries=entries))
    assert session.run({"x": np.ones((1, 4), np.float32)}, ["y"])[0].tolist() == [[2, 2, 2, 2]]
    with pytest.raises(FailedPrecondition, match="cannot load"):
        load(models.scale(), SessionOptions(1, entries={"session." + "x" * 5000: "1"}))


def test_many_threads_may_run_one_session(load, models):
    session = load(models.scale())

    def run(n: int) -> bool:
        return bool((session.run({"x": np.full((3, 4), n, np.float32)}, ["y"])[0] == 2 * n).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(200)))


@of_kinds(["kernels"])
def test_a_runtime_without_files_rejects_an_invalid_configuration(load):
    with pytest.raises(FailedPrecondition, match="operation 'nothing' is unknown: there are 'add', 'identity'"):
        load(OperationModels()._config("nothing"))
    with pytest.raises(FailedPrecondition, match="operation add: parameter 'size' is unknown: it has none"):
        load(OperationModels()._config("add", size="3"))


def test_optional_abilities_are_declared_by_members(kind, load, models):
    session = load(models.scale())
    assert isinstance(session, Session)
    assert {
        name
        for name in (
            "handles_missing_inputs",
            "wants_requests",
            "takes_rows",
            "reshapes",
            "only_computes",
            "allows_trial_run",
        )
        if getattr(session, name)
    } == SAYS[kind]
    assert (session.gpus, session.optional_inputs) == ((0,) if kind == "onnx on a GPU stream" else (), ())
    assert (session.gpu_stream is not None) == (kind == "onnx on a GPU stream")


def test_device_sessions_run_the_whole_model_on_each_device(kind, load, models):
    session = load(models.scale())
    assert len(session.device_sessions()) == (2 if kind == "onnx on two devices" else 1)
    for part in session.device_sessions():
        assert isinstance(part, Session)
        assert (part.inputs, part.outputs, part.text) == (session.inputs, session.outputs, session.text)
        assert part.run({"x": np.ones((3, 4), np.float32)}, ["y"])[0].tolist() == [[2.0] * 4] * 3


def test_completion_does_not_change_its_argument(load, models):
    session = load(models.scale(), ONE_THREAD)  # It is changed below.
    config = text_format.Parse('parameters { key: "k" value { string_value: "v" } }', pb.ModelConfig())
    before = config.SerializeToString(deterministic=True)
    completed = session.completed(config, sets_max_batch_size=False)
    assert completed.parameters["k"].string_value == "v" or session.wants_requests  # It completed what it was given.
    assert config.SerializeToString(deterministic=True) == before
    session.declare({"x": "FP32"})
    assert session.run({"x": np.ones((1, 4), np.float32)}, ["y"])[0].tolist() == [[2.0] * 4]


def test_run_rows_is_supported_only_with_takes_rows(load, models):
    session = load(models.scale())
    given = {"x": np.ones((2, 4), np.float32)}
    if session.takes_rows:
        results = session.run_rows(given, ["y"])
        assert ([value.tolist() for value in results.values], results.unfit) == ([[[2.0] * 4] * 2], {})
    else:
        with pytest.raises(NotImplementedError):
            session.run_rows(given, ["y"])


@of_kinds(ONNX)
def test_an_input_with_a_default_in_the_file_is_optional(load):
    session = load(with_default().SerializeToString())
    assert [(spec.name, spec.is_optional) for spec in session.optional_inputs] == [("b", True)]
    x = np.ones((1, 4), np.float32)
    assert session.run({"x": x}, ["y"])[0].tolist() == [[11.0] * 4]
    assert session.run({"x": x, "b": x}, ["y"])[0].tolist() == [[2.0] * 4]
