"""What a process is working on, in a file that outlives it: so that what it died of is not carried on to the next.

    begin(marks) ──work──> end          a few bytes of shared memory each: no system call
    the process dies ──its supervisor──> INSTANCE.PID.STATUS.crash
    the work comes to another process, as a retry ──> Crashes.verdict: it was executed when a process died

A mark is a digest of a piece of work, a number of 8 bytes. The file: a header (magic, process id), then seats; each has
the number of its marks, and the marks.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

SUFFIX = ".flights"
_CRASH = ".crash"
_HEADER = struct.Struct("<8sQ")
_COUNT = struct.Struct("<Q")
_NOTHING = bytes(8)
_MAGIC = b"flights1"
_SEATS = 128
_MARKS = 256
# Batches are smaller; of a larger one the first are remembered.
_SEAT_BYTES = 8 + 8 * _MARKS
_KEPT = 32
_KEPT_S = 600.0
# A retry comes within a second. Longer is for people who look.

_NOTE_S = 1.0
_POLL_S = 0.01
_EXITING = 0x4
# PF_EXITING of Linux' sched.h. The kernel closes the files of a process before it makes a zombie of it: whoever had a
# connection to it may ask while it still counts as running.

_FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 0})
# Somebody's doing, or the kernel's for want of memory: so only the second time it is taken for the work's.


class Flights:
    """The work of this process. Use as a context manager: leaving in order removes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._free = list(range(_SEATS))

    def __enter__(self) -> Flights:
        size = _HEADER.size + _SEATS * _SEAT_BYTES
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb+") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        _HEADER.pack_into(self._memory, 0, _MAGIC, os.getpid())
        fresh.replace(self._path)
        return self

    def __exit__(self, *raised: object) -> None:
        self._path.unlink(missing_ok=True)

    def seat(self) -> Seat | None:
        """A place for one piece of work at a time; None when all are taken: such work is not remembered."""
        with self._lock:
            return Seat(self, self._memory, self._free.pop()) if self._free else None

    def give_back(self, number: int) -> None:
        with self._lock:
            self._free.append(number)


class Seat:
    """Where one worker says what it works on. Free again with its worker."""

    def __init__(self, flights: Flights, memory: mmap.mmap, number: int) -> None:
        self._flights = flights
        self._memory = memory
        self._number = number
        self._at = _HEADER.size + number * _SEAT_BYTES

    def begin(self, marks: Sequence[int]) -> None:
        count = min(len(marks), _MARKS)
        packed = struct.pack(f"<{count + 1}Q", count, *marks[:_MARKS])
        self._memory[self._at : self._at + len(packed)] = packed

    def end(self) -> None:
        self._memory[self._at : self._at + 8] = _NOTHING

    def __del__(self) -> None:
        self._flights.give_back(self._number)


class Verdict(Enum):
    """What is known of a piece of work that comes again."""

    INNOCENT = "no process died of it"
    SUSPECT = "it was one of several that a process died of, or somebody may have killed that one"
    GUILTY = "a process died of it"


class Crashes:
    """What other processes, whose files are in `folder`, died of."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` is the one that files are dated by."""
        self._folder = folder
        self._clock = clock

    async def verdict(self, mark: int) -> Verdict:
        """Of work that is tried again. Waits a moment where a process has just died, until it is known how."""
        until = time.monotonic() + _NOTE_S
        while self._is_in_question(mark) and time.monotonic() < until:  # noqa: ASYNC110 - another process says so.
            await asyncio.sleep(_POLL_S)
        return self._verdict(mark)

    def _is_in_question(self, mark: int) -> bool:
        """Whether a process that lives no more was at it, and its supervisor has not said how it ended."""
        for path in self._folder.glob(f"*{SUFFIX}"):
            pid, seats = read(path)
            if pid and any(mark in marks for marks in seats) and not _lives(pid):
                return True
        return False

    def _verdict(self, mark: int) -> Verdict:
        suspicions = 0
        for path in self._folder.glob(f"*{_CRASH}"):
            found = [marks for marks in read(path)[1] if mark in marks]
            if not found or not self._is_recent(path):
                continue
            if _status(path) not in _FROM_OUTSIDE and all(len(marks) == 1 for marks in found):
                return Verdict.GUILTY
            suspicions += 1
        return (Verdict.INNOCENT, Verdict.SUSPECT)[suspicions] if suspicions < 2 else Verdict.GUILTY

    def _is_recent(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return self._clock() - path.stat().st_mtime < _KEPT_S
        return False


def keep(path: Path, pid: int, status: int) -> None:
    """For the supervisor of a process that ended with `status` (minus the signal): keeps its file, if it left one."""
    if read(path)[0] != pid:
        return
    with contextlib.suppress(OSError):
        os.utime(path)
        path.replace(path.with_name(f"{path.stem}.{pid}.{status}{_CRASH}"))
        for old in sorted(path.parent.glob(f"*{_CRASH}"), key=lambda kept: kept.stat().st_mtime)[:-_KEPT]:
            old.unlink()


def read(path: Path) -> tuple[int, list[list[int]]]:
    """The process id in a file, and the marks of each seat that is taken; (0, []) when it is none of ours."""
    try:
        data = path.read_bytes()
        magic, pid = _HEADER.unpack_from(data)
    except (OSError, struct.error):
        return 0, []
    if magic != _MAGIC:
        return 0, []
    seats = []
    for at in range(_HEADER.size, len(data) - _SEAT_BYTES + 1, _SEAT_BYTES):
        count = min(_COUNT.unpack_from(data, at)[0], _MARKS)
        if count:
            seats.append(list(struct.unpack_from(f"<{count}Q", data, at + 8)))
    return int(pid), seats


def _lives(pid: int) -> bool:
    """Whether the process is there, and not about to end (proc(5), fields 3 and 9)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in ("Z", "X") and not int(fields[6]) & _EXITING


def _status(path: Path) -> int:
    return int(path.name.removesuffix(_CRASH).rpartition(".")[2])
