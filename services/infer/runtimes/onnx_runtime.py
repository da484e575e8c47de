"""ONNX Runtime, as a `Runtime`: from a file and the options of its configuration to sessions (`onnx_session`), one for
each device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from services.infer.runtimes import gpus, onnx_devices
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.multi_device import SpreadSession
from services.infer.runtimes.onnx_devices import CUDA, Device
from services.infer.runtimes.onnx_gpu_session import LaneSession
from services.infer.runtimes.onnx_session import OnnxSession, plain
from services.infer.runtimes.runtime import Session, SessionOptions
from shoal.errors import FailedPrecondition

# What it reports of its use to its makers is not ours to give away.
onnxruntime.disable_telemetry_events()

_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_NOTHING = 4  # Severity FATAL: what goes wrong is raised, and logged by us, in our format.


class OnnxRuntime:
    """Loads .onnx files."""

    platform = "onnxruntime_onnx"
    backend = "onnxruntime"
    model_file = "model.onnx"
    can_decouple = False

    def __init__(self, lanes: GpuStreams | None = None) -> None:
        """`lanes`: of the GPUs, for models that ask for it (parameter `gpu_stream`)."""
        self._lanes = lanes or GpuStreams()
        onnxruntime.set_default_logger_severity(_NOTHING)

    def load(self, file: Path, options: SessionOptions) -> Session:
        sessions: list[tuple[OnnxSession, int]] = []
        try:
            for device, count in self.devices(options):
                sessions.append((self._on(device, file, options, count), count))
        except BaseException:
            for session, _ in sessions:
                session.close()
            raise
        return sessions[0][0] if len(sessions) == 1 else SpreadSession(sessions)

    def devices(self, options: SessionOptions) -> list[tuple[Device, int]]:
        """Where it will run, with the executions at a time. Raises FailedPrecondition."""
        return devices(options)

    def _on(self, device: Device, file: Path, options: SessionOptions, runs: int) -> OnnxSession:
        if device.gpu is None or not options.shares_stream:
            return OnnxSession(_session(file, options, device), options.run_entries, device.gpu)
        lane = self._lanes.of(device.gpu)
        if lane.memory.name == "cuda":
            device = device.with_option(CUDA, "user_compute_stream", str(lane.stream.ptr))
        return LaneSession(_session(file, options, device), options.run_entries, lane, runs)


def devices(options: SessionOptions) -> list[tuple[Device, int]]:
    """Where a model will run on this machine, with the executions at a time. Raises FailedPrecondition."""
    return onnx_devices.resolved(options, onnxruntime.get_available_providers(), gpus.count)


def _session(file: Path, options: SessionOptions, device: Device) -> Any:
    try:
        session = onnxruntime.InferenceSession(str(file), _settings(options), providers=[*device.providers])
    except Exception as err:  # It raises a class of its own for each code, RuntimeError, and more.
        raise FailedPrecondition(f"ONNX Runtime cannot load {file.name}: {plain(err, file)}") from err
    if missing := device.names - set(session.get_providers()):  # It goes on without, and says so only in its log.
        raise FailedPrecondition(
            f"ONNX Runtime cannot start {', '.join(sorted(missing))}: a library or device is missing"
        )
    return session


def _settings(options: SessionOptions) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _NOTHING
    settings.intra_op_num_threads = options.intra_op_threads
    settings.inter_op_num_threads = options.inter_op_threads
    settings.enable_cpu_mem_arena = options.has_arena
    settings.enable_mem_pattern = options.has_pattern
    settings.graph_optimization_level = _LEVELS[options.graph_level]
    if options.is_parallel:
        settings.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    # Threads that spin while they wait for work would take the cores of the models and processes beside them.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    for key, value in options.entries.items():
        settings.add_session_config_entry(key, value)
    return settings
