"""A model process imports neither protobuf nor gRPC: it starts fast, stays small, and a model may bring its own.

The modules are read from the living process, after it has run its model: a signal makes it write its `sys.modules`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.model_process.session import ProcessSession
from services.infer.model_process.shared.owners import Owners
from services.infer.runtimes.runtime import About, SessionOptions
from shoal.inference.v2 import model_config_pb2 as pb
from tests.breakable import PATIENCE_S
from tests.infer.runtimes.test_reshape import BATCHED, sums

FOLDER = "SHOAL_MODEL_MODULES_FOLDER"
PROBE = f"""
import os, signal, sys

def write(*_):
    path = os.path.join(os.environ["{FOLDER}"], str(os.getpid()))
    with open(path + ".new", "w") as file:
        file.write("\\n".join(sys.modules))
    os.rename(path + ".new", path)

if "{FOLDER}" in os.environ:
    signal.signal(signal.SIGUSR1, write)
"""
"""Python imports `sitecustomize` at its start: so the process is started as it always is."""

OWN = """
class Model:
    inputs = {"x": ("FP32", [-1, -1])}
    outputs = {"y": ("FP32", [-1, -1])}

    def predict(self, batch):
        return {"y": 2 * batch["x"]}
"""
TRITON = """
import json
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        for add, name in ((config.add_input, "x"), (config.add_output, "y")):
            add({"name": name, "data_type": "TYPE_FP32", "dims": [-1]})
        config.set_max_batch_size(8)
        return config

    def initialize(self, args):
        json.loads(args["model_config"])

    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x)]))
        return responses
"""
BANNED = ("grpc", "grpc_health", "google", "opentelemetry", "pymongo", "aetcd")


@pytest.fixture
def modules_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], set[str]]:
    """Gives the modules of a living model process. Those that start from now on can be asked."""
    written, probe = tmp_path / "modules", tmp_path / "probe"
    written.mkdir()
    probe.mkdir()
    (probe / "sitecustomize.py").write_text(PROBE)
    monkeypatch.syspath_prepend(probe)
    monkeypatch.setenv(FOLDER, str(written))

    def modules_of(pid: int) -> set[str]:
        os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE_S
        while not (written / str(pid)).exists():
            assert time.monotonic() < deadline, "the process has written its modules"
            time.sleep(0.01)
        return set((written / str(pid)).read_text().split())

    return modules_of


@pytest.fixture
def load(tmp_path: Path, run_dir: Path) -> Iterator[Callable[[str, str], ProcessSession]]:
    run_dir.chmod(0o700)
    with ExitStack() as loaded:

        def load(kind: str, isolation: str) -> ProcessSession:
            folder = tmp_path / "m" / "1"
            folder.mkdir(parents=True)
            owners = loaded.enter_context(Owners(run_dir))
            if kind == "onnx":
                file, runtime = folder / "model.onnx", IsolatedOnnxRuntime(owners=owners)
                file.write_bytes(sums().SerializeToString())
            else:
                file, runtime = folder / "model.py", PythonRuntime(owners=owners)
                file.write_text(OWN if kind == "own" else TRITON)
            config = text_format.Parse(BATCHED if kind == "onnx" else "", pb.ModelConfig(name="m"))
            config.parameters["isolation"].string_value = isolation
            options = SessionOptions(1, about=About("m", 1, folder.parent, config))
            session = runtime.load(file, options)
            loaded.callback(session.close)
            return session

        yield load


@pytest.mark.parametrize("isolation", ["process", "shared"])
@pytest.mark.parametrize("kind", ["own", "triton", "onnx"])
def test_a_model_process_imports_no_protobuf_and_no_grpc(load, modules_of, kind: str, isolation: str) -> None:
    session = load(kind, isolation)
    x = np.array([[1, 2, 3, 4]], np.float32)
    (result,) = session.run_requests(
        {"x": [x]}, ["s" if kind == "onnx" else "y"], [1], [{}] if kind == "triton" else []
    )
    assert np.asarray(result[0]).tolist() == ([[10]] if kind == "onnx" else [[2, 4, 6, 8]])
    found = modules_of(session.instances[0].running(PATIENCE_S).pid)
    assert {"numpy", "services.infer.model_process.channel"} <= found
    assert ("onnxruntime" in found) == (kind == "onnx")
    heavy = {name for name in found if name.partition(".")[0] in BANNED or "_pb2" in name}
    assert not heavy


def test_the_probe_sees_what_a_model_imports(load, modules_of, tmp_path: Path) -> None:
    """A model may import protobuf: it is then found."""
    session = load("own", "process")
    before = modules_of(session.instances[0].running(PATIENCE_S).pid)
    assert "google.protobuf.message" not in before
    session.close()
    file = tmp_path / "m" / "1" / "model.py"
    file.write_text("import google.protobuf.message\n" + OWN)
    again = PythonRuntime().load(file, SessionOptions(1, about=About("m", 1, file.parent.parent, pb.ModelConfig())))
    try:
        assert "google.protobuf.message" in modules_of(again.instances[0].running(PATIENCE_S).pid)
    finally:
        again.close()
