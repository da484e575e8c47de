"""Inference server without a mesh, on a folder of models or one file: no etcd, no MongoDB.

h2       clients ──────────────────────> infer workers, which share the address, and --http-port
envoy    clients ──> Envoy at the addresses ──unix sockets──> infer workers
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mesh.process.exits import WRONG_SETTINGS
from mesh.process.sockets import is_local
from mesh.process.tasks import end
from shoal.access.caller_header import CALLER_HEADER, LAUNCHER
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node import exposure, folder, probes
from shoal.node.admin import Scraped, endpoint, envoy_process
from shoal.node.envoy_edge import ADMIN_SOCKET, Edge
from shoal.node.envoy_overload import heap_bytes
from shoal.node.front import Choice, choose
from shoal.node.ports import HOST, PortInUse, Ports, joined, listeners, numeric
from shoal.node.process import raise_file_limit, stop_signals
from shoal.node.processes import SERVICE_DEATH, ProcessSpec, envoy_threads, service_command
from shoal.node.workers import Workers

if TYPE_CHECKING:
    from shoal.access.policy import Policy
    from shoal.node.tls.served import ServedCertificate, TlsOptions, Trust

_POLL_S = 0.05
_INDEX_S = 10.0
_VARIABLES = "SHOAL_INFER_"


@dataclass(frozen=True)
class ModelState:
    """State of one version of a model."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str
    """Cause when the state is not READY."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of `shoal serve`."""

    repository: Path
    """A folder of models, or one .onnx file: a model with the name of the file."""
    host: str
    port: int
    """0: any free one."""
    front: str = "auto"
    """h2, envoy or auto."""
    is_insecure: bool = False
    """Allow an address that other machines can reach without TLS or authentication, and h2 there."""
    workers: int = 1
    """Processes that share the address."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further settings of the server, by their names without SHOAL_INFER_. They override the environment."""
    tls: TlsOptions | None = None
    """Certificate of the address; None: clients speak plaintext."""
    data_dir: Path = Path()
    """Folder of the own CA."""
    policy: Path | None = None
    """Policy of access. None: every caller may call everything."""
    http_port: int | None = None
    """A second port, for HTTP clients that get one of their own; 0: any free one."""
    metrics_port: int | None = None
    """Port of `/metrics` on loopback; 0: any free one. None: there is none."""


@dataclass(frozen=True)
class Addresses:
    """Addresses of a server; one that it does not have is empty."""

    clients: str
    http: str
    """The second address, for HTTP clients."""
    metrics: str


@dataclass(frozen=True)
class Served:
    """Addresses, processes and models of a running server."""

    address: str
    pids: Sequence[int]
    front: Choice
    envoy: int | None
    """The pid of the Envoy in front."""
    models: Sequence[ModelState]
    tls: Trust | None = None
    """Certificate of the address; None: clients speak plaintext."""
    http_address: str = ""
    """The second address, if there is one."""
    metrics_address: str = ""
    """Address of `/metrics`, if there is one."""


class Screen(Protocol):
    """Display of a server's state."""

    def ready(self, served: Served) -> None: ...

    def ended(self, name: str, status: int, again_in_s: float) -> None:
        """Show that a process ended unexpectedly and is restarted."""

    def trouble(self, text: str) -> None:
        """Show a problem or an event that does not end the server."""

    def stopping(self) -> None: ...


async def serve(options: ServeOptions, environ: Mapping[str, str], screen: Screen) -> int:
    """Serve until a signal, or until the server ends by itself.

    One of several workers that ends is restarted; behind an Envoy also a single worker, and the Envoy itself.

    Returns the exit status of the server: 0 after an orderly stop, 128 + N when signal N killed it.

    Raises:
        InvalidArgument: the folder or file does not exist, this machine has no such address, others can reach the
            address and `is_insecure` is not set, or the certificate cannot be used.
        FailedPrecondition: the port is in use, or no Envoy is installed.
    """
    check(options.repository)
    policy = _policy(options)
    threads = envoy_threads(environ)
    raise_file_limit()
    async with contextlib.AsyncExitStack() as stack:
        ports = stack.enter_context(Ports())
        port = _reserve(ports, options.host, options.port)
        address = joined(options.host, port)
        http_port = None if options.http_port is None else _reserve(ports, options.host, options.http_port)
        metrics_port = None if options.metrics_port is None else _reserve(ports, HOST, options.metrics_port)
        http_address = "" if http_port is None else joined(options.host, http_port)
        addresses = Addresses(address, http_address, "" if metrics_port is None else joined(HOST, metrics_port))
        has_tls, has_policy, is_insecure = options.tls is not None, policy is not None, options.is_insecure
        front = choose(options.front, address, environ, is_insecure=is_insecure, has_tls=has_tls, has_policy=has_policy)
        exposure.check("--host", address, has_tls=has_tls, has_policy=has_policy, is_insecure=is_insecure)
        has_envoy = front.name == "envoy"
        has_metrics = options.metrics_port is not None
        has_folder = has_envoy or has_metrics or options.workers > 1
        run_dir = stack.enter_context(folder.private(environ)) if has_folder else None
        sockets = [f"{run_dir}/infer-{number}.sock" for number in range(options.workers)] if has_envoy else []
        listens = [f"unix:{path}" for path in sockets] or [address] * options.workers
        shared = str(run_dir) if options.workers > 1 else ""
        policy_file = None if run_dir is None or policy is None else run_dir / "policy.json"
        if http_address and not has_envoy:
            options = replace(options, settings={**options.settings, "HTTP_LISTEN": http_address})
        pages: list[Path | None] = [None] * options.workers
        edges: list[Edge] = []
        if run_dir is not None and has_metrics:
            sources = [Scraped("infer", f"infer-{n}", run_dir / f"metrics-{n}.sock") for n in range(options.workers)]
            pages = [source.socket for source in sources]
            admin_socket = run_dir / ADMIN_SOCKET

            def scraped() -> list[Scraped]:
                return [*sources, *(envoy_process(admin_socket, edge.pid) for edge in edges)]

            await stack.enter_async_context(endpoint(addresses.metrics, scraped, None))
        specs = [
            _spec(number, listen, options, environ, shared, policy_file, page)
            for number, (listen, page) in enumerate(zip(listens, pages, strict=True))
        ]
        workers = Workers(specs, screen.ended, is_final=partial(_is_final, is_kept=has_envoy or options.workers > 1))
        if run_dir is None or not has_envoy:
            alone = partial(_announce, addresses, front, options.workers)
            return await _Serving(workers, None, screen).run(alone)
        served = _certificate(options, run_dir)
        edge = Edge(
            host=numeric(options.host),
            port=port,
            workers=sockets,
            folder=run_dir,
            threads=threads,
            report=screen.ended,
            heap=heap_bytes(environ),
            sds="" if served is None else str(served.sds),
            policy=policy,
            http_port=http_port,
        )
        edges.append(edge)
        announce = partial(
            _announce_behind, edge, specs, addresses, front, served, None if policy is None else listens[0]
        )
        keep = None if served is None else partial(served.keep, screen.trouble)
        serving = _Serving(workers, edge, screen, keep)
        if policy is None or policy_file is None or options.policy is None:
            return await serving.run(announce)
        from shoal.node.policy_file import PolicyFile

        async with PolicyFile(options.policy, policy, policy_file, edge, screen.trouble):
            return await serving.run(announce)


def _policy(options: ServeOptions) -> Policy | None:
    if options.policy is None:
        return None
    # Imported here: servers without a policy start a fifth of a second earlier.
    from shoal.access import policy as policies

    return policies.load(options.policy)


def _is_final(status: int, *, is_kept: bool) -> bool:
    return not is_kept or status == WRONG_SETTINGS


def check(repository: Path) -> None:
    """Raise InvalidArgument when `repository` is neither a folder nor an .onnx file that is a whole model."""
    expected = "expected a folder of models (Triton's layout, or .onnx files), or one .onnx file"
    try:
        if repository.is_dir():
            return
        if not repository.is_file():
            what = "is no plain file" if repository.exists() else "does not exist"
            raise InvalidArgument(f"{repository} {what}: {expected}")
        version_dir = repository.absolute().parent
        if version_dir.name.isdecimal() and (version_dir.parent / "config.pbtxt").exists():
            model_dir = version_dir.parent
            raise InvalidArgument(
                f"{repository} is version {version_dir.name} of the model {model_dir.name}, whose config.pbtxt would "
                f"be left out: give the folder of models {model_dir.parent}"
            )
    except OSError as err:
        raise InvalidArgument(f"cannot read {repository}: {err.strerror}") from err
    if repository.suffix != ".onnx":
        raise InvalidArgument(f"{repository} is no .onnx file: {expected}")


class _Serving:
    """Workers and the Envoy in front of them, from their start to their end.

    first signal ──> Envoy drains ──> workers drain and end ──> the last responses are sent ──> Envoy ends
    second signal ──> all end now
    """

    def __init__(
        self,
        workers: Workers,
        edge: Edge | None,
        screen: Screen,
        keep: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._workers = workers
        self._edge = edge
        self._screen = screen
        self._keep = keep
        self._shutdown_task: asyncio.Task[None] | None = None

    async def run(self, announce: Callable[[Workers, Screen], Awaitable[None]]) -> int:
        """Return the exit status when all processes have ended. `announce` and `keep` run concurrently."""
        loop, numbers = asyncio.get_running_loop(), stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        beside = [asyncio.ensure_future(announce(self._workers, self._screen))]
        if self._keep is not None:
            beside.append(asyncio.ensure_future(self._keep()))
        try:
            return await (self._workers.run() if self._edge is None else self._run_behind(self._edge))
        finally:
            await end(*beside, *([self._shutdown_task] if self._shutdown_task else []))
            for number in numbers:
                loop.remove_signal_handler(number)

    async def _run_behind(self, edge: Edge) -> int:
        """Run the workers behind `edge`, which ends last."""
        envoy_task, workers_task = asyncio.ensure_future(edge.run()), asyncio.ensure_future(self._workers.run())
        try:
            await asyncio.wait([envoy_task, workers_task], return_when=asyncio.FIRST_COMPLETED)
            if envoy_task.done() and self._shutdown_task is None:
                # Envoy cannot start, and has printed the reason.
                self._workers.stop()
                await workers_task
                return envoy_task.result() or 1
            status = await workers_task
            await edge.flush()
            edge.stop()
            await envoy_task
            return status
        finally:
            await end(envoy_task, workers_task)

    def _on_signal(self) -> None:
        if self._shutdown_task is None:
            self._screen.stopping()
            self._shutdown_task = asyncio.ensure_future(self._shut_down())
            return
        # Workers that have had the first SIGTERM end at a second one; the others must be killed.
        if self._shutdown_task.done():
            self._workers.stop()
        else:
            self._workers.kill()
        if self._edge is not None:
            self._edge.stop()

    async def _shut_down(self) -> None:
        if self._edge is not None:
            await self._edge.drain()
        self._workers.stop()


async def _announce(addresses: Addresses, front: Choice, count: int, workers: Workers, screen: Screen) -> None:
    """Report that the workers serve, once each of them listens at the address for clients."""
    port = int(addresses.clients.rpartition(":")[2])
    await _until(lambda: _all_listen(port, count, addresses.clients))
    await _ready(addresses, front, None, workers, screen)


async def _all_listen(port: int, count: int, address: str) -> bool:
    return listeners(port) >= count and await probes.health(address)


async def _announce_behind(
    edge: Edge,
    specs: Sequence[ProcessSpec],
    addresses: Addresses,
    front: Choice,
    served: ServedCertificate | None,
    worker: str | None,
    workers: Workers,
    screen: Screen,
) -> None:
    """Report that the workers serve behind `edge`, once each of them serves and calls pass through Envoy.

    `worker` is the address of one of them, to ask for its models where calls of clients need a key.
    """
    await _until(edge.is_ready)
    for spec in specs:
        await _until(spec.ready)
    await _until(edge.all_healthy)
    if worker is None:
        await _until(lambda: probes.health(addresses.clients, has_tls=served is not None))
    trust = None if served is None else served.trust
    await _ready(addresses, front, edge.pid, workers, screen, trust, worker)


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    # Other processes have no event to wait on.
    while not await is_so():  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)


async def _ready(
    addresses: Addresses,
    front: Choice,
    envoy: int | None,
    workers: Workers,
    screen: Screen,
    trust: Trust | None = None,
    worker: str | None = None,
) -> None:
    models = await _models(worker or addresses.clients, has_tls=trust is not None and worker is None)
    # The terminal or pipe may be closed: the server continues.
    with contextlib.suppress(OSError):
        screen.ready(
            Served(addresses.clients, workers.pids, front, envoy, models, trust, addresses.http, addresses.metrics)
        )


async def _models(address: str, *, has_tls: bool) -> list[ModelState]:
    import grpc

    from shoal.inference.v2 import inference_pb2, inference_pb2_grpc

    async with probes.channel_to(address, has_tls=has_tls) as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            # A worker takes the header from its own socket only, where this process alone can connect.
            launcher = ((CALLER_HEADER, LAUNCHER.decode()),)
            request = inference_pb2.RepositoryIndexRequest()
            index = await stub.RepositoryIndex(request, timeout=_INDEX_S, metadata=launcher)
        except grpc.RpcError:
            # The server responded before, so it is being stopped.
            return []
    found = [ModelState(model.name, model.version, model.state, model.reason) for model in index.models]
    return sorted(found, key=lambda model: (model.name, model.version.zfill(20)))


def _spec(
    number: int,
    listen: str,
    options: ServeOptions,
    environ: Mapping[str, str],
    shared: str,
    policy: Path | None,
    metrics: Path | None,
) -> ProcessSpec:
    name = f"infer-{number}"
    settings = {
        **options.settings,
        "INSTANCE": name,
        "LISTEN": listen,
        **({} if is_local(listen) else {"INSECURE": "true"}),
        **({} if policy is None else {"POLICY": str(policy), "LIMIT_PROCESSES": str(options.workers)}),
        **({} if metrics is None else {"METRICS": f"unix:{metrics}"}),
        "REPOSITORY": str(options.repository.absolute()),
    }
    # The server logs to the user's terminal: warnings only. No Envoy watches its registration, so no notice is needed.
    defaults = {"LOG_LEVEL": "WARNING", "NOTICE_MS": "0"}
    # The server may listen behind an Envoy: the address of its callers decides.
    defaults["ALLOW_CODE"] = str(is_local(joined(options.host, options.port))).lower()
    if options.workers > 1:
        settings |= {"SHARE_PORT": "true", "SHARED_DIR": shared}
        defaults["THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // options.workers))
    settings = {key: value for key, value in defaults.items() if _VARIABLES + key not in environ} | settings
    env = {_VARIABLES + key: value for key, value in settings.items()} | {"SHOAL_PARENT_PID": str(os.getpid())}
    ready = partial(_serves, listen)
    return ProcessSpec(name, service_command("infer"), ready, env, at_launcher_death=SERVICE_DEATH)


async def _serves(listen: str) -> bool:
    """Return True when the worker at the unix socket `listen` serves. A missing socket is noticed without a channel."""
    return os.path.exists(listen.removeprefix("unix:")) and await probes.health(listen)


def _reserve(ports: Ports, host: str, port: int) -> int:
    try:
        return ports.reserve(port, host)
    except PortInUse as err:
        raise FailedPrecondition(f"{err}: give another with --port (0: any free one)") from err
    except PermissionError as err:
        raise FailedPrecondition(f"--port {port}: only root may listen there: give a port above 1023") from err
    except OSError as err:
        raise InvalidArgument(f"--host {host!r}: not an address of this machine ({err.strerror or err})") from err


def _certificate(options: ServeOptions, run_dir: Path) -> ServedCertificate | None:
    if options.tls is None:
        return None
    # Imported here: the library for certificates takes 0.1 s to import.
    from shoal.node.tls.served import ServedCertificate, source_of

    return ServedCertificate(run_dir / "tls", source_of(options.tls, options.host, options.data_dir))
