"""Two infer processes on one port with one model between them, run as a user runs them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from shoal.node.ports import listeners
from tests.breakable import PATIENCE_S
from tests.infer import onnx_files
from tests.node.conftest import Start

WIDTH = 5400  # Squared, in float32: 111 MiB of weights.
WEIGHTS_MIB = WIDTH * WIDTH * 4 / 2**20
SHARED = 'max_batch_size: 16\nparameters { key: "isolation" value { string_value: "shared" } }\n'
CLEAN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)


def heavy(factor: float) -> onnx.ModelProto:
    """y = factor * x[:, :4], by way of a matrix of more than 100 MB."""
    weights = np.random.default_rng(3).random((WIDTH, WIDTH), np.float32)
    weights[:4] = 0
    weights[:4, :4] = factor * np.eye(4)
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["wide"]),
        helper.make_node("MatMul", ["wide", "w"], ["all"]),
        helper.make_node("Slice", ["all", "from", "to", "axis"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.array([0, 0, 0, WIDTH - 4]), "pads"),
        *(numpy_helper.from_array(np.array([n]), name) for n, name in ((0, "from"), (4, "to"), (1, "axis"))),
    ]
    dims = ("n", 4)
    return onnx_files.model(nodes, [("x", TensorProto.FLOAT, dims)], [("y", TensorProto.FLOAT, dims)], constants)


@pytest.fixture(scope="module")
def heavy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heavy") / "model.onnx"
    onnx.save(heavy(2.0), path)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    put(root, "light", onnx_files.scale().SerializeToString())
    return root


def put(root: Path, name: str, data: bytes | Path, version: int = 1) -> None:
    """As an operator should: a whole version appears at once."""
    fresh = root.parent / f"fresh-{name}-{version}"
    fresh.mkdir(parents=True)
    if isinstance(data, Path):
        shutil.copyfile(data, fresh / "model.onnx")
    else:
        (fresh / "model.onnx").write_bytes(data)
    (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / name / "config.pbtxt").exists():
        (root / name / "config.pbtxt").write_text(SHARED)
    fresh.rename(root / name / str(version))


def owners(launcher: int) -> list[int]:
    """The processes of shared models of a server."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            is_owner = b"services.infer.model_process.shared.owner" in (entry / "cmdline").read_bytes()
            if is_owner and f"SHOAL_PARENT_PID={launcher}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def memory_mib(pid: int) -> float:
    """What is its own: pages of files that others map, too, do not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Callers:
    """Ask without end, over connections of their own; every answer is checked, and counted by who gave it."""

    def __init__(self, address: str, model: str = "light", count: int = 8, factors: tuple[float, ...] = (2.0,)) -> None:
        self.replicas: Counter[str] = Counter()
        self.factors: Counter[float] = Counter()
        self.failed: list[grpc.RpcError] = []
        self.wrong: list[object] = []
        self._address, self._model, self._known = address, model, factors
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]

    def _ask(self, n: int) -> None:
        k = 0
        while not self._is_over.is_set():
            k += 1
            x = np.array([[n + 1, k % 97 + 1, 1, 2]], np.float32)
            request = pb.ModelInferRequest(model_name=self._model)
            request.inputs.add(name="x", datatype="FP32", shape=x.shape)
            request.raw_input_contents.append(x.tobytes())
            request.parameters["explain"].bool_param = True
            # Another connection each time: the kernel chooses the process by it.
            options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(self._address, options=options) as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                for _ in range(5):
                    self._check(stub, request, x)

    def _check(self, stub: Any, request: pb.ModelInferRequest, x: np.ndarray) -> None:
        try:
            answer = stub.ModelInfer(request, timeout=PATIENCE_S)
        except grpc.RpcError as err:
            self.failed.append(err)
            return
        y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(1, 4)
        factor = next((factor for factor in self._known if np.allclose(y, factor * x)), None)
        if factor is None:
            self.wrong.append((x, y))
            return
        self.factors[factor] += 1
        self.replicas[answer.parameters["replica"].string_param] += 1

    def more(self, replicas: int = 2, answers: int = 40) -> None:
        """Waits until so many more answers have come, from so many processes."""
        before = self.replicas.copy()
        wait_until(lambda: (self.replicas - before).total() >= answers and len(self.replicas - before) >= replicas)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def served(start: Start, root: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process, said = start(str(root), "--workers", "2", *args)
    yield process, said
    gone = [*said["pids"], *owners(process.pid)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in gone))


def test_both_answer_from_one_copy_of_the_weights(start: Start, repository: Path, heavy_file: Path) -> None:
    put(repository, "heavy", heavy_file)
    with served(start, repository) as (process, said):
        assert {model["state"] for model in said["models"]} == {"READY"}
        with Callers(said["address"], "heavy", count=4) as callers:
            callers.more()
        assert (callers.wrong, callers.failed) == ([], [])
        sizes = sorted(memory_mib(pid) for pid in owners(process.pid))
        assert len(sizes) == 2
        assert sizes[1] > WEIGHTS_MIB > sizes[0]
        assert all(memory_mib(pid) < WEIGHTS_MIB for pid in said["pids"])


def test_kill_9_of_the_owner_under_load(start: Start, repository: Path) -> None:
    with served(start, repository) as (process, said), Callers(said["address"]) as callers:
        for _ in range(3):
            callers.more()
            (owner,) = owners(process.pid)
            os.kill(owner, signal.SIGKILL)
            wait_until(lambda owner=owner: owners(process.pid) not in ([], [owner]))
        callers.more(answers=100)
        assert callers.wrong == []
        assert all(err.code() in CLEAN for err in callers.failed), callers.failed
        assert all("process" in err.details() for err in callers.failed), callers.failed


def test_kill_9_of_a_worker_takes_no_call_of_the_other(start: Start, repository: Path) -> None:
    with served(start, repository) as (process, said), Callers(said["address"]) as callers:
        callers.more()
        before = owners(process.pid)
        port = int(said["address"].rpartition(":")[2])
        for pid in said["pids"]:  # One of them has started the owner: it makes no difference.
            os.kill(pid, signal.SIGKILL)
            # Until then, the killed one listens: the next kill would leave none, and the owner ends with the last one.
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
            wait_until(lambda: listeners(port) == 2)
            callers.more()
        assert owners(process.pid) == before
        assert callers.wrong == []
        # What was at the killed process, and nothing else.
        assert all(err.code() is grpc.StatusCode.UNAVAILABLE for err in callers.failed), callers.failed


def test_followed_content_changes_with_no_failed_call_and_memory_comes_back(
    start: Start, repository: Path, heavy_file: Path, tmp_path: Path
) -> None:
    put(repository, "heavy", heavy_file)
    with served(start, repository, "--model-control", "poll", "--poll-ms", "150") as (process, said):
        before = set(owners(process.pid))
        with Callers(said["address"], factors=(2.0, 3.0)) as callers:
            callers.more()
            put(repository, "light", onnx_files.scale(3.0).SerializeToString(), version=2)
            wait_until(lambda: callers.factors[3.0] > 50)
            wait_until(lambda: len(owners(process.pid)) == 2 and set(owners(process.pid)) != before)
            seen = callers.factors[2.0]
            callers.more()
            assert callers.factors[2.0] == seen, "an old version answered after all had changed"
        assert (callers.wrong, callers.failed) == ([], [])
        (big,) = [pid for pid in owners(process.pid) if memory_mib(pid) > WEIGHTS_MIB]
        (repository / "heavy").rename(tmp_path / "away")
        wait_until(lambda: not Path(f"/proc/{big}").exists())
        assert len(owners(process.pid)) == 1


def test_kill_9_of_the_command_leaves_nothing(start: Start, repository: Path) -> None:
    process, said = start(str(repository), "--workers", "2")
    gone = [*said["pids"], *owners(process.pid)]
    assert len(gone) == 3
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in gone))


def test_one_worker_serves_a_shared_model_too(start: Start, repository: Path) -> None:
    process, said = start(str(repository))
    with Callers(said["address"], count=2) as callers:
        callers.more(replicas=1)
    assert (callers.wrong, callers.failed) == ([], [])
    (owner,) = owners(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    wait_until(lambda: not Path(f"/proc/{owner}").exists())
