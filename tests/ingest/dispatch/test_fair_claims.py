"""Claims on a real MongoDB, fair among tenants: and what a claim costs does not depend on how many jobs wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo import AsyncMongoClient, monitoring
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import connect, ensure_collection
from services.ingest.dispatch.claims import Claims
from services.ingest.documents import INDEXES, JOBS, VALIDATOR, document_of
from services.ingest.job import Job
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.tenant_queue import TenantQueueKey, range_of, tenant_queue_of
from tests.ingest.making import START, TestClock, instance, job

Collection = AsyncCollection[dict[str, Any]]


class Seen(monitoring.CommandListener):
    """The reads that were sent."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name in ("aggregate", "find", "update"):
            self.commands.append({**event.command})

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def claims(jobs: Collection, clock: TestClock, n: int = 0, **weights: float) -> Claims:
    return Claims(
        MongoJobs(jobs),
        instance(clock, f"local/ingest-{n}"),
        lease_ms=5_000,
        weight_of=lambda tenant: weights.get(tenant, 1.0),
    )


async def put(jobs: Collection, *made: Job) -> None:
    await jobs.insert_many([document_of(one) for one in made])


async def test_a_backlog_of_one_tenant_leaves_the_others_their_share(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, *(job(tenant="big") for _ in range(2_000)))
    worker = claims(jobs, clock, gold=3)
    await worker.claim_due(100, [])
    await put(jobs, *(job(tenant=tenant, due_at=START) for tenant in ("small", "gold") for _ in range(300)))
    clock.advance(seconds=1)
    taken, is_more = await worker.claim_due(100, [])
    assert is_more
    served = Counter(one.tenant for one in taken)
    assert served.total() == 100
    # A fifth for each unit of weight; whoever was in the middle of its turn may be one job ahead.
    assert abs(served["big"] - 20) <= 1
    assert abs(served["small"] - 20) <= 1


async def test_several_instances_share_fairly_together(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, *(job(tenant=tenant) for tenant in ("big", "small") for _ in range(1_000)))
    workers = [claims(jobs, clock, n, small=4) for n in range(3)]
    served: Counter[str] = Counter()

    async def work(worker: Claims) -> None:
        for _ in range(6):
            served.update(one.tenant for one in (await worker.claim_due(30, []))[0])

    await asyncio.gather(*map(work, workers))
    assert served.total() >= 100  # They may meet at the head of the queue, but not for ever.
    # A claim that was won in part is made up for in the next: at most one claim of each is not yet.
    assert abs(served["small"] / 4 - served["big"]) <= len(workers) * 30


async def test_priorities_go_first_until_the_others_have_aged(jobs: Collection, clock: TestClock) -> None:
    old = [job(tenant="t", due_at=START - timedelta(seconds=61)) for _ in range(2)]
    new = [job(tenant="t") for _ in range(2)]
    low = job(tenant="t", priority=-1, due_at=START - timedelta(seconds=30))
    urgent = [job(tenant="t", priority=1, model_name="n") for _ in range(3)]
    await put(jobs, *new, low, *urgent, *old)
    taken, is_more = await claims(jobs, clock).claim_due(6, [])
    assert ({one.id for one in taken}, is_more) == ({one.id for one in (*old, *urgent, new[0])}, True)
    again, is_more = await claims(jobs, clock).claim_due(6, [])
    assert ({one.id for one in again}, is_more) == ({new[1].id, low.id}, False)


async def test_jobs_of_closed_models_cost_nothing(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, *(job(tenant="t", model_name="closed") for _ in range(500)), job(tenant="t", model_name="open"))
    taken, is_more = await claims(jobs, clock).claim_due(100, ["closed"])
    assert ([one.model_name for one in taken], is_more) == (["open"], False)


async def test_a_noticed_job_needs_no_listing(jobs: Collection, clock: TestClock) -> None:
    worker = claims(jobs, clock)
    assert await worker.claim_due(10, []) == ([], False)
    one = job(tenant="new")
    await put(jobs, one)
    worker.note_queued([one])
    assert [taken.id for taken in (await worker.claim_due(10, []))[0]] == [one.id]


async def test_jobs_of_an_earlier_version_are_lined_up(jobs: Collection, clock: TestClock) -> None:
    made = [job(tenant="ö\"'[,"), job(tenant="", model_name="x,y")]
    await put(jobs, *made, job(tenant="t"))
    await jobs.update_many({"_id": {"$in": [one.id for one in made]}}, {"$unset": {"lane": ""}})
    worker = claims(jobs, clock)
    assert await worker.add_tenant_queues() == 2
    assert await worker.add_tenant_queues() == 0
    assert len((await worker.claim_due(10, []))[0]) == 3


def examined(plan: Any) -> tuple[int, int, set[str]]:
    """Keys and documents that were examined in all of a plan, and its stages."""
    keys, documents, stages = 0, 0, set()
    if isinstance(plan, dict):
        if "executionStats" in plan and "totalKeysExamined" in plan["executionStats"]:
            keys += plan["executionStats"]["totalKeysExamined"]
            documents += plan["executionStats"]["totalDocsExamined"]
        stages |= {plan["stage"]} if "stage" in plan else set()
    for part in plan.values() if isinstance(plan, dict) else plan if isinstance(plan, list) else ():
        more_keys, more_documents, more = examined(part)
        keys, documents, stages = keys + more_keys, documents + more_documents, stages | more
    return keys, documents, stages


@pytest.mark.parametrize("backlog", [100, 4_000])
async def test_what_a_claim_examines_does_not_grow_with_the_backlog(
    mongo_uri: str, mongo_database: str, clock: TestClock, backlog: int
) -> None:
    seen = Seen()
    async with connect(mongo_uri) as plain:
        made = await ensure_collection(plain[mongo_database], JOBS, validator=VALIDATOR, indexes=INDEXES)
        await put(made, *(job(tenant=f"t{n % 3}", priority=n % 2) for n in range(backlog)))
        await put(made, *(job(tenant="t0", due_at=START + timedelta(hours=1)) for n in range(backlog)))
        await put(made, *(job(tenant="t0", model_name="closed") for n in range(backlog)))
        async with AsyncMongoClient(mongo_uri, tz_aware=True, event_listeners=[seen]) as watched:
            taken, _ = await claims(watched[mongo_database][JOBS], clock).claim_due(30, ["closed"])
        assert len(taken) == 30
        listing, reading = [command for command in seen.commands if "aggregate" in command]
        for command, most_keys in ((listing, 20), (reading, 200)):
            explained = {name: command[name] for name in ("aggregate", "pipeline", "hint") if name in command}
            plan = await plain[mongo_database].command(
                "explain", {**explained, "cursor": {}}, verbosity="executionStats"
            )
            keys, documents, stages = examined(plan)
            assert 0 < keys <= most_keys
            assert documents == 0
            assert not stages & {"COLLSCAN", "FETCH"}
            assert ("DISTINCT_SCAN" in stages) == (command is listing)


names = st.text(max_size=8)


@given(tenant=names, model=names, other=names, priority=st.integers(-9, 9))
def test_a_lane_is_read_as_it_was_written_and_found_by_its_tenant(
    tenant: str, model: str, other: str, priority: int
) -> None:
    lane = TenantQueueKey(tenant, model, priority)
    assert tenant_queue_of(lane.text) == lane
    between = range_of(other)
    assert (between["$gte"] <= lane.text < between["$lt"]) == (tenant == other)
