"""Keeps the processes of a node running, and stops them in order.

    start(etcd)  start(mongod)  start(envoy)  start(coord-0, coord-1)  ...      each call is a group
    stop         <-------------------------------------------------------      the last group first

When a process ends is seen at once; when it starts again is decided by `restarts`; what happened is told as events.
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
from shoal.node.process import Process, spawn
from shoal.node.processes import ProcessSpec
from shoal.node.restarts import Restarts
from shoal.node.log_tail import last_lines

LOG_BYTES = 16 << 20
"""A log is moved to `<name>.log.1` when it is larger; so a process has at most about twice this on disk."""
_LOG_CHECK_S = 2.0


@dataclass(frozen=True)
class Started:
    """A process runs; with a new pid when `again`."""

    name: str
    pid: int
    again: bool
    in_loop: bool
    """It is in a crash loop: not worth a word."""


@dataclass(frozen=True)
class Ended:
    """A process ended that should not have; it is started again in `again_in_s`."""

    name: str
    status: int
    """Exit status, or minus the signal."""
    lived_s: float
    again_in_s: float


@dataclass(frozen=True)
class CrashLoop:
    """A process keeps ending soon after its start. Its restarts go on, ever more slowly."""

    name: str
    status: int
    deaths: int
    log: Path
    last_lines: tuple[str, ...]


@dataclass(frozen=True)
class Recovered:
    """A process that was in a crash loop has held."""

    name: str


@dataclass(frozen=True)
class Killed:
    """A process had to be killed: it did not stop within its grace."""

    name: str
    grace_s: float


Event: TypeAlias = Started | Ended | CrashLoop | Recovered | Killed


class ProcessKeeper:
    """Keeps one process running from `start` to `stop`."""

    def __init__(self, part: ProcessSpec, log: Path, restarts: Restarts, tell: Callable[[Event], None]) -> None:
        self.part = part
        self.log = log
        self.is_looping = False
        self._restarts = restarts
        self._tell = tell
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The pid of the process, or None while there is none."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Starts the process for the first time.

        Raises:
            OSError: no process can be made.
        """
        await self._spawn(again=False)
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.part.name}")

    async def stop(self) -> None:
        """Asks the process to stop, and kills it when it does not within its grace."""
        self._stopping.set()
        if self._task is None:
            return
        if self._process:
            self._process.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self._task], timeout=self.part.grace_s)
        if not done:
            self._tell(Killed(self.part.name, self.part.grace_s))
            self.kill()
            await self._task

    def kill(self) -> None:
        """Kills the process now, for good."""
        self._stopping.set()
        if self._process:
            self._process.kill()

    async def _keep(self) -> None:
        while self._process or not self._stopping.is_set():
            if self._process is None:
                await self._respawn()
                continue
            status = await self._until_end(self._process)
            if self.part.flights is not None:  # At once: a retry of what it died of is waiting.
                crash_journal.keep(self.part.flights, self._process.pid, status)
            lived_s, self._process = self._process.lived_s, None
            if not self._stopping.is_set():
                await self._take_down(status, lived_s)

    async def _until_end(self, process: Process) -> int:
        """Waits for the end of the process; says on the way that it recovered, when it did."""
        end = asyncio.ensure_future(process.wait())
        if self.is_looping:
            await asyncio.wait([end], timeout=self._restarts.steady_s)
            if not end.done():
                self.is_looping = False
                self._restarts = self._restarts.steady()
                self._tell(Recovered(self.part.name))
        return await end

    async def _take_down(self, status: int, lived_s: float) -> None:
        """Notes an end that nobody asked for, and waits until it is time to start again."""
        self._restarts = self._restarts.after(lived_s)
        if self._restarts.is_news:
            self.is_looping = True
            lines = tuple(last_lines(self.log))
            self._tell(CrashLoop(self.part.name, status, self._restarts.young_deaths, self.log, lines))
        elif not self._restarts.is_loop:
            self._tell(Ended(self.part.name, status, lived_s, self._restarts.delay_s))
        await self._pause()

    async def _respawn(self) -> None:
        try:
            await self._spawn(again=True)
        except OSError:  # No process can be made now (out of pids, of memory, of disk for the log): later.
            self._restarts = self._restarts.after(0)
            await self._pause()

    async def _spawn(self, *, again: bool) -> None:
        self._process = process = await spawn(self.part, self.log)
        if self._stopping.is_set():  # The stop came while the process was made, and missed it.
            process.signal(signal.SIGTERM)
        else:
            self._tell(Started(self.part.name, process.pid, again, self.is_looping))

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), self._restarts.delay_s)


class Supervisor:
    """Runs groups of processes for as long as the block lasts; what was started last stops first."""

    def __init__(self, logs: Path, tell: Callable[[Event], None], restarts: Restarts | None = None) -> None:
        self._logs = logs
        self._tell = tell
        self._restarts = restarts or Restarts()
        self._groups: list[list[ProcessKeeper]] = []
        self._bounding: asyncio.Task[None] | None = None

    @property
    def keepers(self) -> list[ProcessKeeper]:
        """One for each process, in the order in which they were started."""
        return [keeper for group in self._groups for keeper in group]

    def pids(self) -> dict[str, int]:
        """The pid of each process that runs now, by name."""
        return {keeper.part.name: keeper.pid for keeper in self.keepers if keeper.pid is not None}

    async def start(self, *parts: ProcessSpec) -> None:
        """Starts `parts` as one group, each with a fresh log (the last run's log is kept as `<name>.log.1`).

        Raises:
            OSError: a process cannot be made.
        """
        group: list[ProcessKeeper] = []
        self._groups.append(group)
        for part in parts:
            log = self._logs / f"{part.name}.log"
            if log.exists():
                log.replace(log.with_name(f"{log.name}.1"))
            group.append(ProcessKeeper(part, log, self._restarts, self._tell))
            await group[-1].start()

    def kill_all(self) -> None:
        """Kills every process now."""
        for keeper in self.keepers:
            keeper.kill()

    async def __aenter__(self) -> Supervisor:
        self._bounding = asyncio.create_task(self._bound_logs(), name="bound logs")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:  # One that cannot be stopped keeps no other running.
            if self._bounding:
                stack.push_async_callback(end, self._bounding)
            for group in self._groups:
                stack.push_async_callback(_stop, group)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            for keeper in self.keepers:
                with contextlib.suppress(OSError):  # A full disk: the next turn tries again.
                    bound(keeper.log, LOG_BYTES)


async def _stop(group: Sequence[ProcessKeeper]) -> None:
    await all_to_the_end(keeper.stop() for keeper in group)


def bound(log: Path, size_bytes: int) -> None:
    """Moves what is in `log` to `<name>.log.1` when that is more than `size_bytes`.

    The process holds the file open for appending, so the file stays and is cut to nothing. What is written between the
    copy and the cut is lost: a few lines of millions.
    """
    if log.stat().st_size > size_bytes:
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
