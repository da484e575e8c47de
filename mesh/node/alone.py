"""The inference server by itself, on a folder of models or one file: no etcd, no MongoDB, no mesh.

One process or several."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mesh.front import CHOICES, Choice, choose
from mesh.node import probes
from mesh.node.parts import SERVICE_DEATH, Part, service_command
from mesh.node.ports import PortInUse, Ports, listeners
from mesh.node.process import raise_file_limit
from mesh.node.workers import Workers
from mesh.tasks import end
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


@dataclass(frozen=True)
class Wanted:
    """What is to be served, where and how."""

    repository: Path
    """A folder of models, or one .onnx file: a model with the name of the file."""
    host: str
    port: int
    """0: any free one."""
    front: str = ""
    """h2, envoy, grpc or auto; "": what the environment says, else auto."""
    workers: int = 1
    """Processes that share the address."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """More of the server's, by their names without SHOAL_INFER_; they come before those of the environment."""


@dataclass(frozen=True)
class Served:
    """What is being served."""

    address: str
    pids: Sequence[int]
    front: Choice
    models: Sequence[ModelState]


class Screen(Protocol):
    """Where the server says how it is."""

    def ready(self, served: Served) -> None: ...

    def ended(self, name: str, status: int, again_in_s: float) -> None:
        """A process ended that should not have; it is started again."""

    def stopping(self) -> None: ...


async def serve(wanted: Wanted, environ: Mapping[str, str], screen: Screen) -> int:
    """Serves until a signal, or until the server ends by itself. Of several processes, one that ends starts again.

    Returns the exit status of the server: 0 after an orderly stop, 128 + N when signal N killed it.

    Raises:
        InvalidArgument: there is no such folder or file, or this machine has no such address.
        FailedPrecondition: the port is in use, or the front that is asked for cannot run here.
    """
    check(wanted.repository)
    raise_file_limit()
    with Ports() as ports, _shared(wanted.workers) as shared:
        address = _address(wanted.host, _reserve(ports, wanted.host, wanted.port))
        front = _front(wanted.front or environ.get(_VARIABLES + "FRONT", "auto"), address)
        parts = [_part(number, wanted, address, front, environ, shared) for number in range(wanted.workers)]
        workers = Workers(parts, screen.ended)
        signals = _Forwarding(workers, screen)
        signals.start()
        announcing = asyncio.create_task(_announce(address, workers, wanted.workers, front, screen))
        try:
            return await workers.run()
        finally:
            await end(announcing)
            signals.stop()


def check(repository: Path) -> None:
    """Raises InvalidArgument when `repository` is neither a folder nor an .onnx file that is a whole model."""
    expected = "expected a folder of models (Triton's layout, or .onnx files), or one .onnx file"
    try:
        if repository.is_dir():
            return
        if not repository.is_file():
            what = "is no plain file" if repository.exists() else "does not exist"
            raise InvalidArgument(f"{repository} {what}: {expected}")
        around = repository.absolute().parent
        if around.name.isdecimal() and (around.parent / "config.pbtxt").exists():
            raise InvalidArgument(
                f"{repository} is version {around.name} of the model {around.parent.name}, whose config.pbtxt would be "
                f"left out: give the folder of models {around.parent.parent}"
            )
    except OSError as err:
        raise InvalidArgument(f"cannot look at {repository}: {err.strerror}") from err
    if repository.suffix != ".onnx":
        raise InvalidArgument(f"{repository} is no .onnx file: {expected}")


def _front(asked: str, address: str) -> Choice:
    """A value that is none goes on to the server, whose configuration explains it."""
    return choose(asked, address) if asked in CHOICES else Choice(asked, "it was asked for")


class _Forwarding:
    """Hands signals on to the server, which knows what the first and the second mean."""

    def __init__(self, workers: Workers, screen: Screen) -> None:
        self._workers = workers
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
        self._workers.stop()


async def _announce(address: str, workers: Workers, count: int, front: Choice, screen: Screen) -> None:
    port = int(address.rpartition(":")[2])
    # Of several, each listens once it serves. They are other processes: there is nothing to wait on.
    while not (listeners(port) >= count and await probes.health(address)):  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
    with contextlib.suppress(OSError):  # The terminal or pipe that it says so to is gone: it serves on.
        screen.ready(Served(address, workers.pids, front, await _models(address)))


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


def _part(number: int, wanted: Wanted, address: str, front: Choice, environ: Mapping[str, str], shared: str) -> Part:
    name = f"infer-{number}"
    told = {
        **wanted.settings,
        "INSTANCE": name,
        "LISTEN": address,
        "REPOSITORY": str(wanted.repository.absolute()),
        "INSECURE": "true",
    }
    # It logs to the user's terminal: only what the user should see. Nobody there watches it, so nobody needs notice.
    defaults = {"LOG_LEVEL": "WARNING", "NOTICE_MS": "0"}
    if wanted.workers > 1:
        told |= {"SHARE_PORT": "true", "SHARED_DIR": shared}
        defaults["THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // wanted.workers))
    told |= {key: value for key, value in defaults.items() if _VARIABLES + key not in environ}
    env = {_VARIABLES + key: value for key, value in told.items()} | {"SHOAL_PARENT_PID": str(os.getpid())}
    return Part(name, service_command("infer"), _unasked, env, at_launcher_death=SERVICE_DEATH)


@contextlib.contextmanager
def _shared(workers: int) -> Iterator[str]:
    """A private folder for what several workers share; none for one."""
    if workers == 1:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True) as folder:
        yield folder


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
