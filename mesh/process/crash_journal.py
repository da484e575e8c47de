"""Crash journal: a memory-mapped file of the work in progress, which survives the process and names poison requests.

    begin(fingerprints) ──work──> end          a few bytes of shared memory each, no system call
    the process dies ──its supervisor──> INSTANCE.PID.STATUS.crash
    another process gets the work as a retry ──> Crashes.verdict: was it in progress when a process died?

A fingerprint is a digest of one piece of work, an 8-byte number. File format: a header (magic, process id), then slots
of fixed size; each slot holds the number of its fingerprints, then the fingerprints.
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
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

SUFFIX = ".flights"
_CRASH = ".crash"
_HEADER = struct.Struct("<8sQ")
_COUNT = struct.Struct("<Q")
_NOTHING = bytes(8)
_MAGIC = b"flights1"
_SLOTS = 128
# Batches are smaller. Of a larger one, the first fingerprints are recorded.
_FINGERPRINTS = 256
_SLOT_BYTES = 8 + 8 * _FINGERPRINTS
_KEPT = 32
# A retry arrives within a second. The rest of the time is for people who investigate.
_KEPT_S = 600.0
_NOTE_S = 1.0
_POLL_S = 0.01
# PF_EXITING of Linux' sched.h. The kernel closes a process's files before the process becomes a zombie, so a peer may
# ask while the process still counts as running.
_EXITING = 0x4
# Signals that a person or the kernel (out of memory) sends. Only the second such death is blamed on the work.
_FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 0})


class CrashJournal:
    """Work in progress of this process. Use as a context manager; an orderly exit removes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._free = list(range(_SLOTS))

    def __enter__(self) -> CrashJournal:
        size = _HEADER.size + _SLOTS * _SLOT_BYTES
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb+") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        _HEADER.pack_into(self._memory, 0, _MAGIC, os.getpid())
        fresh.replace(self._path)
        return self

    def __exit__(self, *raised: object) -> None:
        self._path.unlink(missing_ok=True)

    def slot(self) -> Slot | None:
        """Return a free slot for one piece of work at a time; None when all are in use (that work is not recorded)."""
        with self._lock:
            return Slot(self, self._memory, self._free.pop()) if self._free else None

    def release(self, number: int) -> None:
        with self._lock:
            self._free.append(number)


class Slot:
    """Slot of one worker: the fingerprints of the work that the worker executes. Released with its worker."""

    def __init__(self, journal: CrashJournal, memory: mmap.mmap, number: int) -> None:
        self._journal = journal
        self._memory = memory
        self._number = number
        self._at = _HEADER.size + number * _SLOT_BYTES

    def begin(self, fingerprints: Sequence[int]) -> None:
        count = min(len(fingerprints), _FINGERPRINTS)
        packed = struct.pack(f"<{count + 1}Q", count, *fingerprints[:_FINGERPRINTS])
        self._memory[self._at : self._at + len(packed)] = packed

    def end(self) -> None:
        self._memory[self._at : self._at + 8] = _NOTHING

    def __del__(self) -> None:
        self._journal.release(self._number)


class Verdict(Enum):
    """Evidence against a piece of work that is retried."""

    NOT_SEEN = "no process died while it executed this work"
    AMBIGUOUS = "a process died while it executed this work and others, or a person may have killed that process"
    CONFIRMED = "a process died of this work"


Slots = list[list[int]]
"""Fingerprints of each slot that was in use."""


@dataclass(frozen=True)
class _Journals:
    """The journals in a folder at one time."""

    undecided: list[Slots]
    """Of dead processes whose supervisors have not recorded the exit yet."""
    crashes: list[tuple[int, Slots]]
    """Exit status and journal of each recent death."""


class Crashes:
    """Reads the crash journals in `folder` that other processes left."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Store `folder` and `clock`, the clock of the files' modification times."""
        self._folder = folder
        self._clock = clock
        self._journals: _Journals | None = None

    async def verdict(self, fingerprint: int) -> Verdict:
        """Return the evidence against retried work. Waits up to a second for the exit status of a dying process."""
        until = time.monotonic() + _NOTE_S
        journals = self._read_once()
        while any(_found(fingerprint, slots) for slots in journals.undecided) and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
            journals = self._read_once()
        ambiguous = 0
        for status, slots in journals.crashes:
            if found := _found(fingerprint, slots):
                if status not in _FROM_OUTSIDE and all(len(fingerprints) == 1 for fingerprints in found):
                    return Verdict.CONFIRMED
                ambiguous += 1
        return (Verdict.NOT_SEEN, Verdict.AMBIGUOUS)[ambiguous] if ambiguous < 2 else Verdict.CONFIRMED

    def _read_once(self) -> _Journals:
        """Read the journals once in each iteration of the event loop: a bulk may have hundreds of retries."""
        if self._journals is None:
            flights = [read(path) for path in self._folder.glob(f"*{SUFFIX}")]
            self._journals = _Journals(
                [slots for pid, slots in flights if slots and not _lives(pid)],
                [(_status(path), read(path)[1]) for path in self._folder.glob(f"*{_CRASH}") if self._is_recent(path)],
            )
            asyncio.get_running_loop().call_soon(self._forget)
        return self._journals

    def _forget(self) -> None:
        self._journals = None

    def _is_recent(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return self._clock() - path.stat().st_mtime < _KEPT_S
        return False


def _found(fingerprint: int, slots: Slots) -> Slots:
    return [fingerprints for fingerprints in slots if fingerprint in fingerprints]


def keep(path: Path, pid: int, status: int) -> None:
    """Keep the journal of a dead process as a crash file. For supervisors; `status` is negative for a signal."""
    if read(path)[0] != pid:
        return
    with contextlib.suppress(OSError):
        os.utime(path)
        path.replace(path.with_name(f"{path.stem}.{pid}.{status}{_CRASH}"))
        for old in sorted(path.parent.glob(f"*{_CRASH}"), key=lambda kept: kept.stat().st_mtime)[:-_KEPT]:
            old.unlink()


def read(path: Path) -> tuple[int, Slots]:
    """Return the process id and each used slot's fingerprints; (0, []) when the file is not a crash journal."""
    try:
        data = path.read_bytes()
        magic, pid = _HEADER.unpack_from(data)
    except (OSError, struct.error):
        return 0, []
    if magic != _MAGIC:
        return 0, []
    slots = []
    for at in range(_HEADER.size, len(data) - _SLOT_BYTES + 1, _SLOT_BYTES):
        count = min(_COUNT.unpack_from(data, at)[0], _FINGERPRINTS)
        if count:
            slots.append(list(struct.unpack_from(f"<{count}Q", data, at + 8)))
    return int(pid), slots


def _lives(pid: int) -> bool:
    """Return True when the process runs and is not exiting (proc(5), fields 3 and 9)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in ("Z", "X") and not int(fields[6]) & _EXITING


def _status(path: Path) -> int:
    return int(path.name.removesuffix(_CRASH).rpartition(".")[2])
