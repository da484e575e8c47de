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
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from shoal.errors import FailedPrecondition
from shoal.node import folder, gateway, plan, probes
from shoal.node.options import Options
from shoal.node.plan import Layout
from shoal.node.ports import PortInUse, Ports
from shoal.node.process import raise_file_limit, stop_signals
from shoal.node.processes import ProcessSpec
from shoal.node.ready import Ready, ReadyFiles
from shoal.node.supervisor import Event, Started, Supervisor
from shoal.node.unique_name import check_unique

_POLL_S = 0.1
_SLOW_START_S = 20.0


class Screen(Protocol):
    """Display of a node's progress."""

    def waiting(self, names: Sequence[str]) -> None:
        """Show the processes that are not ready yet."""

    def still_waiting(self, names: Sequence[str], waited_s: float) -> None:
        """Show the processes that have delayed the start for unusually long."""

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
        InvalidArgument: a folder or file in the options cannot be used.
        FailedPrecondition: a port is in use, another node uses the data folder, or a binary is missing.
    """
    signals = Signals(screen)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.lock(options.data_dir))
        files = ReadyFiles([options.data_dir / "node.json", *ready_files])
        files.check()
        layout = _reserve(options, stack.enter_context(Ports()))
        layout = replace(layout, run_dir=stack.enter_context(folder.run_dir(options.data_dir, environ)))
        signals.on_second_signal.append(lambda: shutil.rmtree(layout.run_dir, ignore_errors=True))
        groups = plan.groups(options, layout, environ, os.getpid())
        folder.write_atomically(plan.envoy_file(options), plan.envoy_bootstrap(options, layout, environ))
        stack.enter_context(signals.caught())
        if options.etcd is not None:
            await check_unique(options.etcd, options.name)
        raise_file_limit()
        if not signals.stop.is_set():
            await _run(_Running(options, layout, files, screen), groups, signals)


async def _run(running: _Running, groups: Sequence[Sequence[ProcessSpec]], signals: Signals) -> None:
    started = time.monotonic()
    async with Supervisor(running.options.data_dir / "logs", running.on_event) as supervisor:
        running.supervisor = supervisor
        signals.on_second_signal.append(supervisor.kill_all)
        for group in groups:
            await supervisor.start(*group)
        with running.files:
            signals.on_second_signal.append(running.files.remove)
            if await _finished_before(signals.stop, running.until_ready(started)):
                running.write_ready_files()
                running.screen.ready(running.ready_now(), time.monotonic() - started)
                await signals.stop.wait()
                running.is_ready = False


class _Running:
    """Node whose processes run."""

    supervisor: Supervisor

    def __init__(self, options: Options, layout: Layout, files: ReadyFiles, screen: Screen) -> None:
        self.options = options
        self.layout = layout
        self.files = files
        self.screen = screen
        self.is_ready = False

    def ready_now(self) -> Ready:
        layout = self.layout
        return Ready(layout.gateway, layout.admin, self.options.data_dir, self.supervisor.pids())

    def write_ready_files(self) -> None:
        """Write the ready files, now and again whenever a process gets a new pid."""
        self.is_ready = True
        for trouble in self.files.write(self.ready_now()):
            self.screen.trouble(trouble)

    def on_event(self, event: Event) -> None:
        self.screen.event(event)
        if self.is_ready and isinstance(event, Started):
            self.write_ready_files()

    async def until_ready(self, started: float) -> None:
        """Wait until every process and external server is ready and calls pass through the gateway."""
        waiting = {keeper.spec.name: keeper.spec.ready for keeper in self.supervisor.keepers} | self._external_probes()
        await self._until_all(waiting, started)
        await self._until_all(gateway.probes(self.layout.gateway, tuple(self.options.replicas)), started)

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
        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(self._report_slow_start(waiting, started))
            await asyncio.wait([tasks.create_task(until(name)) for name in probes])
            reporting.cancel()

    async def _report_slow_start(self, waiting: Sequence[str], started: float) -> None:
        while True:
            await asyncio.sleep(_SLOW_START_S)
            self.screen.still_waiting(waiting, time.monotonic() - started)


def _reserve(options: Options, ports: Ports) -> Layout:
    """Reserve a node's ports: the requested public ones, and the last run's private ones where they are still free."""
    public = {}
    for option, port in (("--gateway-port", options.gateway_port), ("--admin-port", options.admin_port)):
        try:
            public[option] = ports.reserve(port)
        except PortInUse as err:
            message = f"{err}: is another node running? Give another port with {option} (0: any free one)"
            raise FailedPrecondition(message) from err
        except PermissionError as err:
            message = f"{option} {port}: only root may listen there: give a port above 1023"
            raise FailedPrecondition(message) from err
    last = folder.last_ports(options.data_dir)
    private_names = [] if options.etcd else ["etcd", "etcd-peer"]
    private_names += ["mongod"] if options.mongo is None and plan.needs_mongo(options) else []
    private = {name: ports.reserve_preferred(last.get(name)) for name in private_names}
    folder.save_ports(options.data_dir, {**last, **private})
    return Layout(
        run_dir=Path(),
        gateway_port=public["--gateway-port"],
        admin_port=public["--admin-port"],
        etcd_port=private.get("etcd", 0),
        etcd_peer_port=private.get("etcd-peer", 0),
        mongod_port=private.get("mongod", 0),
    )


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
