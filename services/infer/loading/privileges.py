"""Models that need the operator's permission, because they run code or read the server's files and variables.

Python models                                   run code with the rights of the server
remote models with ${env:...}, ${file:...}      send variables and files of the server to another server,
or files of TLS                                 and may use its certificates
ONNX models whose settings hold a path, or      load a library, read or write any file; call any address
an address of memory
"""

from __future__ import annotations

from collections.abc import Iterator

from services.infer.error_text import quoted
from services.infer.loading.model_config import KERNELS, ONNX, REMOTE
from services.infer.runtimes.parameters import texts
from services.infer.runtimes.runtime import Runtime
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

HOW_TO_ALLOW = "allow code with --allow-code (shoal serve, shoal up), or SHOAL_INFER_ALLOW_CODE=true"

_TLS_FILES = ("ca_file", "client_certificate_file", "client_key_file")
# CUDA options whose values are pointers.
_ADDRESSES = ("gpu_external_", "user_compute_stream")


def check(config: pb.ModelConfig, runtime: Runtime) -> None:
    """Check that a model runs no code, and reads no file or variable of the server.

    Raises:
        FailedPrecondition: it does; the message says what, and how to allow it.
    """
    reason = next(_reasons(config, runtime.backend), "")
    if reason:
        raise FailedPrecondition(
            f"{reason}, which is not allowed here: {HOW_TO_ALLOW}; with a policy the caller needs the group code, too"
        )


def check_remote(runtime: Runtime) -> None:
    """Check that a model is on this server. Raises FailedPrecondition otherwise."""
    if runtime.backend == REMOTE:
        raise FailedPrecondition("a model on another server reaches an address: with a policy the caller needs code")


def _reasons(config: pb.ModelConfig, backend: str) -> Iterator[str]:
    # A backend that is not known to be harmless counts as code.
    if backend not in (ONNX, KERNELS, REMOTE):
        yield f"a model of backend {quoted(backend)} runs code"
    for key, value in texts(config).items():
        if backend == REMOTE and key.startswith("metadata.") and "${" in value:
            yield f"parameter {quoted(key)} reads a variable or file of this server"
        if backend == REMOTE and key in _TLS_FILES and value.strip():
            yield f"parameter {quoted(key)} reads a file of this server"
    for key, value in _onnx_settings(config) if backend == ONNX else ():
        if "/" in value:
            yield f"setting {quoted(key)} of ONNX Runtime names a file of this server"
        if key.startswith(_ADDRESSES):
            yield f"setting {quoted(key)} of ONNX Runtime is an address in this server's memory"


def _onnx_settings(config: pb.ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the options that ONNX Runtime and its execution providers get unchanged."""
    yield from ((key, value) for key, value in texts(config).items() if key.startswith("session."))
    accelerators = config.optimization.execution_accelerators
    for each in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        yield from each.parameters.items()
