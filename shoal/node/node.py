"""Runs one node, from the first process to the last: `shoal up` in all but what is on the screen.

hold the folder, reserve the ports ──> start everything ──> ready? ──> write the ready files ──> wait for a signal
     └── given back last                   └── stopped in reverse            └── removed first
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
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
from shoal.node.process import raise_file_limit
from shoal.node.processes import ProcessSpec
from shoal.node.ready import Ready, ReadyFiles
from shoal.node.supervisor import Event, Started, Supervisor
from shoal.node.unique_name import refuse_namesake

_POLL_S = 0.1
_PATIENCE_S = 20.0


class Screen(Protocol):
    """Where a node says how it is."""

    def waiting(self, names: Sequence[str]) -> None:
        """These are not ready yet."""

    def still_waiting(self, names: Sequence[str], waited_s: float) -> None:
        """It takes unusually long: these are to blame."""

    def event(self, event: Event) -> None: ...

    def trouble(self, text: str) -> None:
        """Something is wrong that does not end the node."""

    def ready(self, ready: Ready, took_s: float) -> None: ...

    def stopping(self, number: int) -> None:
        """The first signal came: everything stops in order."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP: the first asks for an orderly stop, the second ends everything at once."""

    def __init__(self, screen: Screen) -> None:
        self.stop = asyncio.Event()
        self.at_second: list[Callable[[], None]] = []
        """What must be done before the process ends at a second signal."""
        self._screen = screen

    def _on_signal(self, number: int) -> None:
        if not self.stop.is_set():
            self.stop.set()
            self._screen.stopping(number)
            return
        for act in reversed(self.at_second):
            with contextlib.suppress(Exception):
                act()
        os._exit(128 + number)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def run(options: Options, ready_files: Sequence[Path], environ: Mapping[str, str], screen: Screen) -> None:
    """Runs a node until a signal stops it. When this returns nothing of it is left but its data.

    Raises:
        InvalidArgument: a folder or file that was named cannot be used.
        FailedPrecondition: a port is in use, the data folder is another node's, a binary is missing.
    """
    signals = Signals(screen)
    with contextlib.ExitStack() as held:
        held.enter_context(folder.held(options.data_dir))
        files = ReadyFiles([options.data_dir / "node.json", *ready_files])
        files.check()
        layout = _reserve(options, held.enter_context(Ports()))
        layout = replace(layout, run_dir=held.enter_context(folder.run_dir(options.data_dir, environ)))
        signals.at_second.append(lambda: shutil.rmtree(layout.run_dir, ignore_errors=True))
        groups = plan.groups(options, layout, environ, os.getpid())
        (layout.run_dir / "envoy.json").write_text(plan.envoy_bootstrap(options, layout))
        held.enter_context(signals.caught())
        if options.etcd is not None:
            await refuse_namesake(options.etcd, options.name)
        raise_file_limit()
        if not signals.stop.is_set():
            await _run(_Running(options, layout, files, screen), groups, signals)


async def _run(running: _Running, groups: Sequence[Sequence[ProcessSpec]], signals: Signals) -> None:
    started = time.monotonic()
    async with Supervisor(running.options.data_dir / "logs", running.on_event) as supervisor:
        running.supervisor = supervisor
        signals.at_second.append(supervisor.kill_all)
        for group in groups:
            await supervisor.start(*group)
        with running.files:
            signals.at_second.append(running.files.remove)
            if await _before(signals.stop, running.until_ready(started)):
                running.announce()
                running.screen.ready(running.word(), time.monotonic() - started)
                await signals.stop.wait()
                running.is_ready = False


class _Running:
    """A node whose processes run."""

    supervisor: Supervisor

    def __init__(self, options: Options, layout: Layout, files: ReadyFiles, screen: Screen) -> None:
        self.options = options
        self.layout = layout
        self.files = files
        self.screen = screen
        self.is_ready = False

    def word(self) -> Ready:
        layout = self.layout
        return Ready(layout.gateway, layout.admin, self.options.data_dir, self.supervisor.pids())

    def announce(self) -> None:
        """Writes the ready files, now and at every new pid from here on."""
        self.is_ready = True
        for trouble in self.files.write(self.word()):
            self.screen.trouble(trouble)

    def on_event(self, event: Event) -> None:
        self.screen.event(event)
        if self.is_ready and isinstance(event, Started):
            self.announce()

    async def until_ready(self, started: float) -> None:
        """Waits until every part is ready, the ones given by URL among them, and calls get through the gateway."""
        waiting = {keeper.part.name: keeper.part.ready for keeper in self.supervisor.keepers} | self._given()
        await self._until_all(waiting, started)
        await self._until_all(gateway.probes(self.layout.gateway, tuple(self.options.replicas)), started)

    def _given(self) -> dict[str, Callable[[], Awaitable[bool]]]:
        given: dict[str, Callable[[], Awaitable[bool]]] = {}
        if (etcd := self.options.etcd) is not None:
            given[f"etcd at {etcd}"] = lambda: probes.etcd_answers(etcd)
        if (mongo := self.options.mongo) is not None and plan.wants_mongo(self.options):
            given[f"MongoDB at {mongo.rpartition('@')[2]}"] = lambda: probes.mongo_answers(mongo)
        return given

    async def _until_all(self, probes: Mapping[str, Callable[[], Awaitable[bool]]], started: float) -> None:
        waiting = list(probes)

        async def until(name: str) -> None:
            while not await probes[name]():  # noqa: ASYNC110 - it is another process: there is nothing to wait on.
                await asyncio.sleep(_POLL_S)
            waiting.remove(name)
            self.screen.waiting(waiting)

        self.screen.waiting(waiting)
        async with asyncio.TaskGroup() as tasks:
            complaining = tasks.create_task(self._complain(waiting, started))
            await asyncio.wait([tasks.create_task(until(name)) for name in probes])
            complaining.cancel()

    async def _complain(self, waiting: Sequence[str], started: float) -> None:
        while True:
            await asyncio.sleep(_PATIENCE_S)
            self.screen.still_waiting(waiting, time.monotonic() - started)


def _reserve(options: Options, ports: Ports) -> Layout:
    """The ports of a node: the public ones as asked for, the private ones as last time where they are still free."""
    public = {}
    for option, port in (("--gateway-port", options.gateway_port), ("--admin-port", options.admin_port)):
        try:
            public[option] = ports.reserve(port)
        except PortInUse as err:
            raise FailedPrecondition(f"{err}: is another node running? Give another with {option} (0: any)") from err
        except PermissionError as err:
            raise FailedPrecondition(f"{option} {port}: only root may listen there: give one above 1023") from err
    last = folder.remembered_ports(options.data_dir)
    wanted = [] if options.etcd else ["etcd", "etcd-peer"]
    wanted += ["mongod"] if options.mongo is None and plan.wants_mongo(options) else []
    private = {name: ports.reserve_preferred(last.get(name)) for name in wanted}
    folder.remember_ports(options.data_dir, {**last, **private})
    return Layout(
        run_dir=Path(),
        gateway_port=public["--gateway-port"],
        admin_port=public["--admin-port"],
        etcd_port=private.get("etcd", 0),
        etcd_peer_port=private.get("etcd-peer", 0),
        mongod_port=private.get("mongod", 0),
    )


async def _before(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Whether `work` is done before `stop` is set; it is cancelled otherwise. What it raises is raised."""
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
