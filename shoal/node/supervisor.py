"""Supervisor of a node's processes: keeps them running, and stops them in order.

    start(etcd)  start(mongod)  start(envoy)  start(coord-0, coord-1)  ...      each call is a group
    stop         <-------------------------------------------------------      the last group first

The end of a process is noticed immediately, `restarts` decides when the process starts again, and events report both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from mesh.process import crash_journal
from mesh.process.tasks import all_to_the_end, end
from shoal.node.log_tail import last_lines
from shoal.node.process import Process, spawn
from shoal.node.processes import ProcessSpec
from shoal.node.restarts import Restarts

LOG_BYTES = 16 << 20
"""Size at which a log is moved to `<name>.log.1`; a process has at most about twice this size on disk."""
_LOG_CHECK_S = 2.0


@dataclass(frozen=True)
class Started:
    """A process was started; restarted when `again`."""

    name: str
    pid: int
    again: bool
    in_loop: bool
    """True in a crash loop, whose restarts are not shown."""


@dataclass(frozen=True)
class Ended:
    """A process ended unexpectedly; it is restarted in `again_in_s`."""

    name: str
    status: int
    """Exit status, or minus the signal."""
    lived_s: float
    again_in_s: float


@dataclass(frozen=True)
class CrashLoop:
    """A process keeps exiting soon after its start. Restarts continue, with growing delays."""

    name: str
    status: int
    deaths: int
    log: Path
    last_lines: tuple[str, ...]


@dataclass(frozen=True)
class Recovered:
    """Event: a process that was in a crash loop runs steadily again."""

    name: str


@dataclass(frozen=True)
class Killed:
    """A process was killed: it did not stop within its grace period."""

    name: str
    grace_s: float


Event: TypeAlias = Started | Ended | CrashLoop | Recovered | Killed


class ProcessKeeper:
    """Keeps one process running from `start` to `stop`."""

    def __init__(self, spec: ProcessSpec, log: Path, restarts: Restarts, report: Callable[[Event], None]) -> None:
        self.spec = spec
        self.log = log
        self.is_looping = False
        self.restart_count = 0
        """Starts of the process after its first."""
        self._restarts = restarts
        self._report = report
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Pid of the process, or None while none runs."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process for the first time.

        Raises:
            OSError: no process can be created.
        """
        await self._spawn(again=False)
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.spec.name}")

    async def stop(self) -> None:
        """Stop the process with SIGTERM, and kill it when it does not end within its grace period."""
        self._stopping.set()
        if self._task is None:
            return
        if self._process:
            self._process.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self._task], timeout=self.spec.grace_s)
        if not done:
            self._report(Killed(self.spec.name, self.spec.grace_s))
            self.kill()
            await self._task

    def kill(self) -> None:
        """Kill the process now, without a restart."""
        self._stopping.set()
        if self._process:
            self._process.kill()

    async def _keep(self) -> None:
        while self._process or not self._stopping.is_set():
            if self._process is None:
                await self._respawn()
                continue
            status = await self._until_end(self._process)
            # Kept immediately: an instance may wait for the verdict on a retry of the same request.
            if self.spec.crash_journal is not None:
                crash_journal.keep(self.spec.crash_journal, self._process.pid, status)
            lived_s, self._process = self._process.lived_s, None
            if not self._stopping.is_set():
                await self._record_end(status, lived_s)

    async def _until_end(self, process: Process) -> int:
        """Wait for the end of the process; report a recovery from a crash loop meanwhile."""
        end = asyncio.ensure_future(process.wait())
        if self.is_looping:
            await asyncio.wait([end], timeout=self._restarts.steady_s)
            if not end.done():
                self.is_looping = False
                self._restarts = self._restarts.steady()
                self._report(Recovered(self.spec.name))
        return await end

    async def _record_end(self, status: int, lived_s: float) -> None:
        """Record and report an unexpected end, and wait until the restart."""
        self._restarts = self._restarts.after(lived_s)
        if self._restarts.begins_loop:
            self.is_looping = True
            lines = tuple(last_lines(self.log))
            self._report(CrashLoop(self.spec.name, status, self._restarts.early_exits, self.log, lines))
        elif not self._restarts.is_loop:
            self._report(Ended(self.spec.name, status, lived_s, self._restarts.delay_s))
        await self._pause()

    async def _respawn(self) -> None:
        try:
            await self._spawn(again=True)
        # No process can be created now (out of pids, memory or disk for the log): retry later.
        except OSError:
            self._restarts = self._restarts.after(0)
            await self._pause()

    async def _spawn(self, *, again: bool) -> None:
        self.restart_count += again
        self._process = process = await spawn(self.spec, self.log)
        # A stop that arrived during `spawn` has missed the new process.
        if self._stopping.is_set():
            process.signal(signal.SIGTERM)
        else:
            self._report(Started(self.spec.name, process.pid, again, self.is_looping))

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), self._restarts.delay_s)


class Supervisor:
    """Runs groups of processes while the `async with` block lasts; the group that started last stops first."""

    def __init__(self, logs: Path, report: Callable[[Event], None], restarts: Restarts | None = None) -> None:
        self._logs = logs
        self._report = report
        self._restarts = restarts or Restarts()
        self._groups: list[list[ProcessKeeper]] = []
        self._bounding: asyncio.Task[None] | None = None

    @property
    def keepers(self) -> list[ProcessKeeper]:
        """Keepers of all processes, in the order of their start."""
        return [keeper for group in self._groups for keeper in group]

    def pids(self) -> dict[str, int]:
        """Return the pid of each process that runs now, by name."""
        return {keeper.spec.name: keeper.pid for keeper in self.keepers if keeper.pid is not None}

    async def start(self, *specs: ProcessSpec) -> None:
        """Start `specs` as one group, each with a new log; the last run's log is kept as `<name>.log.1`.

        Raises:
            OSError: a process cannot be created.
        """
        group: list[ProcessKeeper] = []
        self._groups.append(group)
        for spec in specs:
            log = self._logs / f"{spec.name}.log"
            if log.exists():
                log.replace(log.with_name(f"{log.name}.1"))
            group.append(ProcessKeeper(spec, log, self._restarts, self._report))
            await group[-1].start()

    def kill_all(self) -> None:
        """Kill every process now."""
        for keeper in self.keepers:
            keeper.kill()

    async def __aenter__(self) -> Supervisor:
        self._bounding = asyncio.create_task(self._bound_logs(), name="bound logs")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        # The stack stops every group, also when stopping one of them fails.
        async with contextlib.AsyncExitStack() as stack:
            if self._bounding:
                stack.push_async_callback(end, self._bounding)
            for group in self._groups:
                stack.push_async_callback(_stop, group)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            for keeper in self.keepers:
                # On a full disk, the next check retries.
                with contextlib.suppress(OSError):
                    bound(keeper.log, LOG_BYTES)


async def _stop(group: Sequence[ProcessKeeper]) -> None:
    await all_to_the_end(keeper.stop() for keeper in group)


def bound(log: Path, size_bytes: int) -> None:
    """Move the content of `log` to `<name>.log.1` when it is larger than `size_bytes`.

    The process has the file open for appending, so the content is copied and the file truncated. Lines written between
    the two are lost: a few of millions.
    """
    if log.stat().st_size > size_bytes:
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
