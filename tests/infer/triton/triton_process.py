"""A real Triton Inference Server: the binary in the wheel `nvidia-pytriton`, with its python backend, on the CPU.

None of pytriton's own Python is used: the server is started as an operator would start it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.free_ports import free_port
from tests.infer.conformance import wire

READY_S = 60


@dataclass(frozen=True)
class Triton:
    """Addresses of a running Triton."""

    grpc: str
    http: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running(environment: Path, root: Path, work: Path) -> Iterator[Triton]:
    """Serves the repository `root` until the block ends; gives the addresses.

    Args:
        environment: the virtual environment with the wheel.
        work: an empty folder, for the backend and the log.
    """
    with started(environment, root, work) as triton:
        _wait(triton)
        yield triton


@contextmanager
def started(
    environment: Path,
    root: Path,
    work: Path,
    *,
    host: str = "127.0.0.1",
    within: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Iterator[Triton]:
    """Starts a server, as `running` does, without waiting until it is ready.

    Args:
        within: command that runs the server's command.
        options: further options of the server.
    """
    packages = next(environment.glob("lib/python3*/site-packages"), None)
    if packages is None:
        pytest.fail("real Triton has an environment of its own: run `make .venv-triton/.installed`")
    port, http_port, log = free_port(), free_port(), work / "triton.log"
    command = [
        *within,
        str(packages / "pytriton/tritonserver/bin/tritonserver"),
        f"--model-repository={root}",
        f"--backend-directory={_backends(packages, work)}",
        "--model-control-mode=explicit",
        "--load-model=*",
        # Each model would be started twice otherwise, and half a minute be lost.
        "--disable-auto-complete-config",
        "--model-load-thread-count=4",
        f"--http-address={host}",
        f"--http-port={http_port}",
        "--allow-metrics=false",
        f"--grpc-address={host}",
        f"--grpc-port={port}",
        "--exit-on-error=false",
        *options,
    ]
    variables = _variables(environment, packages)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables)
    try:
        yield Triton(f"{host}:{port}", f"{host}:{http_port}", process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _backends(packages: Path, work: Path) -> Path:
    """A folder with the python backend, and the stub for this version of Python beside it, where Triton looks for it.

    The stub embeds an interpreter that heeds neither PYTHONHOME nor PYTHONPATH for packages. So the module that models
    import first is given a line that says where the environment's packages are: with a NumPy 2 from elsewhere, this
    Triton responds with outputs that have a shape and no bytes.
    """
    triton, python = packages / "pytriton/tritonserver", packages.parent.name.removeprefix("python")
    folder = work / "backends/python"
    shutil.copytree(triton / "backends/python", folder)
    shutil.copy(triton / "python_backend_stubs" / python / "triton_python_backend_stub", folder)
    module = folder / "triton_python_backend_utils.py"
    module.write_text(f"import sys; sys.path.insert(0, {str(packages)!r})\n" + module.read_text())
    return folder.parent


def _variables(environment: Path, packages: Path) -> dict[str, str]:
    """Where the stub finds its interpreter."""
    ask = "import sys; print(sys.base_prefix)"
    base = subprocess.run([environment / "bin/python", "-c", ask], capture_output=True, text=True, check=True)
    prefix = base.stdout.strip()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SHOAL_"))}
    return {**clean, "PYTHONHOME": prefix, "LD_LIBRARY_PATH": f"{prefix}/lib:{packages / 'nvidia_pytriton.libs'}"}


def _wait(triton: Triton) -> None:
    deadline = time.monotonic() + READY_S
    with grpc.insecure_channel(triton.grpc, options=wire.OPTIONS) as channel:
        while True:
            try:
                if GRPCInferenceServiceStub(channel).ServerReady(pb.ServerReadyRequest(), timeout=2).ready:
                    return
            except grpc.RpcError:
                pass
            if triton.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"Triton did not become ready (exit {triton.process.poll()}):\n{triton.log.read_text()[-4000:]}"
                )
            time.sleep(0.1)
