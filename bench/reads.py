"""Reads of single jobs: their CPU, of this process and of MongoDB, in shared queries and in a query each.

    python bench/reads.py [--callers 1 8 64 1000] [--rounds 5]

A mongod of its own (one member, as a node starts it), 2,000 jobs of 300 bytes. Each caller reads one job after the
other, as callers of GetJob and watchers do. The rounds of both ways alternate; the figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import uvloop
from claims import job, mongod
from pymongo.asynchronous.collection import AsyncCollection
from rich.console import Console
from rich.table import Table

from mesh.mongo import connect
from mesh.mongo_clock import utc_now
from services.ingest.documents import JOBS, WITHOUT_REQUEST, document_of, job_of
from services.ingest.job import Job
from services.ingest.queries.jobs import Jobs

STORED = 2_000
READS = 4_000

Read = Callable[[str], Awaitable[Job]]


def cpu_s() -> tuple[float, float]:
    """Return the CPU seconds of this process, and of its mongod."""
    (mongod_pid,) = Path("/proc/thread-self/children").read_text().split()
    fields = Path(f"/proc/{mongod_pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(read: Read, ids: list[str], callers: int) -> tuple[float, float, float]:
    """Return the microseconds of a read: of the clock, of this process, of MongoDB."""
    left = iter(range(READS))

    async def call() -> None:
        for number in left:
            await read(ids[number % len(ids)])

    started, (ours, theirs) = time.perf_counter(), cpu_s()
    await asyncio.gather(*(call() for _ in range(callers)))
    took, (ours_then, theirs_then) = time.perf_counter() - started, cpu_s()
    return (took * 1e6 / READS, (ours_then - ours) * 1e6 / READS, (theirs_then - theirs) * 1e6 / READS)


async def run(uri: str, args: argparse.Namespace) -> None:
    table = Table("callers", "alone: µs", "of CPU", "of MongoDB", "shared: µs", "of CPU", "of MongoDB", "CPU, times")
    async with connect(uri) as client:
        stored: AsyncCollection[Any] = client["bench"][JOBS]
        jobs = [job("t", utc_now()) for _ in range(STORED)]
        await stored.insert_many([document_of(each) for each in jobs])
        ids = [each.id for each in jobs]

        async def alone(job_id: str) -> Job:
            return job_of(await stored.find_one({"_id": job_id, "tenant": "t"}, WITHOUT_REQUEST) or {})

        async with Jobs(stored, cast(Any, None)) as shared:
            for callers in args.callers:
                took = defaultdict[Read, list[tuple[float, float, float]]](list)
                for _ in range(args.rounds):
                    for read in (alone, shared.get):
                        took[read].append(await measure(read, ids, callers))
                each, together = (
                    [median(column) for column in zip(*took[read], strict=True)] for read in (alone, shared.get)
                )
                ratio = sum(together[1:]) / sum(each[1:])
                table.add_row(f"{callers:,}", *(f"{value:.0f}" for value in (*each, *together)), f"{ratio:.2f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64, 1_000])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with mongod() as uri:
        uvloop.run(run(uri, args))


if __name__ == "__main__":
    main()
