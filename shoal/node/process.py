"""One running process of a node: it dies with the launcher, has its own session, and writes to its own log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

from shoal.node import die_with_parent
from shoal.node.processes import ProcessSpec

# The limit that mongod recommends.
_OPEN_FILES = 65_536


class Process:
    """A started process. Created by `spawn`; `wait` returns its exit status."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._started = time.monotonic()
        self.pid: int = process.pid

    @property
    def lived_s(self) -> float:
        return time.monotonic() - self._started

    async def wait(self) -> int:
        """Wait for the end of the process. Return its exit status, or minus the signal that killed it."""
        return await self._process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and its children if it still runs."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


async def spawn(spec: ProcessSpec, log: Path | None) -> Process:
    """Start `spec`. Its output is appended to `log`; without a log it goes to the launcher's output.

    The process gets its own session, so a terminal's Ctrl-C reaches the launcher alone, which stops all in order.

    Raises:
        OSError: the log cannot be opened, or no process can be created.
    """
    with log.open("ab") if log else contextlib.nullcontext() as out:
        process = await asyncio.create_subprocess_exec(
            *_tied_to_launcher(spec),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **spec.env},
            cwd=spec.cwd,
            start_new_session=True,
        )
    return Process(process)


def _tied_to_launcher(spec: ProcessSpec) -> list[str]:
    numbers = os.getpid(), int(spec.at_launcher_death), spec.nice
    return [sys.executable, "-I", "-S", die_with_parent.__file__, *map(str, numbers), *spec.argv]


def raise_file_limit() -> None:
    """Raise the limit of open files of this process and its children: each client connection is one file.

    The usual soft limit, 1,024, is meant for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a launcher: SIGHUP only where the process did not start with it ignored.

    `nohup` ignores SIGHUP for what it starts, so that the end of the user's login does not end that too.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if is_ignored else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ending(status: int) -> str:
    """Return an exit status in words: `exited with 1`, `was killed by SIGKILL`."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
