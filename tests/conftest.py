"""Real parts for the tests: one etcd, mongod and object store for the whole run, a fresh place for each test."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnx
import pytest

from kernels import backend
from shoal.node import processes
from tests.free_ports import free_port
from tests.seaweedfs import WeedProcess
from tests.worker_assignment import SLOW_MARKS, PatientScheduling, is_slow

pytest_plugins = ["tests.costs"]

READY_S = 60
MONGO_IDLE_FILES_S = 20
SHARED_DATA_BYTES = 4 << 30
"""Of memory, before data is kept there. A whole run leaves 300 MB behind for each of its processes."""

# A shell that runs the tests in the background has them ignore SIGINT, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--patient", action="store_true", help="the last worker runs the files that wait (tests/worker_assignment.py)"
    )
    parser.addoption(
        "--fast", action="store_true", help="leave out what waits and what is slow (tests/worker_assignment.py)"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_left_out = config.getoption("--fast") and is_slow(collection_path.relative_to(config.rootpath).as_posix())
    return True if is_left_out else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Collect no garbage while the tests are collected: there is none, and each look at all objects takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Exclude from garbage collection what the collection of the tests has made.

    Servers run in the processes of tests, and collect garbage in full when they are quiet: with the objects of a whole
    run one such collection would stop all of them, and their test, for 4 s.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        slow = [item for item in items if not SLOW_MARKS.isdisjoint(mark.name for mark in item.iter_markers())]
        config.hook.pytest_deselected(items=slow)
        left_out = set(slow)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> PatientScheduling | None:
    return PatientScheduling(config, log) if config.getoption("--patient") else None


@pytest.fixture(autouse=True)
def _needs_a_device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not backend.device_available():
        pytest.skip("no GPU: tests marked gpu were not run")


@contextmanager
def running(part: processes.ProcessSpec, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `part` until the block ends. It is there, and ready, when the block begins."""
    with log.open("wb") as out:
        process = subprocess.Popen(part.argv, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **part.env})
    try:
        deadline = time.monotonic() + READY_S
        while not asyncio.run(part.ready()):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{part.name} did not become ready (exit {process.poll()}):\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def shared_data() -> Iterator[Path]:
    """A folder for the data of a part that all tests share and none of them kills: in memory, where there is room.

    Each test makes its own collections, with their indexes, and mongod syncs a file for each: on a disk that is a third
    of the time of a test, and no part of what it shows.
    """
    memory = Path("/dev/shm")
    # A run that was killed leaves its own behind.
    for left in memory.glob("shoal-tests-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > SHARED_DATA_BYTES
    prefix = f"shoal-tests-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=memory if has_room else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def mongo_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real mongod, the one member of replica set rs0."""
    port = free_port()
    log = tmp_path_factory.mktemp("mongod") / "mongod.log"
    with shared_data() as folder:
        spec = processes.mongod(folder, f"127.0.0.1:{port}")
        # Each test's database is some 50 files, which mongod keeps open for ten minutes: hundreds of tests would reach
        # the limit of open files, and mongod ends there.
        closing = ("--setParameter", f"wiredTigerFileHandleCloseIdleTime={MONGO_IDLE_FILES_S}")
        # Statistics that nobody reads take a hundredth of a core, more with each collection.
        unread = ("--setParameter", "diagnosticDataCollectionEnabled=false")
        # A checkpoint walks the files of all tests so far, thousands. Each minute, that took a twentieth of a core.
        rare = ("--syncdelay", "300")
        argv = [*spec.argv, *closing, *unread, *rare]
        # A node's log grows with the free space, which here is memory.
        for option, value in (("--oplogSize", "256"), ("--oplogMinRetentionHours", "0")):
            argv[argv.index(option) + 1] = value
        with running(replace(spec, argv=tuple(argv)), log):
            yield f"mongodb://127.0.0.1:{port}/?directConnection=true"


@pytest.fixture
def mongo_database() -> str:
    """The name of a database that no other test uses."""
    return f"test_{uuid.uuid4().hex[:16]}"


@pytest.fixture(scope="session")
def etcd_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real etcd of one member, `127.0.0.1:port`."""
    address, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
    log = tmp_path_factory.mktemp("etcd") / "etcd.log"
    with shared_data() as folder, running(processes.etcd(folder, address, peer), log):
        yield address


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeedProcess]:
    """A real object store that speaks S3. A test takes a place of its own there: `weed.prefix()`."""
    with WeedProcess(tmp_path_factory.mktemp("weed")) as weed:
        weed.wait_until_ready()
        yield weed


@pytest.fixture
def s3_access(weed: WeedProcess, monkeypatch: pytest.MonkeyPatch) -> WeedProcess:
    """The same, with this process' environment made such that `s3://` URLs mean it."""
    for name, value in weed.access.items():
        monkeypatch.setenv(name, value)
    return weed


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short path, for unix sockets (their paths end at 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of the environment under test."""
    return sys.executable


@pytest.fixture(scope="session")
def onnx_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small real models, all FP32 with a free batch dimension.

    `double.onnx`: x [N,4] -> y [N,4], y = 2x. `slow.onnx`: the same after about 20 ms of arithmetic a row.
    """
    folder = tmp_path_factory.mktemp("models")
    onnx.save(doubling(rounds=0), folder / "double.onnx")
    onnx.save(doubling(rounds=400), folder / "slow.onnx")
    return folder


def doubling(rounds: int) -> onnx.ModelProto:
    """y = 2x; with `rounds`, only after so many multiplications of a 128 x 128 matrix for each row of x."""
    make, dims = onnx.helper, ["N", 4]
    nodes = [make.make_node("Constant", [], ["two"], value=make.make_tensor("v", onnx.TensorProto.FLOAT, [], [2.0]))]
    if rounds:
        identity = onnx.numpy_helper.from_array(np.eye(128, dtype=np.float32), "eye")
        shapes = [("keep_in", onnx.TensorProto.BOOL, []), ("i", onnx.TensorProto.INT64, [])]
        body = make.make_graph(
            [
                make.make_node("Identity", ["keep_in"], ["keep_out"]),
                make.make_node("MatMul", ["m_in", "eye"], ["m_out"]),
            ],
            "round",
            [make.make_tensor_value_info(n, t, s) for n, t, s in (shapes[1], shapes[0])]
            + [make.make_tensor_value_info("m_in", onnx.TensorProto.FLOAT, [128, 128])],
            [
                make.make_tensor_value_info("keep_out", onnx.TensorProto.BOOL, []),
                make.make_tensor_value_info("m_out", onnx.TensorProto.FLOAT, [128, 128]),
            ],
        )
        nodes += [
            make.make_node("Shape", ["x"], ["shape"]),
            make.make_node("Gather", ["shape", "zero"], ["rows"]),
            make.make_node("Mul", ["rows", "per_row"], ["total"]),
            make.make_node("Loop", ["total", "yes", "eye"], ["m"], body=body),
            make.make_node("Gather", ["m", "zero"], ["row"]),
            make.make_node("Gather", ["row", "zero"], ["one"]),
            make.make_node("Mul", ["two", "one"], ["factor"]),
        ]
        constants = [
            identity,
            onnx.numpy_helper.from_array(np.int64(0), "zero"),
            onnx.numpy_helper.from_array(np.int64(rounds), "per_row"),
            onnx.numpy_helper.from_array(np.bool_(True), "yes"),
        ]
    else:
        nodes.append(make.make_node("Identity", ["two"], ["factor"]))
        constants = []
    nodes.append(make.make_node("Mul", ["x", "factor"], ["y"]))
    graph = make.make_graph(
        nodes,
        "doubling",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, dims)],
        constants,
    )
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9)
