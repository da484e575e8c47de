"""Crash journal: the next process that gets the work of a dead one knows that it was in progress."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.process import crash_journal
from mesh.process.crash_journal import Crashes, CrashJournal, Verdict

A, B, C = map(ord, "abc")
CHILD = """
import os, sys
from pathlib import Path
from mesh.process.crash_journal import CrashJournal
with CrashJournal(Path(sys.argv[1])) as mine:
    slots = [mine.slot() for _ in sys.argv[2:]]
    for slot, fingerprints in zip(slots, sys.argv[2:]):
        slot.begin([*map(ord, fingerprints)])
    spare = mine.slot()
    spare.begin([ord("z")]); spare.end()
    sys.stdout.flush()
    os._exit(3)
"""

SLOW_TO_END = """
import os, resource, sys
from pathlib import Path
from mesh.process.crash_journal import CrashJournal
most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 8_000)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
def open_many():
    for _ in range(most // 2 - 50):
        os.open("/dev/null", os.O_RDONLY)
with CrashJournal(Path(sys.argv[1])) as mine:
    slot = mine.slot()
    slot.begin([ord("a")])
    given = int(sys.argv[2])
    open_many()
    connection = os.dup(given)
    os.close(given)
    open_many()
    os._exit(3)
"""
# Its end of a pipe is closed among thousands of other files: milliseconds before it has ended, in whatever order.


def died(folder: Path, name: str, *slots: str, status: int | None = 3) -> None:
    """A process that died while each of its slots had these fingerprints, and what its supervisor made of it."""
    path = folder / f"{name}.flights"
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(path), *slots])
    assert process.wait(60) == 3
    if status is not None:
        crash_journal.keep(path, process.pid, status)


async def test_work_that_ran_alone_is_confirmed_and_other_work_is_not(tmp_path: Path) -> None:
    died(tmp_path, "infer-0", "a", "bc")
    crashes = Crashes(tmp_path)
    assert await crashes.verdict(A) is Verdict.CONFIRMED
    assert await crashes.verdict(B) is Verdict.AMBIGUOUS
    assert await crashes.verdict(ord("z")) is Verdict.NOT_SEEN


async def test_one_of_several_is_guilty_the_second_time(tmp_path: Path) -> None:
    died(tmp_path, "infer-0", "ab")
    died(tmp_path, "infer-1", "bc")
    crashes = Crashes(tmp_path)
    assert [await crashes.verdict(fingerprint) for fingerprint in (A, B, C)] == [
        Verdict.AMBIGUOUS,
        Verdict.CONFIRMED,
        Verdict.AMBIGUOUS,
    ]


@pytest.mark.parametrize("status", [-9, -15])
async def test_the_first_kill_from_outside_is_ambiguous(tmp_path: Path, status: int) -> None:
    died(tmp_path, "infer-0", "a", status=status)
    assert await Crashes(tmp_path).verdict(A) is Verdict.AMBIGUOUS
    died(tmp_path, "infer-0", "a", status=status)
    assert await Crashes(tmp_path).verdict(A) is Verdict.CONFIRMED


async def test_it_is_forgotten_in_the_end(tmp_path: Path) -> None:
    died(tmp_path, "infer-0", "a")
    (kept,) = tmp_path.glob("*.crash")
    assert await Crashes(tmp_path, lambda: kept.stat().st_mtime + 599).verdict(A) is Verdict.CONFIRMED
    assert await Crashes(tmp_path, lambda: kept.stat().st_mtime + 601).verdict(A) is Verdict.NOT_SEEN


async def test_retries_that_arrive_together_read_the_journals_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died(tmp_path, "infer-0", "a")
    crashes, reads, read = Crashes(tmp_path), list[Path](), crash_journal.read
    monkeypatch.setattr(crash_journal, "read", lambda path: (reads.append(path), read(path))[1])
    verdicts = await asyncio.gather(*(crashes.verdict(fingerprint) for fingerprint in [A, B] * 128))
    assert verdicts == [Verdict.CONFIRMED, Verdict.NOT_SEEN] * 128
    assert len(reads) == 1
    died(tmp_path, "infer-1", "b")
    assert await crashes.verdict(B) is Verdict.CONFIRMED


async def test_invalid_files_and_unwatched_processes_delay_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.flights").write_bytes(b"nonsense")
    (tmp_path / "y.flights").touch()
    (tmp_path / "infer-9.1.3.crash").write_bytes(b"nonsense" * 99)
    died(tmp_path, "infer-0", "a", status=None)
    assert await Crashes(tmp_path).verdict(A) is Verdict.NOT_SEEN


async def test_a_verdict_waits_for_the_exit_status_of_an_ending_process(tmp_path: Path) -> None:
    path = tmp_path / "infer-0.flights"
    reader, writer = os.pipe()
    command = [sys.executable, "-c", SLOW_TO_END, str(path), str(writer)]
    with os.fdopen(reader, "rb") as connection, subprocess.Popen(command, pass_fds=[writer]) as process:
        os.close(writer)
        assert connection.read() == b""
        asked = asyncio.create_task(Crashes(tmp_path).verdict(A))
        await asyncio.sleep(0)
        assert process.wait(60) == 3
        crash_journal.keep(path, process.pid, 3)
        assert await asked is Verdict.CONFIRMED


async def test_the_work_of_a_running_process_is_not_seen(tmp_path: Path) -> None:
    with CrashJournal(tmp_path / "me.flights") as mine:
        slot = mine.slot()
        assert slot is not None
        slot.begin([A])
        assert crash_journal.read(tmp_path / "me.flights") == (os.getpid(), [[A]])
        assert await Crashes(tmp_path).verdict(A) is Verdict.NOT_SEEN
    assert list(tmp_path.iterdir()) == []


def test_slots_are_claimed_and_released(tmp_path: Path) -> None:
    with CrashJournal(tmp_path / "me.flights") as mine:
        slots = [mine.slot() for _ in range(128)]
        assert mine.slot() is None
        slots.pop()
        again = mine.slot()
        assert again is not None
        again.begin([A] * 1_000)
        again.end()
        assert crash_journal.read(tmp_path / "me.flights")[1] == []


def test_few_crashes_are_kept(tmp_path: Path) -> None:
    with CrashJournal(tmp_path / "me.flights"):
        data = (tmp_path / "me.flights").read_bytes()
    for number in range(40):
        (tmp_path / "me.flights").write_bytes(data)
        crash_journal.keep(tmp_path / "me.flights", os.getpid(), number)
    assert len(list(tmp_path.glob("*.crash"))) == 32
