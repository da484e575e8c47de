"""Cost of claims by the length of the queue: 1,000, 100,000 and 1,000,000 jobs, of one tenant and of ten.

    python bench/claims.py [--queued 1000 100000 1000000] [--tenants 1 10] [--bulk 256] [--rounds 12]

A mongod of its own (one member, as a node starts it), jobs of 300 bytes. `jobs/s` and `ms` are of bulk claims as the
dispatcher makes them: list the lanes, read their first jobs, claim jobs and read them with their requests. All writes
are majority and journaled. Claimed jobs are released after each round, unmeasured, so all rounds have equal queues.
`ten` is the wait of a new tenant with ten jobs: the number of claims until all ten are claimed, and their time. `two`
is the combined jobs/s of two concurrent claimers.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import uvloop
from pymongo.asynchronous.collection import AsyncCollection
from rich.console import Console
from rich.table import Table

from mesh.mongo import connect, ensure_collection
from mesh.mongo_clock import milliseconds, utc_now
from services.ingest.dispatch.claims import Claims
from services.ingest.documents import INDEXES, JOBS, VALIDATOR, WAITING, document_of
from services.ingest.instance import Instance
from services.ingest.job import Job, acceptance
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.ulid import Ulids
from shoal.node import processes

Collection = AsyncCollection[dict[str, Any]]
REQUEST = bytes(300)
INSERTED_AT_ONCE = 2_000
ULIDS = Ulids(lambda: milliseconds(utc_now()))


@dataclass(frozen=True)
class Row:
    queued: int
    tenants: int
    claims_ms: list[float]
    jobs: int
    listing_ms: float
    counting_ms: float
    ten_claims: int
    ten_ms: float
    two_per_s: float
    rss_mib: float


def job(tenant: str, now: datetime) -> Job:
    return Job(
        id=ULIDS.new(),
        model_name="m",
        tenant=tenant,
        submitted_at=now,
        updated_at=now,
        due_at=now,
        request=REQUEST,
        transitions=acceptance(now, "bench"),
    )


def claimer(jobs: Collection, n: int) -> Claims:
    here = Instance(f"bench/ingest-{n}", ULIDS.new(), utc_now, ULIDS.new, asyncio.Event())
    return Claims(MongoJobs(jobs), here, lease_ms=300_000)


async def fill(jobs: Collection, queued: int, tenants: int) -> None:
    now = utc_now()
    for first in range(0, queued, INSERTED_AT_ONCE):
        some = range(first, min(first + INSERTED_AT_ONCE, queued))
        await jobs.insert_many([document_of(job(f"t{n % tenants}", now)) for n in some], ordered=False)


async def release_all(jobs: Collection) -> None:
    back = {"$set": {"due_at": utc_now(), "state": "queued", "attempts": 0}, "$unset": {"lease": ""}}
    await jobs.update_many({"lease.expires_at": {"$exists": True}}, back)


async def timed(work: Any) -> float:
    started = time.perf_counter()
    await work
    return (time.perf_counter() - started) * 1000


async def drained(jobs: Collection, bulk: int, rounds: int, a_round: int) -> tuple[list[float], int]:
    claims, took, claimed = claimer(jobs, 0), list[float](), 0
    for _ in range(rounds):
        had = 0
        while had < a_round:
            started = time.perf_counter()
            some, _ = await claims.claim_due(min(bulk, a_round - had), [])
            took.append((time.perf_counter() - started) * 1000)
            had += len(some)
        claimed += had
        await release_all(jobs)
    return took, claimed


async def claim_new_tenant(jobs: Collection, bulk: int) -> tuple[int, float]:
    """Submit ten jobs of a new tenant during other claims; return the number of claims and ms until all are claimed."""
    claims = claimer(jobs, 0)
    await claims.claim_due(bulk, [])
    now = utc_now()
    ten = [job("newcomer", now) for _ in range(10)]
    await jobs.insert_many([document_of(one) for one in ten])
    claims.note_queued(ten)
    left, calls, started = {one.id for one in ten}, 0, time.perf_counter()
    while left:
        some, _ = await claims.claim_due(bulk, [])
        left -= {one.id for one in some}
        calls += 1
    took_ms = (time.perf_counter() - started) * 1000
    await jobs.delete_many({"_id": {"$in": [one.id for one in ten]}})
    await release_all(jobs)
    return calls, took_ms


async def two_claimers(jobs: Collection, bulk: int, a_round: int) -> float:
    claimed = 0

    async def claim(claims: Claims) -> None:
        nonlocal claimed
        while claimed < a_round:
            some, _ = await claims.claim_due(bulk, [])
            claimed += len(some)

    started = time.perf_counter()
    await asyncio.gather(*(claim(claimer(jobs, n)) for n in range(2)))
    per_s = claimed / (time.perf_counter() - started)
    await release_all(jobs)
    return per_s


async def measure(jobs: Collection, queued: int, tenants: int, args: argparse.Namespace) -> Row:
    await jobs.delete_many({})
    await fill(jobs, queued, tenants)
    a_round = min(queued // 2, 8 * args.bulk)
    # Warm-up, equal for all sizes.
    await drained(jobs, args.bulk, 1, a_round)
    took, claimed = await drained(jobs, args.bulk, args.rounds, a_round)
    fresh = claimer(jobs, 0)
    # The only model is excluded, so this call lists lanes and claims nothing.
    listing_ms = await timed(fresh.claim_due(1, ["m"]))
    counting_ms = await timed(jobs.count_documents(WAITING, hint="lanes"))
    ten_claims, ten_ms = await claim_new_tenant(jobs, args.bulk)
    two = await two_claimers(jobs, args.bulk, a_round)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(queued, tenants, took, claimed, listing_ms, counting_ms, ten_claims, ten_ms, two, rss)


def shown(rows: list[Row], bulk: int) -> Table:
    table = Table(title=f"claims of up to {bulk} jobs")
    for column in (
        "tenants",
        "queued",
        "jobs/s",
        "µs/job",
        "beside 1st",
        "claim p50 ms",
        "p99",
        "listing ms",
        "counting ms",
        "ten: claims",
        "ms",
        "two jobs/s",
        "RSS MiB",
    ):
        table.add_column(column, justify="right")
    first: dict[int, float] = {}
    for row in rows:
        each = sum(row.claims_ms) / row.jobs
        first.setdefault(row.tenants, each)
        table.add_row(
            str(row.tenants),
            f"{row.queued:,}",
            f"{1000 / each:,.0f}",
            f"{each * 1000:.0f}",
            f"{each / first[row.tenants]:.2f}",
            f"{statistics.median(row.claims_ms):.1f}",
            f"{statistics.quantiles(row.claims_ms, n=100)[98]:.1f}",
            f"{row.listing_ms:.1f}",
            f"{row.counting_ms:.0f}",
            str(row.ten_claims),
            f"{row.ten_ms:.1f}",
            f"{row.two_per_s:,.0f}",
            f"{row.rss_mib:.0f}",
        )
    return table


async def run(uri: str, args: argparse.Namespace) -> None:
    async with connect(f"{uri}&timeoutMS=120000") as client:
        jobs = await ensure_collection(client["bench"], JOBS, validator=VALIDATOR, indexes=INDEXES)
        rows = [await measure(jobs, queued, n, args) for n in args.tenants for queued in args.queued]
    Console(width=160).print(shown(rows, args.bulk))


@contextmanager
def mongod() -> Iterator[str]:
    """Run a mongod during the block, and yield its address."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        port = processes.free_port()
        part = processes.mongod(Path(folder), f"127.0.0.1:{port}")
        process = Popen(part.argv, stdout=DEVNULL, stderr=DEVNULL)
        try:
            while not asyncio.run(part.ready()):
                time.sleep(0.1)
            yield f"mongodb://127.0.0.1:{port}/?directConnection=true"
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--bulk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    with mongod() as uri:
        uvloop.run(run(uri, args))


if __name__ == "__main__":
    main()
