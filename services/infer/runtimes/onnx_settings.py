"""Reader of a configuration's settings for ONNX Runtime, with the names of Triton's backend.

    optimization.graph.level             0 all of it, -1 basic, 1 basic and extended, 2 none
    parameters                           intra_op_thread_count, inter_op_thread_count, execution_mode, enable_mem_arena,
                                         enable_mem_pattern, memory.enable_memory_arena_shrinkage, session.<its own>
                                         gpu_stream (`gpu_stream`): own, or shared with operators and other models
    optimization.execution_accelerators  tensorrt, cuda (on GPUs), openvino (on the CPU), with their parameters
    instance_group                       KIND_CPU; KIND_GPU on its gpus, or on all; KIND_AUTO: on GPUs if there are any

Loading a model checks that this build of ONNX Runtime supports the settings, and that the GPUs exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from services.infer.error_text import enumerated, quoted
from services.infer.runtimes.onnx_devices import CUDA, OPENVINO, TENSORRT
from services.infer.runtimes.parameters import number, texts
from services.infer.runtimes.runtime import ExecutionPlacement, Provider, SessionOptions
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

THREADS = "intra_op_thread_count"
"""The parameter for the number of threads of one execution."""

_MAX_THREADS = 1024
_LEVELS = (-1, 0, 1, 2)
_FLAGS = {"0": False, "1": True, "false": False, "true": True}
_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_SHRINKING = re.compile(r"(cpu|gpu):\d{1,4}(;(cpu|gpu):\d{1,4})*")

_CUDA_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "gpu_mem_limit": {},
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
    "do_copy_in_default_stream": {},
}
"""CUDA options that older configurations have among the model's parameters, with ONNX Runtime's names for numbers."""

_TENSORRT_PARAMETERS = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}

_KINDS = {
    pb.ModelInstanceGroup.KIND_AUTO: "auto",
    pb.ModelInstanceGroup.KIND_CPU: "cpu",
    pb.ModelInstanceGroup.KIND_GPU: "gpu",
}


def session_options(config: pb.ModelConfig, threads: int) -> SessionOptions:
    """Return the options of a configuration; `threads` is the default number of threads.

    Raises:
        FailedPrecondition: a value is invalid or out of range; the message names the setting.
    """
    values = texts(config)
    level = config.optimization.graph.level
    if level not in _LEVELS:
        raise FailedPrecondition(
            f"optimization.graph.level {level}: expected 0 (all), -1 (basic), 1 (extended), 2 (none)"
        )
    inter_op = number(values, "inter_op_thread_count", 0, 0, _MAX_THREADS)
    # Threads between operators work in the parallel mode only, so a number above 1 turns that mode on.
    is_parallel = _flag(values, "execution_mode", inter_op > 1)
    return SessionOptions(
        intra_op_threads=number(values, THREADS, 0, 0, _MAX_THREADS) or threads,
        inter_op_threads=inter_op or (threads if is_parallel else 1),
        graph_level=level,
        is_parallel=is_parallel,
        has_arena=_flag(values, "enable_mem_arena", True),
        has_pattern=_flag(values, "enable_mem_pattern", True),
        entries={key: value for key, value in values.items() if key.startswith("session.")},
        run_entries=_run_entries(values),
        shares_stream=_shares_stream(values),
        placements=tuple(_placements(config.instance_group)),
        gpu_providers=_gpu_providers(config, values),
        cpu_providers=_cpu_providers(config),
    )


def _shares_stream(values: Mapping[str, str]) -> bool:
    value = values.get("gpu_stream", "own").strip()
    if value not in ("own", "shared"):
        raise FailedPrecondition(f"parameter gpu_stream {quoted(value)}: expected 'own' or 'shared'")
    return value == "shared"


def _placements(groups: Iterable[pb.ModelInstanceGroup]) -> Iterator[ExecutionPlacement]:
    for group in list(groups) or [pb.ModelInstanceGroup()]:
        kind, count = _KINDS.get(group.kind), group.count or 1
        if kind is None:
            name = enumerated(group.Kind.DESCRIPTOR, group.kind)
            raise FailedPrecondition(f"instance_group: {name} is not supported")
        if group.gpus and kind == "cpu":
            raise FailedPrecondition(f"instance_group: KIND_CPU with gpus {list(group.gpus)}: expected KIND_GPU")
        for gpu in group.gpus or (None,):
            yield ExecutionPlacement("gpu" if group.gpus else kind, gpu, count)


def _gpu_providers(config: pb.ModelConfig, values: Mapping[str, str]) -> tuple[Provider, ...]:
    cuda = {key: names.get(values[key], values[key]) for key, names in _CUDA_PARAMETERS.items() if key in values}
    accelerators = list(config.optimization.execution_accelerators.gpu_execution_accelerator)
    providers = []
    for accelerator in accelerators:
        if accelerator.name == "tensorrt":
            providers.append(Provider("tensorrt", TENSORRT, _tensorrt(accelerator.parameters)))
        elif accelerator.name == "cuda":
            cuda |= dict(accelerator.parameters)
        else:
            raise _unsupported("gpu_execution_accelerator", accelerator.name, "'tensorrt' or 'cuda'")
    is_cuda_named = cuda or any(accelerator.name == "cuda" for accelerator in accelerators)
    return (*providers, Provider("cuda", CUDA, cuda)) if providers or is_cuda_named else ()


def _tensorrt(parameters: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in parameters.items():
        if key == "precision_mode":
            if value not in _PRECISIONS:
                raise FailedPrecondition(f"accelerator 'tensorrt': precision_mode {quoted(value)}: FP32, FP16 or INT8")
            options |= _PRECISIONS[value]
        elif key in _TENSORRT_PARAMETERS or key.startswith("trt_"):
            options[_TENSORRT_PARAMETERS.get(key, key)] = value
        else:
            raise FailedPrecondition(f"accelerator 'tensorrt': parameter {quoted(key)} is not supported")
    return options


def _cpu_providers(config: pb.ModelConfig) -> tuple[Provider, ...]:
    providers = []
    for accelerator in config.optimization.execution_accelerators.cpu_execution_accelerator:
        if accelerator.name != "openvino":
            raise _unsupported("cpu_execution_accelerator", accelerator.name, "'openvino'")
        providers.append(Provider("openvino", OPENVINO, dict(accelerator.parameters)))
    return tuple(providers)


def _unsupported(setting: str, name: str, supported: str) -> FailedPrecondition:
    return FailedPrecondition(f"{setting} {quoted(name)} is not supported: expected {supported}")


def _run_entries(values: Mapping[str, str]) -> dict[str, str]:
    devices = values.get(_SHRINKAGE)
    if not devices:
        return {}
    # ONNX Runtime checks the value in each run only.
    if not _SHRINKING.fullmatch(devices):
        raise FailedPrecondition(f"parameter {_SHRINKAGE} {quoted(devices)}: expected devices such as 'cpu:0;gpu:0'")
    return {_SHRINKAGE: devices}


def _flag(values: Mapping[str, str], key: str, default: bool) -> bool:
    if key not in values:
        return default
    flag = _FLAGS.get(values[key].strip().lower())
    if flag is None:
        raise FailedPrecondition(f"parameter {key} {quoted(values[key])}: expected 0 or 1")
    return flag
