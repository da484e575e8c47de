"""ONNX Runtime on a GPU stream: rows are written once, copied once, joined where they are, and waited for once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.infer.requests.resident import Resident, fetched, joined
from services.infer.runtimes import onnx_gpu_session
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.onnx_devices import CUDA, TENSORRT, Device
from services.infer.runtimes.onnx_gpu_session import GpuStreamSession
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.onnx_settings import session_options
from services.infer.runtimes.runtime import ExecutionPlacement, ModelFailed, SessionOptions
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import floats
from tests.infer.runtimes.simulated_gpu import SimulatedGpuOnnx, SimulatedMemory, gpu_streams_of

ON_GPU = SessionOptions(1, shares_stream=True, placements=(ExecutionPlacement("gpu", 0, 2),))


@pytest.fixture
def memory() -> SimulatedMemory:
    return SimulatedMemory()


@pytest.fixture
def add(memory: SimulatedMemory, tmp_path: Path) -> GpuStreamSession:
    """sum = a + b, difference = a - b."""
    return loaded(memory, tmp_path, onnx_files.add())


def loaded(memory: SimulatedMemory, folder: Path, model) -> GpuStreamSession:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = SimulatedGpuOnnx(gpu_streams_of(memory)).load(folder / "model.onnx", ON_GPU)
    assert isinstance(session, GpuStreamSession)
    return session


def test_rows_of_several_requests_are_one_copy_to_the_gpu(add, memory):
    a, b = [floats([1, 2]), floats([3, 4], [5, 6])], [floats([10, 20]), floats([30, 40], [50, 60])]
    total, difference = add.run_parts({"a": a, "b": b}, ["sum", "difference"])
    assert total.tolist() == [[11, 22], [33, 44], [55, 66]]
    assert difference.tolist() == [[-9, -18], [-27, -36], [-45, -54]]
    assert (memory.copies_in, memory.copies_out) == (1, 2)


def test_outputs_kept_on_the_gpu_are_inputs_again_without_a_copy(add, memory):
    a, b = floats([1, 2], [3, 4]), floats([10, 20], [30, 40])
    total, difference = add.run_parts({"a": [a], "b": [b]}, ["sum", "difference"], {"sum"})
    assert isinstance(total, Resident)
    assert (total.shape, total.dtype, total.nbytes, total.ndim, len(total)) == ((2, 2), np.float32, 16, 2, 2)
    assert difference.tolist() == (a - b).tolist()
    memory.forget()
    (left,) = add.run_parts({"a": [total], "b": [total]}, ["sum"], {"sum"})
    assert (memory.copies_out, memory.joins) == (0, 0)
    parts = [left[:1], left[1:], left]
    (again,) = add.run_parts({"a": parts, "b": parts}, ["sum"])
    assert again.tolist() == np.concatenate([4 * (a + b)] * 2).tolist()
    assert (memory.copies_out, memory.joins) == (1, 2)


def test_host_and_gpu_inputs_in_one_run(add):
    a = floats([1, 2])
    (there,) = add.run_parts({"a": [a], "b": [a]}, ["sum"], {"sum"})
    (got,) = add.run_parts({"a": [there], "b": [a]}, ["difference"])
    assert got.tolist() == [[1, 2]]


def test_a_kept_output_outlives_its_inputs(memory, tmp_path):
    session = loaded(memory, tmp_path, onnx_files.identity())
    made = [session.run_parts({"x": [floats([n, n, n, n])]}, ["y"], {"y"})[0] for n in range(50)]
    assert [value.tolist() for value in fetched(made)] == [[[n] * 4] for n in range(50)]


def test_reading_a_kept_output_on_the_host_is_an_error(add):
    (there,) = add.run_parts({"a": [floats([1, 2])], "b": [floats([1, 2])]}, ["sum"], {"sum"})
    for read in (np.asarray, lambda value: np.add(value, 1), lambda value: value[0], lambda value: np.stack([value])):
        with pytest.raises(TypeError, match="GPU"):
            read(there)
    assert joined([there, there]).shape == (2, 2)
    host = floats([9])
    assert fetched([host]) == [host]
    got = fetched([host, there, there[:0]])
    assert [value.tolist() for value in got] == [[[9]], [[2, 4]], []]


def test_no_rows(add, memory):
    none = np.empty((0, 2), np.float32)
    total, difference = add.run_parts({"a": [none], "b": [none]}, ["sum", "difference"], {"difference"})
    assert total.shape == (0, 2)
    assert difference.shape == (0, 2)


def test_batches_larger_than_the_ring_and_than_the_largest_slot(add, memory, monkeypatch):
    monkeypatch.setattr(onnx_gpu_session, "_LARGEST_SLOT", 1 << 16)
    for rows in (1, 3, 1000, 5, 20_000, 2):
        a = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
        memory.forget()
        (got,) = add.run_parts({"a": [a], "b": [a]}, ["sum"])
        np.testing.assert_array_equal(got, 2 * a)
        assert memory.copies_in == 1


def test_many_threads(add):
    def run(n: int) -> bool:
        a = np.full((n % 7 + 1, 2), n, np.float32)
        (there,) = add.run_parts({"a": [a, a], "b": [a, a]}, ["sum"], {"sum"})
        (got,) = add.run_parts({"a": [there], "b": [there]}, ["sum"])
        return bool((got == 4 * n).all()) and len(got) == 2 * len(a)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(300)))


def test_a_failed_run_releases_its_slot(memory, tmp_path):
    session = loaded(memory, tmp_path, onnx_files.lookup())
    for _ in range(5):  # More often than there are slots.
        with pytest.raises(ModelFailed, match="Gather"):
            session.run({"i": np.array([[7]])}, ["y"])
    assert session.run({"i": np.array([[2]])}, ["y"])[0].tolist() == [[30]]


def test_the_gpu_stream_parameter_selects_the_session(tmp_path):
    config = pb.ModelConfig(parameters={"gpu_stream": {"string_value": "shared"}})
    assert session_options(config, 1).shares_stream
    assert not session_options(pb.ModelConfig(), 1).shares_stream
    config.parameters["gpu_stream"].string_value = "mine"
    with pytest.raises(FailedPrecondition, match="gpu_stream 'mine': expected 'own' or 'shared'"):
        session_options(config, 1)


def test_unsupported_combinations_are_named(tmp_path):
    accelerated = Device([(TENSORRT, {}), (CUDA, {})], 0)
    with pytest.raises(FailedPrecondition, match="gpu_stream 'shared' is for CUDAExecutionProvider, not for Tensorrt"):
        accelerated.with_option(CUDA, "user_compute_stream", "1")
    assert Device([(CUDA, {"device_id": "0"})], 0).with_option(CUDA, "a", "b").providers == [
        (CUDA, {"device_id": "0", "a": "b"})
    ]
    with pytest.raises(FailedPrecondition, match=r"GPU 3 does not exist: this process may use 1 GPUs"):
        gpu_streams_of(SimulatedMemory()).of(3)
    with pytest.raises(FailedPrecondition, match="this process may use 2 GPUs, and cupy"):
        GpuStreams(lambda: 2, lambda gpu: SimulatedMemory(), lambda: False).of(0)


def test_each_gpu_has_one_stream():
    gpu_streams = GpuStreams(lambda: 2, lambda gpu: SimulatedMemory(), lambda: True)
    assert gpu_streams.of(0) is gpu_streams.of(0)
    assert gpu_streams.of(0) is not gpu_streams.of(1)


@pytest.mark.gpu
def test_a_real_gpu_returns_the_results_of_the_cpu(tmp_path):
    (tmp_path / "model.onnx").write_bytes(onnx_files.add().SerializeToString())
    there = OnnxRuntime().load(tmp_path / "model.onnx", ON_GPU)
    assert isinstance(there, GpuStreamSession)
    rng = np.random.default_rng(0)
    for rows in (1, 7, 300):
        a, b = rng.random((rows, 5), np.float32), rng.random((rows, 5), np.float32)
        total, difference = there.run_parts({"a": [a, a], "b": [b, b]}, ["sum", "difference"], {"sum"})
        np.testing.assert_array_equal(difference, np.concatenate([a - b] * 2))
        (got,) = there.run_parts({"a": [total[:rows], total[rows:]], "b": [total[rows:], total[:rows]]}, ["difference"])
        assert not got.any()
        np.testing.assert_array_equal(fetched([total])[0], np.concatenate([a + b] * 2))
