"""Builder of the module `triton_python_backend_utils`, which Triton's Python models import."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from services.infer.model_process.hosted import MakeInnerCall
from services.infer.model_process.python import triton_types
from services.infer.model_process.python.triton_config import ModelConfig
from services.infer.model_process.python.triton_request import (
    MEMORY_CPU,
    MEMORY_CPU_PINNED,
    MEMORY_DEFAULT,
    MEMORY_GPU,
    RESPONSE_COMPLETE_FINAL,
    InferenceRequest,
    InferenceResponse,
    PreferredMemory,
    ResponseSender,
)
from services.infer.model_process.python.triton_tensor import TritonTensor
from services.infer.model_process.python.triton_types import TritonError, TritonModelException

NAME = "triton_python_backend_utils"

_NOT_DONE = {
    "Metric": "custom metrics",
    "MetricFamily": "custom metrics",
    "load_model": "loading models from a model",
    "unload_model": "unloading models from a model",
    "is_model_ready": "asking for other models",
    "ModelInstanceDevice": "devices",
    "new_shm": "shared memory regions",
}


class Logger:
    """`pb_utils.Logger`: writes to standard error, which the server logs."""

    INFO, WARNING, ERROR, VERBOSE = range(4)

    @staticmethod
    def log(msg: str, level: int = 0) -> None:
        name = ("info", "warning", "error", "verbose")[level] if 0 <= level <= 3 else "info"
        print(f"[{name}] {msg}", file=sys.stderr, flush=True)

    @staticmethod
    def log_info(msg: str) -> None:
        Logger.log(msg, Logger.INFO)

    @staticmethod
    def log_warn(msg: str) -> None:
        Logger.log(msg, Logger.WARNING)

    @staticmethod
    def log_error(msg: str) -> None:
        Logger.log(msg, Logger.ERROR)

    @staticmethod
    def log_verbose(msg: str) -> None:
        """Drop the message, as Triton does unless verbose logging is on."""


class LogLevel:
    """Levels of `Logger.log`."""

    INFO, WARNING, ERROR, VERBOSE = range(4)


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> TritonTensor | None:
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> TritonTensor | None:
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    return next((tensor for tensor in model_config.get("input", ()) if tensor["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    return next((tensor for tensor in model_config.get("output", ()) if tensor["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def provide(version_folder: Path, call: MakeInnerCall | None) -> ModuleType:
    """Make the module importable. `call` runs calls of other models; None: such calls are rejected."""
    module = ModuleType(NAME, "Triton's utilities for Python models.")
    contents: dict[str, Any] = {
        "Tensor": TritonTensor,
        "InferenceRequest": type(
            "InferenceRequest", (InferenceRequest,), {"_call": staticmethod(call) if call else None}
        ),
        "InferenceResponse": InferenceResponse,
        "InferenceResponseSender": ResponseSender,
        "TritonError": TritonError,
        "TritonModelException": TritonModelException,
        "ModelConfig": ModelConfig,
        "Logger": Logger,
        "LogLevel": LogLevel,
        "PreferredMemory": PreferredMemory,
        "TRITONSERVER_MEMORY_CPU": MEMORY_CPU,
        "TRITONSERVER_MEMORY_CPU_PINNED": MEMORY_CPU_PINNED,
        "TRITONSERVER_MEMORY_GPU": MEMORY_GPU,
        "TRITONBACKEND_MEMORY_DEFAULT": MEMORY_DEFAULT,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": RESPONSE_COMPLETE_FINAL,
        "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START": 1,
        "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END": 2,
        "TRITONSERVER_REQUEST_RELEASE_ALL": 1,
        "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE": 2,
        "get_model_dir": lambda: str(version_folder),
        "get_input_tensor_by_name": get_input_tensor_by_name,
        "get_output_tensor_by_name": get_output_tensor_by_name,
        "get_input_config_by_name": get_input_config_by_name,
        "get_output_config_by_name": get_output_config_by_name,
        "using_decoupled_model_transaction_policy": using_decoupled_model_transaction_policy,
        "__getattr__": _missing,
    }
    for name in vars(triton_types):
        if name.startswith("TRITON_") or name.endswith("_type") or name.endswith("_numpy") or name.endswith("_tensor"):
            contents[name] = getattr(triton_types, name)
    contents["NUMPY_TO_TRITON_TYPE"] = triton_types.NUMPY_TO_TRITON_TYPE
    vars(module).update(contents)
    sys.modules[NAME] = module
    return module


def _missing(name: str) -> NoReturn:
    if name in _NOT_DONE:
        raise AttributeError(f"{NAME}.{name}: {_NOT_DONE[name]} from a Python model are not supported by Shoal")
    raise AttributeError(f"module '{NAME}' has no attribute '{name}'")
