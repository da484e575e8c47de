"""Metrics that every process of Shoal has, by OpenTelemetry's names for processes where there are some."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from mesh.h2.memory_account import Holder, MemoryAccount
from mesh.metrics import limits
from mesh.metrics.families import Family, Kind, Reading, Source
from mesh.metrics.largest import largest
from mesh.process.log_levels import LogLevels
from mesh.process.stall_watch import StallWatch

BUILD = Family("shoal.build", Kind.GAUGE, "", "1; the label is the version of Shoal.", ("version",))
START = Family("process.start_time", Kind.GAUGE, "s", "Unix time of the process's start.")
CPU = Family("process.cpu.time", Kind.COUNTER, "s", "Processor time of the process.", ("mode",))
MEMORY = Family("process.memory.usage", Kind.GAUGE, "By", "Resident memory of the process.")
FILES = Family("process.open_file_descriptors", Kind.GAUGE, "{count}", "Open files, sockets among them.")
FILES_MOST = Family("process.file_descriptor.limit", Kind.GAUGE, "{count}", "Most files that the process may open.")
STALLS = Family("shoal.event_loop.stalls", Kind.COUNTER, "{stall}", "Event loop stalls of 50 ms and more.")
STALLED = Family("shoal.event_loop.stalled", Kind.COUNTER, "s", "Time of these stalls.")
LONGEST = Family("shoal.event_loop.longest_stall", Kind.GAUGE, "s", "Longest stall since the start.")
LEVELS = Family(
    "shoal.log.levels.time",
    Kind.GAUGE,
    "s",
    "Unix time of the file of `shoal logs --set-level` whose levels are in force in the process; 0: none.",
)
HELD = Family(
    "shoal.connection.memory",
    Kind.GAUGE,
    "By",
    "Bytes that connections hold: `requests` not yet answered, `responses` not yet read.",
    ("kind",),
)
HELD_MOST = Family("shoal.connection.memory.limit", Kind.GAUGE, "By", "Limit of shoal.connection.memory.", ("kind",))
HELD_BY = Family(
    "shoal.connection.memory.tenant",
    Kind.GAUGE,
    "By",
    "Bytes that requests of a tenant hold until they are answered: the 50 tenants with the most, else `other`. Callers "
    "of an issuer with a fixed tenant are under the issuer.",
    ("tenant",),
)
REFUSED = Family(
    "shoal.connection.memory.refused", Kind.COUNTER, "{request}", "Requests rejected at their begin: no memory is free."
)
FAMILIES = (
    *(BUILD, START, CPU, MEMORY, FILES, FILES_MOST, STALLS, STALLED, LONGEST, LEVELS),
    *(HELD, HELD_MOST, HELD_BY, REFUSED, limits.REFUSED),
)


def source(
    version: str, stalls: StallWatch, accounts: dict[str, MemoryAccount], holders: Sequence[Holder] = ()
) -> Source:
    """Return the readings of this process.

    `accounts` are those of its connections, by kind. `holders` hold the bytes of the account of requests.
    """

    def read() -> Iterable[Reading]:
        yield BUILD, (version,), 1
        yield START, (), start_time()
        times = os.times()
        yield CPU, ("user",), times.user
        yield CPU, ("system",), times.system
        yield MEMORY, (), _resident_bytes()
        yield FILES, (), len(os.listdir("/proc/self/fd"))
        yield FILES_MOST, (), os.sysconf("SC_OPEN_MAX")
        yield STALLS, (), stalls.count
        yield STALLED, (), stalls.total_s
        yield LONGEST, (), stalls.longest_s
        yield LEVELS, (), LogLevels.file_time_s
        for kind, account in accounts.items():
            yield HELD, (kind,), account.held
            yield HELD_MOST, (kind,), account.limit
        for tenant, held in largest(chain.from_iterable(holder() for holder in holders)):
            yield HELD_BY, (tenant,), held
        yield REFUSED, (), sum(account.refused for account in accounts.values())

    return read


def resources(pid: int) -> list[Reading]:
    """Return processor time and memory of a process of another project, under the same names.

    Raises:
        OSError: it has ended, or belongs to another user.
    """
    # proc(5), fields 14 and 15 of stat; the second field may have spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return [
        (CPU, ("user",), int(fields[11]) / ticks),
        (CPU, ("system",), int(fields[12]) / ticks),
        (MEMORY, (), _resident_bytes(pid)),
    ]


def start_time(pid: int | str = "self") -> float:
    """Return the Unix time of a process's start (proc(5), field 22 of stat).

    Raises:
        OSError: it has ended.
    """
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
