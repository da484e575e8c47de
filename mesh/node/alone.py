"""One inference server by itself, on a folder of models: no etcd, no MongoDB, no Envoy, no mesh."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mesh.node import probes
from mesh.node.parts import SERVICE_DEATH, Part, service_command
from mesh.node.ports import PortInUse, Ports
from mesh.node.process import Process, raise_file_limit, spawn
from shoal.errors import FailedPrecondition, InvalidArgument

_POLL_S = 0.05
_INDEX_S = 10.0
_VARIABLES = "SHOAL_INFER_"


@dataclass(frozen=True)
class ModelState:
    """A version of a model, and whether it can be used."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str
    """Why it is not READY."""


class Screen(Protocol):
    """Where the server says how it is."""

    def ready(self, address: str, pid: int, models: Sequence[ModelState]) -> None: ...

    def stopping(self) -> None: ...


async def serve(
    repository: Path,
    host: str,
    port: int,
    environ: Mapping[str, str],
    screen: Screen,
    settings: Mapping[str, str] | None = None,
) -> int:
    """Serves the models of `repository` at `host`:`port` until a signal, or until the server ends by itself.

    `settings` are more of the server's, by their names without SHOAL_INFER_; they come before those of `environ`.

    Returns the exit status of the server: 0 after an orderly stop, 128 + N when signal N killed it.

    Raises:
        InvalidArgument: there is no such folder, or this machine has no such address.
        FailedPrecondition: the port is in use.
    """
    if not repository.is_dir():
        what = "is no folder: name the one around it" if repository.exists() else "does not exist"
        raise InvalidArgument(f"{repository} {what}: expected a folder of models: Triton's layout, or .onnx files")
    raise_file_limit()
    with Ports() as ports:
        address = _address(host, _reserve(ports, host, port))
        process = await spawn(_part(repository, address, environ, settings or {}), None)
        signals = _Forwarding(process, screen)
        signals.start()
        announcing = asyncio.create_task(_announce(address, process, screen))
        status = await process.wait()
        announcing.cancel()
        await asyncio.wait([announcing])
        signals.stop()
    return status if status >= 0 else 128 - status


class _Forwarding:
    """Hands signals on to the server, which knows what the first and the second mean."""

    def __init__(self, process: Process, screen: Screen) -> None:
        self._process = process
        self._screen = screen
        self._is_stopping = False

    def start(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def stop(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._screen.stopping()
        self._process.signal(signal.SIGTERM)


async def _announce(address: str, process: Process, screen: Screen) -> None:
    while not await probes.health(address):  # noqa: ASYNC110 - it is another process: there is nothing to wait on.
        await asyncio.sleep(_POLL_S)
    with contextlib.suppress(OSError):  # The terminal or pipe that it says so to is gone: it serves on.
        screen.ready(address, process.pid, await _models(address))


async def _models(address: str) -> list[ModelState]:
    import grpc

    from shoal.inference.v2 import inference_pb2, inference_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=probes.FRESH) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            index = await stub.RepositoryIndex(inference_pb2.RepositoryIndexRequest(), timeout=_INDEX_S)
        except grpc.RpcError:  # It was just there: it is being stopped.
            return []
    found = [ModelState(model.name, model.version, model.state, model.reason) for model in index.models]
    return sorted(found, key=lambda model: (model.name, model.version.zfill(20)))


def _part(repository: Path, address: str, environ: Mapping[str, str], settings: Mapping[str, str]) -> Part:
    env = {
        **{_VARIABLES + name: value for name, value in settings.items()},
        _VARIABLES + "INSTANCE": "infer-0",
        _VARIABLES + "LISTEN": address,
        _VARIABLES + "REPOSITORY": str(repository.absolute()),
        "SHOAL_PARENT_PID": str(os.getpid()),
    }
    # It logs to the user's terminal: only what the user should see. Nobody there watches it, so nobody needs notice.
    defaults = {_VARIABLES + "LOG_LEVEL": "WARNING", _VARIABLES + "NOTICE_MS": "0"}
    env |= {key: value for key, value in defaults.items() if key not in environ}
    return Part("infer-0", service_command("infer"), _unasked, env, at_launcher_death=SERVICE_DEATH)


async def _unasked() -> bool:
    return True


def _reserve(ports: Ports, host: str, port: int) -> int:
    try:
        return ports.reserve(port, host)
    except PortInUse as err:
        raise FailedPrecondition(f"{err}: give another with --port (0: any free one)") from err
    except PermissionError as err:
        raise FailedPrecondition(f"--port {port}: only root may listen there: give one above 1023") from err
    except OSError as err:
        raise InvalidArgument(f"--host {host!r}: not an address of this machine ({err.strerror or err})") from err


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
