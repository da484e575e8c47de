"""One running process of a node: on a leash, in a session of its own, its output in its log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shoal.node import die_with_parent
from shoal.node.processes import ProcessSpec

_FILES = 65_536
# What mongod asks for.


class Process:
    """A started process. Make it with `spawn`; `wait` tells how it ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._started = time.monotonic()
        self.pid: int = process.pid

    @property
    def lived_s(self) -> float:
        return time.monotonic() - self._started

    async def wait(self) -> int:
        """Waits for its end: the exit status, or minus the signal that killed it."""
        return await self._process.wait()

    def signal(self, number: int) -> None:
        """Signals it, if it still runs."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills it and what it started, if it still runs."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


async def spawn(part: ProcessSpec, log: Path | None) -> Process:
    """Starts `part`, whose output goes to the end of `log`; without one it goes where the launcher's goes.

    A session of its own keeps a terminal's Ctrl-C from it: the launcher alone hears it, and stops things in order.

    Raises:
        OSError: the log cannot be opened, or no process can be made.
    """
    with log.open("ab") if log else contextlib.nullcontext() as out:
        process = await asyncio.create_subprocess_exec(
            *_leashed(part.argv, part.at_launcher_death),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **part.env},
            start_new_session=True,
        )
    return Process(process)


def _leashed(argv: Sequence[str], number: int) -> list[str]:
    return [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()), str(int(number)), *argv]


def raise_file_limit() -> None:
    """Lets this process, and so its children, open as many files as it may: each connection of a client is one.

    The usual soft limit, 1,024, is meant for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def ending(status: int) -> str:
    """An exit status in words: `exited with 1`, `was killed by SIGKILL`."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
