"""ONNX Runtime, as a `Runtime`.

numbers   NumPy arrays go in and come out without a copy
BYTES     ONNX strings are UTF-8 text: `str` in memory
BF16      NumPy has no such type: 16-bit patterns go in and come out by way of OrtValue
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from services.infer.calls.datatypes import BY_NAME, Datatype
from services.infer.calls.signature import TensorSpec
from services.infer.calls.tensors import Tensor
from services.infer.runtimes import gpus, onnx_devices
from services.infer.runtimes.lane import Lanes
from services.infer.runtimes.onnx_devices import Device
from services.infer.runtimes.onnx_settings import CUDA
from services.infer.runtimes.runtime import ModelFailed, Session, SessionOptions
from services.infer.runtimes.spread import SpreadSession
from shoal.errors import FailedPrecondition

# What it reports of its use to its makers is not ours to give away.
onnxruntime.disable_telemetry_events()

_DATATYPES = {
    "tensor(bool)": BY_NAME["BOOL"],
    "tensor(uint8)": BY_NAME["UINT8"],
    "tensor(uint16)": BY_NAME["UINT16"],
    "tensor(uint32)": BY_NAME["UINT32"],
    "tensor(uint64)": BY_NAME["UINT64"],
    "tensor(int8)": BY_NAME["INT8"],
    "tensor(int16)": BY_NAME["INT16"],
    "tensor(int32)": BY_NAME["INT32"],
    "tensor(int64)": BY_NAME["INT64"],
    "tensor(float16)": BY_NAME["FP16"],
    "tensor(bfloat16)": BY_NAME["BF16"],
    "tensor(float)": BY_NAME["FP32"],
    "tensor(double)": BY_NAME["FP64"],
    "tensor(string)": BY_NAME["BYTES"],
}

_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16 of onnx.proto.

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

    def __init__(self, lanes: Lanes | None = None) -> None:
        """`lanes`: of the GPUs, for models that ask for it (parameter `gpu_stream`)."""
        self._lanes = lanes or Lanes()
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
        from services.infer.runtimes.onnx_lane import LaneSession

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


def _run_options(entries: Mapping[str, str]) -> Any:
    if not entries:
        return None
    options = onnxruntime.RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


class OnnxSession(Session):
    """One model in ONNX Runtime."""

    text = True

    def __init__(self, session: Any, run_entries: Mapping[str, str] | None = None, gpu: int | None = None) -> None:
        """Raises FailedPrecondition when an input or output is no tensor of a known datatype."""
        self.gpus = () if gpu is None else (gpu,)
        self.only_computes = gpu is None  # On a GPU, a thread that runs it waits.
        self._run_options = _run_options(run_entries or {})
        # Initializers that the file lists among its inputs are their own default: a configuration may name them.
        self.optional_inputs = tuple(
            replace(_spec(arg, "input"), is_optional=True) for arg in session.get_overridable_initializers()
        )
        self.inputs = tuple(_spec(arg, "input") for arg in session.get_inputs())
        self.outputs = tuple(_spec(arg, "output") for arg in session.get_outputs())
        self._session = session
        # Beneath ONNX Runtime's own Python, whose checks of each call cost a quarter of a small model's run: requests
        # are checked already.
        self._run = getattr(session, "_sess", session).run
        self.specs = (*self.outputs, *self.inputs, *self.optional_inputs)
        self._needs_ort_values = any(spec.datatype.name == "BF16" for spec in self.specs)
        self._datatypes = {spec.name: spec.datatype for spec in self.specs}

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        try:
            if self._needs_ort_values:
                return self._run_ort_values(inputs, outputs)
            feed = inputs if isinstance(inputs, dict) else dict(inputs)
            results: list[Tensor] = self._run(
                outputs if isinstance(outputs, list) else list(outputs), feed, self._run_options
            )
        except Exception as err:  # As above: no common class.
            raise ModelFailed(plain(err)) from err
        for n, result in enumerate(results):
            for array in feed.values():
                # An output that is an input's memory would change when the buffer of a batch is used again.
                if np.may_share_memory(result, array):
                    results[n] = result.copy()
        return results

    def _run_ort_values(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        feed = {name: _ort_value(array, self._datatypes[name]) for name, array in inputs.items()}
        return [_array(value) for value in self._session.run_with_ort_values(list(outputs), feed, self._run_options)]

    def close(self) -> None:
        self._session = self._run = None
        _return_freed_memory()


def _spec(arg: Any, role: str) -> TensorSpec:
    datatype = _DATATYPES.get(arg.type)
    if datatype is None:
        raise FailedPrecondition(
            f"{role} '{arg.name}' is a {arg.type}: only tensors of {', '.join(BY_NAME)} are served"
        )
    return TensorSpec(arg.name, datatype, tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in arg.shape))


def _ort_value(array: Tensor, datatype: Datatype) -> Any:
    if datatype.name == "BF16":
        contiguous = np.ascontiguousarray(array)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, _ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Tensor:
    if value.element_type() != _ONNX_BFLOAT16:
        array: Tensor = np.array(value.numpy())
        return array
    size = 2 * int(np.prod(value.shape()))
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, "<u2").reshape(value.shape())


_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"^Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ")
_SOURCE = re.compile(r"/\S+\.(?:h|cc|cpp|hpp|cu|cuh):\d+ (?:[^()]*\([^()]*\) (?:const )?)?(?:\[[^\]]*\] )?")


def plain(error: Exception, file: Path | None = None) -> str:
    """ONNX Runtime's message without its codes, source files and our folders."""
    message = _STATUS.sub("", str(error)).removeprefix("Error in execution: ")  # The latter: of bound runs.
    if file is not None:
        message = message.replace(str(file), file.name).replace(str(file.parent), ".")
    node = _NODE.match(message)
    message = _SOURCE.sub("", _NODE.sub("", message))
    where = f" (node '{node[2] or node[1]}')" if node else ""
    return " ".join(message.split())[:1000] + where


def _return_freed_memory() -> None:
    # glibc keeps what was freed for itself; a model that was unloaded should be seen to leave.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
