"""Real processes are kept running, reported on, and stopped in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.node import supervisor as supervisors
from shoal.node.log_tail import last_lines
from shoal.node.process import ending
from shoal.node.processes import ProcessSpec
from shoal.node.restarts import Restarts
from shoal.node.supervisor import CrashLoop, Ended, Event, Killed, Recovered, Started, Supervisor, bound
from tests.breakable import until

# Says its name when it is stopped, so that the order of the stops can be read in one file.
POLITE = """
import signal, sys, time
def stop(*_):
    with open(sys.argv[1], "a") as file: file.write(sys.argv[2] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
while True: time.sleep(60)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


async def never() -> bool:
    return False


def spec(name: str, code: str, *args: str, **options: Any) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-c", code, *args), never, **options)


class Story:
    """The events, as they came."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def supervised(tmp_path: Path, story: Story) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(*groups: list[ProcessSpec], restarts: Restarts | None = None) -> AsyncIterator[Supervisor]:
        async with Supervisor(tmp_path, story, restarts) as supervisor:
            for group in groups:
                await supervisor.start(*group)
            yield supervisor

    return start


def says_up(log: Path) -> bool:
    return log.exists() and "up" in log.read_text()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_failed_stop_does_not_prevent_other_stops(
    tmp_path: Path, supervised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = supervisors.ProcessKeeper.stop

    async def failing(self: supervisors.ProcessKeeper) -> None:
        await stop(self)
        if self.spec.name == "b-0":
            raise OSError("no space left for its crash journal")

    monkeypatch.setattr(supervisors.ProcessKeeper, "stop", failing)
    order = tmp_path / "order"
    groups = [[spec(name, POLITE, str(order), name) for name in group] for group in (["a-0"], ["b-0", "b-1"], ["c-0"])]
    pids: dict[str, int] = {}

    async def live() -> None:
        async with supervised(*groups) as supervisor:
            pids.update(supervisor.pids())
            for name in pids:
                await until(lambda name=name: says_up(tmp_path / f"{name}.log"), name)

    with pytest.raises(OSError, match="no space left"):
        await live()
    assert len(pids) == 4
    assert not any(is_alive(pid) for pid in pids.values())
    assert set(order.read_text().split()) == {"a-0", "b-0", "b-1", "c-0"}


async def test_the_group_that_started_last_stops_first(tmp_path: Path, supervised: Any, story: Story) -> None:
    order = tmp_path / "order"
    groups = [[spec(name, POLITE, str(order), name) for name in group] for group in (["a-0"], ["b-0", "b-1"], ["c-0"])]
    async with supervised(*groups) as supervisor:
        assert list(supervisor.pids()) == ["a-0", "b-0", "b-1", "c-0"]
        for name in supervisor.pids():
            await until(lambda name=name: says_up(tmp_path / f"{name}.log"))
        pids = supervisor.pids().values()
    stopped = order.read_text().split()
    assert (stopped[0], set(stopped[1:3]), stopped[3]) == ("c-0", {"b-0", "b-1"}, "a-0")
    assert not any(is_alive(pid) for pid in pids)
    assert not story.of(Ended)


async def test_a_killed_process_is_restarted_with_another_pid(tmp_path: Path, supervised: Any, story: Story) -> None:
    async with supervised([spec("a-0", POLITE, str(tmp_path / "order"), "a-0")]) as supervisor:
        old = supervisor.pids()["a-0"]
        os.kill(old, signal.SIGKILL)
        await until(lambda: supervisor.pids().get("a-0", old) != old)
        assert story.of(Ended)[0].status == -signal.SIGKILL
        assert [event.again for event in story.of(Started)] == [False, True]
        assert is_alive(supervisor.pids()["a-0"])


async def test_a_crash_loop_is_reported_once_with_the_last_lines(tmp_path: Path, supervised: Any, story: Story) -> None:
    fast = Restarts(first_s=0.01, last_s=0.01)
    dying = spec("bad-0", "import sys; print('no disk', flush=True); sys.exit(3)")
    async with supervised([dying], [spec("good-0", POLITE, str(tmp_path / "o"), "g")], restarts=fast) as supervisor:
        good = supervisor.pids()["good-0"]
        await until(lambda: len(story.of(Started)) > 7)
        (loop,) = story.of(CrashLoop)
        assert (loop.name, loop.status, loop.deaths) == ("bad-0", 3, 3)
        assert loop.last_lines[-1] == "no disk"
        assert loop.log == tmp_path / "bad-0.log"
        assert len(story.of(Ended)) == 2  # The two before the loop; the ones within it are not told.
        assert supervisor.pids()["good-0"] == good


async def test_recovery_from_a_crash_loop_is_reported(tmp_path: Path, supervised: Any, story: Story) -> None:
    mark = tmp_path / "enough"
    code = "import os, sys, time; os.path.exists(sys.argv[1]) or sys.exit(1); time.sleep(600)"
    fast = Restarts(first_s=0.01, last_s=0.05, steady_s=0.5, loop_after=2)
    async with supervised([spec("a-0", code, str(mark))], restarts=fast):
        await until(lambda: bool(story.of(CrashLoop)))
        mark.touch()
        await until(lambda: bool(story.of(Recovered)))


async def test_a_process_that_does_not_stop_is_killed_after_its_grace_period(
    tmp_path: Path, supervised: Any, story: Story
) -> None:
    async with supervised([spec("a-0", STUBBORN, grace_s=0.2)]) as supervisor:
        await until(lambda: says_up(tmp_path / "a-0.log"))
        pid = supervisor.pids()["a-0"]
    assert story.of(Killed) == [Killed("a-0", 0.2)]
    assert not is_alive(pid)


async def test_a_frozen_process_is_killed(tmp_path: Path, supervised: Any, story: Story) -> None:
    async with supervised([spec("a-0", POLITE, str(tmp_path / "o"), "a", grace_s=0.2)]) as supervisor:
        pid = supervisor.pids()["a-0"]
        await until(lambda: says_up(tmp_path / "a-0.log"))
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T"))
    assert [event.name for event in story.of(Killed)] == ["a-0"]


async def test_kill_all_ends_everything_for_good(supervised: Any) -> None:
    async with supervised([spec("a-0", STUBBORN, grace_s=60)], [spec("b-0", STUBBORN, grace_s=60)]) as supervisor:
        pids = list(supervisor.pids().values())
        supervisor.kill_all()
        await until(lambda: not any(is_alive(pid) for pid in pids))
        await until(lambda: supervisor.pids() == {})


async def test_a_stop_during_the_wait_for_a_restart_does_not_wait(supervised: Any, story: Story) -> None:
    async with supervised([spec("a-0", "raise SystemExit(1)")], restarts=Restarts(first_s=3600, last_s=3600)):
        await until(lambda: bool(story.of(Ended)))
    assert len(story.of(Started)) == 1


async def test_a_command_that_is_not_there_is_a_crash_loop_that_names_it(
    tmp_path: Path, supervised: Any, story: Story
) -> None:
    missing = ProcessSpec("a-0", (str(tmp_path / "nowhere"),), never)
    async with supervised([missing], restarts=Restarts(first_s=0.01, last_s=0.01)):
        await until(lambda: bool(story.of(CrashLoop)))
    assert story.of(CrashLoop)[0].status == 127
    assert f"cannot run {tmp_path}/nowhere: No such file" in story.of(CrashLoop)[0].last_lines[-1]


async def test_children_hear_no_ctrl_c_of_the_terminal(supervised: Any) -> None:
    async with supervised([spec("a-0", STUBBORN, grace_s=0.1)]) as supervisor:
        assert os.getsid(supervisor.pids()["a-0"]) != os.getsid(0)


async def test_the_log_of_the_last_run_is_kept(tmp_path: Path, supervised: Any) -> None:
    (tmp_path / "a-0.log").write_text("the last run")
    async with supervised([spec("a-0", POLITE, str(tmp_path / "o"), "a")]):
        await until(lambda: says_up(tmp_path / "a-0.log"))
    assert (tmp_path / "a-0.log.1").read_text() == "the last run"
    assert "last run" not in (tmp_path / "a-0.log").read_text()


async def test_a_log_is_bounded_while_its_process_writes(
    tmp_path: Path, supervised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisors, "LOG_BYTES", 50_000)
    monkeypatch.setattr(supervisors, "_LOG_CHECK_S", 0.01)
    chatty = "import time\nwhile True: print('x' * 1000, flush=True); time.sleep(0.001)"
    async with supervised([spec("a-0", chatty, grace_s=1)]):
        await until(lambda: (tmp_path / "a-0.log.1").exists())
        for _ in range(20):
            await asyncio.sleep(0.02)
            assert (tmp_path / "a-0.log").stat().st_size < 1_000_000


def test_a_small_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("small")
    bound(tmp_path / "x.log", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]


def test_the_last_lines_of_a_log_are_shortened(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(
        '{"time": "2026-11-28T12:00:00Z", "level": "ERROR", "message": "no store", '
        '"exception": "Traceback\\n  ...\\nOSError: gone"}\n'
        '{"t": {"$date": "2026-11-28T12:00:01.5+00:00"}, "s": "E", "msg": "exiting", "attr": {"code": 48}}\n'
        "\n[1, 2]\n" + "y" * 1000 + "\n"
    )
    said = last_lines(log)
    assert said[:3] == ["ERROR no store (OSError: gone)", "ERROR exiting  code=48", "[1, 2]"]
    assert len(said[3]) == 300
    assert last_lines(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("status", "words"), [(0, "exited with 0"), (-9, "was killed by SIGKILL"), (-99, "was killed by signal 99")]
)
def test_an_ending_in_words(status: int, words: str) -> None:
    assert ending(status) == words
