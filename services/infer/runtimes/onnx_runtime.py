"""Runtime of .onnx files: makes one session (`onnx_session`) for each device of a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from services.infer.runtimes import gpus, onnx_arena, onnx_devices, onnx_graph
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.multi_device import MultiDeviceSession
from services.infer.runtimes.onnx_devices import CUDA, Device
from services.infer.runtimes.onnx_gpu_session import GpuStreamSession
from services.infer.runtimes.onnx_session import OnnxSession, plain
from services.infer.runtimes.runtime import Session, SessionOptions
from shoal.errors import FailedPrecondition

# Usage data of Shoal's users is not sent to the authors of ONNX Runtime.
onnxruntime.disable_telemetry_events()

_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

# FATAL: ONNX Runtime raises its errors, and Shoal logs them in its own format.
_LOG_SEVERITY = 4


class OnnxRuntime:
    """Runtime of .onnx files in this process."""

    platform = "onnxruntime_onnx"
    backend = "onnxruntime"
    model_file = "model.onnx"
    can_decouple = False

    def __init__(self, gpu_streams: GpuStreams | None = None) -> None:
        """`gpu_streams`: for models with the parameter `gpu_stream: shared`."""
        self._gpu_streams = gpu_streams or GpuStreams()
        onnxruntime.set_default_logger_severity(_LOG_SEVERITY)

    def load(self, file: Path, options: SessionOptions) -> Session:
        sessions: list[tuple[OnnxSession, int]] = []
        try:
            for device, count in self.devices(options):
                sessions.append((self._on(device, file, options, count), count))
        except BaseException:
            for session, _ in sessions:
                session.close()
            raise
        return sessions[0][0] if len(sessions) == 1 else MultiDeviceSession(sessions)

    def devices(self, options: SessionOptions) -> list[tuple[Device, int]]:
        """Return the devices of a model with `options`, each with its concurrent executions."""
        return devices(options)

    def _on(self, device: Device, file: Path, options: SessionOptions, runs: int) -> OnnxSession:
        if device.gpu is None or not options.shares_stream:
            session, may_not_end = _session(file, options, device), bool(onnx_graph.operator_by_values(file))
            return OnnxSession(session, options.run_entries, device.gpu, may_not_end=may_not_end)
        gpu_stream = self._gpu_streams.of(device.gpu)
        if gpu_stream.memory.name == "cuda":
            device = device.with_option(CUDA, "user_compute_stream", str(gpu_stream.stream.ptr))
        return GpuStreamSession(_session(file, options, device), options.run_entries, gpu_stream, runs)


def devices(options: SessionOptions) -> list[tuple[Device, int]]:
    """Return the devices of this machine for `options`, each with its concurrent executions.

    Raises:
        FailedPrecondition: a requested device or provider is missing.
    """
    return onnx_devices.resolve_devices(options, onnxruntime.get_available_providers(), gpus.count)


def _session(file: Path, options: SessionOptions, device: Device) -> Any:
    given_up = options.about.given_up if options.about is not None else GivenUp()
    try:
        settings = _settings(options, device)
        with given_up.calling(partial(settings.set_load_cancellation_flag, True)):
            session = onnxruntime.InferenceSession(str(file), settings, providers=[*device.providers])
    # ONNX Runtime raises one class for each error code, RuntimeError, and more.
    except Exception as err:
        raise FailedPrecondition(f"ONNX Runtime cannot load {file.name}: {plain(err, file)}") from err
    # ONNX Runtime continues without a provider that fails to start, and reports that in its log only.
    if missing := device.names - set(session.get_providers()):
        raise FailedPrecondition(
            f"ONNX Runtime cannot start {', '.join(sorted(missing))}: a library or device is missing"
        )
    return session


def _settings(options: SessionOptions, device: Device) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _LOG_SEVERITY
    settings.intra_op_num_threads = options.intra_op_threads
    settings.inter_op_num_threads = options.inter_op_threads
    settings.enable_cpu_mem_arena = options.has_arena
    settings.enable_mem_pattern = options.has_pattern
    settings.graph_optimization_level = _LEVELS[options.graph_level]
    if options.is_parallel:
        settings.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    # Threads that spin while they wait for work would take CPU time from other models and processes.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    shared = onnx_arena.entries() if options.has_arena and device.is_cpu_alone else {}
    for key, value in {**shared, **options.entries}.items():
        settings.add_session_config_entry(key, value)
    return settings
