"""Children do not outlive a launcher that is killed, and the processes that keep jobs run at a lower priority."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shoal.node import die_with_parent, plan
from shoal.node.options import Options
from shoal.node.plan import JOBS_NICE, Layout
from shoal.node.process import spawn
from shoal.node.processes import ProcessSpec
from tests.breakable import until

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


async def never() -> bool:
    return False


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
        "0",
        "/bin/false",
    ]
    assert subprocess.run(command, check=False).returncode == 0  # It did not even start /bin/false.


def session_nice(pid: int) -> int | None:
    """Return the nice value of the process's session; None where the kernel has none."""
    group = Path(f"/proc/{pid}/autogroup")
    text = group.read_text() if group.exists() else ""
    return int(text.split()[-1]) if text else None


async def test_the_processes_that_keep_jobs_run_at_a_lower_priority(tmp_path: Path) -> None:
    options, layout = Options(data_dir=tmp_path), Layout(tmp_path / "run", 1, 2)
    nice = {spec.name: spec.nice for group in plan.groups(options, layout, {}, 1) for spec in group}
    jobs = dict.fromkeys(("mongod", "store-0", "ingest-0"), JOBS_NICE)
    assert nice == {**dict.fromkeys(("etcd", "envoy", "coord-0", "infer-0"), 0), **jobs}

    argv = (sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)")
    log, own = tmp_path / "log", os.getpriority(os.PRIO_PROCESS, 0)
    for value in (JOBS_NICE, 0):
        process = await spawn(ProcessSpec("a", argv, never, nice=value), log)
        try:
            await until(lambda: log.exists() and "up" in log.read_text(), "the process runs")
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(own + value, 19)
            assert session_nice(process.pid) in {value, None}
        finally:
            process.kill()
            await process.wait()
        log.unlink()


# As a user who may write to the file once in 0.1 s. The interpreter of the tests may lie in a folder of root: the
# script becomes that user after its start, and then its files in /proc must be its own again.
SEVERAL = """
import ctypes, os, sys
from shoal.node.die_with_parent import set_session_nice
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
set_session_nice(5)
print(open("/proc/self/autogroup").read().split()[-1])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(session_nice(os.getpid()) is None, reason="this kernel has no nice value for sessions")
def test_several_processes_of_a_plain_user_lower_their_priority_at_once() -> None:
    command = [sys.executable, "-c", SEVERAL]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        for _ in range(8)
    ]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["5\n"] * 8


# As in a sandbox that forbids it.
FORBIDDEN = """
import os
from shoal.node import die_with_parent
def nice(value): raise PermissionError(1, "Operation not permitted")
os.nice = nice
die_with_parent.main(os.getppid(), 9, 5, ["/bin/echo", "up"])
"""


def test_a_process_whose_priority_cannot_be_lowered_runs_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", FORBIDDEN], capture_output=True, text=True, check=True)
    assert done.stdout == "up\n"
    assert "nice 5: [Errno 1] Operation not permitted: /bin/echo runs at the usual priority" in done.stderr
