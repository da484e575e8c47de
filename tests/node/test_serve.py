"""`shoal serve`, run as a user runs it: a real process, a real model, a real port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from mesh.node.ports import listeners
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.node.conftest import SERVE as COMMAND
from tests.node.conftest import Start


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the server outlived its launcher"
        time.sleep(0.02)


def double(address: str) -> list[float]:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
    request = pb.ModelInferRequest(model_name="double", inputs=[tensor])
    request.raw_input_contents.append(np.array([1, 2, 3, 4], np.float32).tobytes())
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        answer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
    return np.frombuffer(answer.raw_output_contents[0], np.float32).tolist()


def is_ready(address: str, model: str) -> bool:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        return bool(stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=30).ready)


def test_a_folder_of_models_is_served_and_said_to_be(start: Start, onnx_models: Path) -> None:
    process, said = start(str(onnx_models))
    assert {(model["name"], model["state"]) for model in said["models"]} == {("double", "READY"), ("slow", "READY")}
    assert double(said["address"]) == [2, 4, 6, 8]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    wait_until_gone(said["pid"])


def test_a_model_that_cannot_be_loaded_is_said_with_the_reason(start: Start, onnx_models: Path, tmp_path: Path) -> None:
    (tmp_path / "double.onnx").write_bytes((onnx_models / "double.onnx").read_bytes())
    (tmp_path / "junk.onnx").write_text("no model")
    _, said = start(str(tmp_path))
    states = {model["name"]: model for model in said["models"]}
    assert states["junk"]["state"] == "UNAVAILABLE"
    assert "junk" in states["junk"]["reason"]
    assert double(said["address"]) == [2, 4, 6, 8]


def test_ctrl_c_stops_it_with_0(start: Start, onnx_models: Path) -> None:
    process, _ = start(str(onnx_models))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_kill_9_of_the_command_leaves_no_server(start: Start, onnx_models: Path) -> None:
    process, said = start(str(onnx_models))
    process.kill()
    process.wait()
    wait_until_gone(said["pid"])


def test_a_server_that_is_killed_ends_the_command_with_its_status(start: Start, onnx_models: Path) -> None:
    process, said = start(str(onnx_models))
    os.kill(said["pid"], signal.SIGKILL)
    assert process.wait(30) == 128 + signal.SIGKILL


def fails(*args: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_in_use_is_named(onnx_models: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        status, said = fails(str(onnx_models), "--port", str(port))
    assert status == 1
    assert f"port {port} of 127.0.0.1 is in use: give another with --port" in said


def test_one_bare_file_is_served_under_its_name(start: Start, onnx_models: Path, tmp_path: Path) -> None:
    file = tmp_path / "double.onnx"
    file.write_bytes((onnx_models / "double.onnx").read_bytes())
    (tmp_path / "junk.onnx").write_text("a neighbour that is not asked for")
    _, said = start(str(file), "--workers", "2")
    assert [(model["name"], model["version"], model["state"]) for model in said["models"]] == [("double", "1", "READY")]
    assert double(said["address"]) == [2, 4, 6, 8]


def test_one_bare_file_that_is_written_anew_is_taken_up(start: Start, onnx_models: Path, tmp_path: Path) -> None:
    file = tmp_path / "double.onnx"
    file.write_text("not yet")
    _, said = start(str(file), "--model-control", "poll", "--poll-ms", "100")
    assert [(model["name"], model["state"]) for model in said["models"]] == [("double", "UNAVAILABLE")]
    file.unlink()  # While it is away, what is served stays as it is.
    file.write_bytes((onnx_models / "double.onnx").read_bytes())
    deadline = time.monotonic() + 60
    while not is_ready(said["address"], "double"):
        assert time.monotonic() < deadline
    assert double(said["address"]) == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere", "nowhere does not exist: expected a folder of models (Triton's layout, or .onnx files), or one"),
        ("gone.onnx", "gone.onnx does not exist: expected a folder"),
        ("pipe.onnx", "pipe.onnx is no plain file: expected a folder"),
        ("notes.md", "notes.md is no .onnx file: expected a folder"),
        ("forest.joblib", "make a folder to serve of it: shoal models convert "),
        ("net.pth", "torch.export.save"),
        ("file/x.onnx", "file/x.onnx does not exist"),
        (
            "double/1/model.onnx",
            "is version 1 of the model double, whose config.pbtxt would be left out: give the folder",
        ),
    ],
)
def test_what_is_neither_a_folder_nor_a_model_is_named(tmp_path: Path, path: str, what: str) -> None:
    for name in ("notes.md", "forest.joblib", "net.pth", "file"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "double" / "1").mkdir(parents=True)
    (tmp_path / "double" / "config.pbtxt").touch()
    (tmp_path / "double" / "1" / "model.onnx").touch()
    status, said = fails(str(tmp_path / path), "--port", "0")
    assert (status, what in said) == (2, True), said
    assert "Traceback" not in said


def test_an_address_of_another_machine_is_named(onnx_models: Path) -> None:
    status, said = fails(str(onnx_models), "--host", "192.0.2.1", "--port", "0")
    assert (status, "--host '192.0.2.1': not an address of this machine" in said) == (2, True)


def test_a_wrong_setting_is_named(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_INFER_THREADS", "many")
    status, said = fails(str(onnx_models), "--port", "0")
    assert (status, "SHOAL_INFER_THREADS='many'" in said) == (2, True)


def test_every_address_can_be_listened_at(start: Start, onnx_models: Path) -> None:
    _, said = start(str(onnx_models), "--host", "0.0.0.0")
    assert double(said["address"].replace("0.0.0.0", "127.0.0.1")) == [2, 4, 6, 8]


def test_workers_share_the_address_and_are_kept(start: Start, onnx_models: Path) -> None:
    process, said = start(str(onnx_models), "--workers", "3")
    assert len(set(said["pids"])) == 3
    for _ in range(20):
        assert double(said["address"]) == [2, 4, 6, 8]
    os.kill(said["pids"][1], signal.SIGKILL)
    wait_until_gone(said["pids"][1])
    # Who is there answers at once, and nobody is asked before it can answer.
    port, asked = int(said["address"].rpartition(":")[2]), 0
    deadline = time.monotonic() + 60
    while listeners(port) < 3 or asked < 30:
        assert double(said["address"]) == [2, 4, 6, 8]
        assert time.monotonic() < deadline
        asked += 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    for pid in said["pids"]:
        wait_until_gone(pid)


def test_a_wrong_setting_ends_all_workers(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_INFER_THREADS", "many")
    status, said = fails(str(onnx_models), "--port", "0", "--workers", "3")
    assert (status, "SHOAL_INFER_THREADS='many'" in said) == (2, True)
