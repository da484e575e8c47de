"""Children do not outlive a launcher that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from shoal.node import die_with_parent

LAUNCHER = """
import asyncio, sys
from pathlib import Path
from shoal.node.processes import ProcessSpec
from shoal.node.supervisor import Supervisor

async def never(): return False
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"

async def main():
    async with Supervisor(Path(sys.argv[1]), lambda event: None) as supervisor:
        await supervisor.start(*(ProcessSpec(f"a-{n}", (sys.executable, "-c", STUBBORN), never) for n in range(3)))
        print(*supervisor.pids().values(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its launcher"
        time.sleep(0.02)


def test_kill_9_of_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        pids = [int(pid) for pid in launcher.stdout.readline().split()]
        assert len(pids) == 3
        launcher.kill()
    wait_until_gone(pids)


def test_a_launcher_that_died_first_is_noticed() -> None:
    somebody_else = os.getppid()
    command = [
        sys.executable,
        "-I",
        "-S",
        die_with_parent.__file__,
        str(somebody_else),
        str(int(signal.SIGKILL)),
        "/bin/false",
    ]
    assert subprocess.run(command, check=False).returncode == 0  # It did not even start /bin/false.
