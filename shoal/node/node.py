"""Life of one node, from start to stop: `shoal up` without its display.

lock the folder, reserve the ports ──> start everything ──> ready? ──> write the ready files ──> wait for a signal
     └── released last                     └── stopped in reverse            └── removed first
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mesh.metrics.endpoint import Endpoint
from mesh.process.files import write_atomically
from mesh.process.tasks import end
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node import admin, folder, gateway, plan, probes, versions
from shoal.node import master_key as master_keys
from shoal.node.admin import Scraped
from shoal.node.admin_key import FILE, AdminKey
from shoal.node.options import SERVICES, Options
from shoal.node.plan import Layout
from shoal.node.ports import HOST, PortInUse, Ports, joined
from shoal.node.process import raise_file_limit, stop_signals
from shoal.node.processes import ProcessSpec
from shoal.node.ready import Ready, ReadyFiles
from shoal.node.supervisor import Event, ProcessKeeper, Started, Supervisor
from shoal.node.unique_name import check_unique

if TYPE_CHECKING:
    from shoal.node.tls.served import ServedCertificate

_POLL_S = 0.1
_SLOW_START_S = 20.0


class Screen(Protocol):
    """Display of a node's progress."""

    def waiting(self, names: Sequence[str]) -> None:
        """Show the processes that are not ready yet."""

    def still_waiting(self, names: Sequence[str], waited_s: float, why: str) -> None:
        """Show the processes that have delayed the start for unusually long; `why` is empty when it is not known."""

    def event(self, event: Event) -> None: ...

    def trouble(self, text: str) -> None:
        """Show a problem that does not end the node."""

    def ready(self, ready: Ready, took_s: float) -> None: ...

    def stopping(self, number: int) -> None:
        """Show that the first signal has arrived: everything stops in order."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP: the first asks for an orderly stop, the second ends everything immediately.

    A SIGHUP that was ignored at the start (by `nohup`) stays ignored.
    """

    def __init__(self, screen: Screen) -> None:
        self.stop = asyncio.Event()
        self.on_second_signal: list[Callable[[], None]] = []
        """Clean-up steps before the process ends at a second signal; the last one added runs first."""
        self._screen = screen

    def _on_signal(self, number: int) -> None:
        if not self.stop.is_set():
            self.stop.set()
            self._screen.stopping(number)
            return
        for act in reversed(self.on_second_signal):
            with contextlib.suppress(Exception):
                act()
        os._exit(128 + number)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def run(options: Options, ready_files: Sequence[Path], environ: Mapping[str, str], screen: Screen) -> None:
    """Run a node until a signal stops it, then leave nothing behind but its data.

    Raises:
        InvalidArgument: a folder, file or certificate in the options cannot be used.
        FailedPrecondition: a port is in use, another node uses the data folder, or a binary is missing.
    """
    signals = Signals(screen)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.lock(options.data_dir))
        files = ReadyFiles([options.data_dir / "node.json", *ready_files])
        files.check()
        layout = _reserve(options, stack.enter_context(Ports()))
        layout = replace(layout, run_dir=stack.enter_context(folder.run_dir(options.data_dir, environ)))
        if options.auth:
            master_key, source = master_keys.find(os.environ, options.data_dir, layout.run_dir)
            layout = replace(layout, master_key=master_key, master_key_source=source)
        signals.on_second_signal.append(lambda: shutil.rmtree(layout.run_dir, ignore_errors=True))
        served = _certificate(options, layout)
        layout = replace(layout, sds=None if served is None else served.sds)
        groups = plan.groups(options, layout, environ, os.getpid())
        write_atomically(plan.envoy_file(options), plan.envoy_bootstrap(options, layout, environ))
        stack.enter_context(signals.caught())
        if options.etcd is not None:
            await check_unique(options.etcd, options.name)
        raise_file_limit()
        if not signals.stop.is_set():
            await _run(_Running(options, layout, files, screen, served), groups, signals)


async def _run(running: _Running, groups: Sequence[Sequence[ProcessSpec]], signals: Signals) -> None:
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        if running.served is not None:
            keeping = asyncio.create_task(running.served.keep(running.on_certificate))
            stack.push_async_callback(end, keeping)
        supervisor = await stack.enter_async_context(Supervisor(running.options.data_dir / "logs", running.on_event))
        running.supervisor = supervisor
        signals.on_second_signal.append(supervisor.kill_all)
        for group in groups:
            await supervisor.start(*group)
        running.versions = await versions.found(spec for group in groups for spec in group)
        await stack.enter_async_context(running.admin())
        with running.files:
            signals.on_second_signal.append(running.files.remove)
            if await _finished_before(signals.stop, running.until_ready(started)):
                running.write_ready_files()
                running.write_file_sd()
                running.screen.ready(running.ready_now(), time.monotonic() - started)
                if running.admin_key is not None:
                    keeping_key = asyncio.create_task(running.admin_key.keep(running.screen.trouble))
                    stack.push_async_callback(end, keeping_key)
                for warning in versions.warnings(running.versions):
                    running.screen.trouble(warning)
                await signals.stop.wait()
                running.is_ready = False


class _Running:
    """Node whose processes run."""

    supervisor: Supervisor

    def __init__(
        self, options: Options, layout: Layout, files: ReadyFiles, screen: Screen, served: ServedCertificate | None
    ) -> None:
        self.options = options
        self.layout = layout
        self.files = files
        self.screen = screen
        self.served = served
        self.is_ready = False
        self.versions: Mapping[str, str] = {}
        self.admin_key: AdminKey | None = None
        if options.auth:
            coords = [layout.socket_of(f"coord-{number}") for number in range(options.replicas["coord"])]
            self.admin_key = AdminKey(options.data_dir / FILE, coords)

    def ready_now(self) -> Ready:
        layout = self.layout
        trust = None if self.served is None else self.served.trust
        key_file = None if self.admin_key is None else self.admin_key.path
        pids = self.supervisor.pids()
        return Ready(
            layout.gateway_here,
            layout.admin,
            self.options.data_dir,
            pids,
            layout.gateway,
            trust,
            key_file,
            self.versions,
        )

    def admin(self) -> Endpoint:
        """Return the endpoint of the admin address."""
        envoy = self.layout.envoy_admin
        return admin.endpoint(self.layout.admin, self._scraped, envoy, admin.secrets_of(os.environ), self.options.name)

    def _scraped(self) -> list[Scraped]:
        return [self._scraped_of(keeper) for keeper in self.supervisor.keepers]

    def _scraped_of(self, keeper: ProcessKeeper) -> Scraped:
        name, restarts = keeper.spec.name, keeper.restart_count
        service = name.rpartition("-")[0]
        if service in SERVICES:
            return Scraped(service, name, self.layout.metrics_of(name), restarts=restarts)
        if name == "envoy":
            return admin.envoy_process(self.layout.envoy_admin, keeper.pid, restarts)
        return Scraped(name, name, None, restarts=restarts, pid=keeper.pid)

    def write_ready_files(self) -> None:
        """Write the ready files, now and again whenever a process gets a new pid."""
        self.is_ready = True
        for trouble in self.files.write(self.ready_now()):
            self.screen.trouble(trouble)

    def write_file_sd(self) -> None:
        """Write the file by which Prometheus finds the node (`file_sd_configs`)."""
        try:
            document = admin.file_sd(self.layout.admin, self.options.name)
            write_atomically(self.options.data_dir / admin.FILE_SD, document)
        except OSError as err:
            self.screen.trouble(f"{admin.FILE_SD} cannot be written: {err.strerror}")

    def on_event(self, event: Event) -> None:
        self.screen.event(event)
        if self.is_ready and isinstance(event, Started):
            self.write_ready_files()

    def on_certificate(self, text: str) -> None:
        self.screen.trouble(text)
        # The names of the new certificate may be others.
        if self.is_ready:
            self.write_ready_files()

    async def until_ready(self, started: float) -> None:
        """Wait until every process and external server is ready and calls pass through the gateway."""
        waiting = {keeper.spec.name: keeper.spec.ready for keeper in self.supervisor.keepers} | self._external_probes()
        await self._until_all(waiting, started)
        token = ""
        if self.admin_key is not None:
            await self._until_key(self.admin_key, started)
            token = self.admin_key.text
        services, has_tls = tuple(self.options.replicas), self.served is not None
        calls = gateway.probes(self.layout.gateway_here, services, has_tls=has_tls, token=token)
        await self._until_all(calls, started)

    async def _until_key(self, key: AdminKey, started: float) -> None:
        waiting = ["a key for the node's user"]
        self.screen.waiting(waiting)
        async with self._slow_start_reported(waiting, started, lambda: key.why):
            # Another process has no event to wait on.
            while not await key.ensure():  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)

    def _external_probes(self) -> dict[str, Callable[[], Awaitable[bool]]]:
        found: dict[str, Callable[[], Awaitable[bool]]] = {}
        if (etcd := self.options.etcd) is not None:
            found[f"etcd at {etcd}"] = lambda: probes.etcd_responds(etcd)
        if (mongo := self.options.mongo) is not None and plan.needs_mongo(self.options):
            found[f"MongoDB at {mongo.rpartition('@')[2]}"] = lambda: probes.mongo_responds(mongo)
        return found

    async def _until_all(self, probes: Mapping[str, Callable[[], Awaitable[bool]]], started: float) -> None:
        waiting = list(probes)

        async def until(name: str) -> None:
            # Another process has no event to wait on.
            while not await probes[name]():  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
            waiting.remove(name)
            self.screen.waiting(waiting)

        self.screen.waiting(waiting)
        async with self._slow_start_reported(waiting, started), asyncio.TaskGroup() as tasks:
            for name in probes:
                tasks.create_task(until(name))

    @contextlib.asynccontextmanager
    async def _slow_start_reported(
        self, waiting: Sequence[str], started: float, why: Callable[[], str] = str
    ) -> AsyncIterator[None]:
        """Say from time to time, while the block lasts, what the start waits for, and why."""

        async def report() -> None:
            while True:
                await asyncio.sleep(_SLOW_START_S)
                self.screen.still_waiting(waiting, time.monotonic() - started, why())

        reporting = asyncio.create_task(report())
        try:
            yield
        finally:
            await end(reporting)


def _reserve(options: Options, ports: Ports) -> Layout:
    """Reserve the ports of a node."""
    public = {}
    gateway_option = "--gateway-port" if options.gateway_host == HOST else "--listen"
    for option, host, port in (
        (gateway_option, options.gateway_host, options.gateway_port),
        ("--admin-port", HOST, options.admin_port),
    ):
        try:
            public[option] = ports.reserve(port, host)
        except PortInUse as err:
            message = f"{err}: is another node running? Give another port with {option} (0: any free one)"
            raise FailedPrecondition(message) from err
        except PermissionError as err:
            message = f"{option} {port}: only root may listen there: give a port above 1023"
            raise FailedPrecondition(message) from err
        except OSError as err:
            reason = err.strerror or str(err)
            raise InvalidArgument(f"{option} {joined(host, port)}: not an address of this machine ({reason})") from err
    return Layout(
        run_dir=Path(),
        gateway_port=public[gateway_option],
        admin_port=public["--admin-port"],
        gateway_host=options.gateway_host,
    )


def _certificate(options: Options, layout: Layout) -> ServedCertificate | None:
    if options.tls is None:
        return None
    # Imported here: the library for certificates takes 0.1 s to import.
    from shoal.node.tls.served import ServedCertificate, source_of

    source = source_of(options.tls, options.gateway_host, options.data_dir)
    return ServedCertificate(layout.run_dir / "tls", source)


async def _finished_before(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Return True when `work` finishes before `stop` is set; otherwise cancel it. Exceptions of `work` are raised."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        return not stop.is_set()
    finally:
        for task in (working, stopped):
            task.cancel()
        await asyncio.wait([working, stopped])
