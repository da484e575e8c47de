"""Leases on a real MongoDB: what the pure functions say is what is written, and two never hold one job."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import AutoReconnect

from services.ingest import job_scan
from services.ingest.dispatch.claims import Claims
from services.ingest.documents import (
    EPOCH,
    WITHOUT_REQUEST,
    document_of,
    fenced_updates,
    job_of,
)
from services.ingest.job import (
    BackToQueue,
    End,
    Job,
    Outcome,
    State,
    claim,
    end,
    return_to_queue,
    take_over,
)
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.queries.jobs import Filter
from services.ingest.tenant_queue import range_of
from shoal.errors import Code, Unavailable
from tests.ingest.making import START, TestClock, instance, job

Collection = AsyncCollection[dict[str, Any]]


def claims(jobs: Collection, clock: TestClock, owner: str = "local/ingest-0", process: str = "p") -> Claims:
    return Claims(MongoJobs(jobs), instance(clock, owner, process), lease_ms=5_000)


async def put(jobs: Collection, *made: Job) -> None:
    await jobs.insert_many([document_of(one) for one in made])


async def read(jobs: Collection, job_id: str) -> Job:
    document = await jobs.find_one({"_id": job_id})
    assert document is not None
    return job_of(document)


FULL = {
    "key": "k",
    "digest": b"d" * 32,
    "deadline": START,
    "labels": (("a.$b", "\x00"), ("", "ü")),
    "tenant": "t",
    "priority": -3,
    "traceparent": "00-1-2-01",
    "explains": True,
}


async def test_a_job_read_back_is_the_job_that_was_written(jobs: Collection) -> None:
    for made in (job(), job(**FULL), job(is_apart=True, request=None)):
        await put(jobs, made)
        assert await read(jobs, made.id) == made


async def test_a_claim_writes_what_claim_says(jobs: Collection, clock: TestClock) -> None:
    waiting = [job(), job(**FULL), job(attempts=3, refusals=2, last_code=14, last_message="$x")]
    await put(jobs, *waiting)
    claimed, is_more = await claims(jobs, clock).claim_due(10, [])
    assert not is_more
    assert len({one.lease.id for one in claimed if one.lease}) == 1
    for before, after in zip(waiting, sorted(claimed, key=lambda one: one.id), strict=True):
        assert after.lease is not None
        assert after == claim(before, after.lease, clock.now)
        assert await read(jobs, before.id) == after


async def test_a_fresh_claim_reads_nothing_and_says_the_same(jobs: Collection, clock: TestClock) -> None:
    fresh = [job(), job()]
    await put(jobs, *fresh)
    claimed = await claims(jobs, clock).claim_accepted(fresh)
    assert [await read(jobs, one.id) for one in fresh] == claimed


async def test_a_fresh_claim_takes_only_what_is_still_untouched(jobs: Collection, clock: TestClock) -> None:
    fresh = [job(), job(), job()]
    await put(jobs, *fresh)
    other = claims(jobs, clock, "local/ingest-1")
    [taken] = await other.claim_accepted(fresh[:1])
    [tried] = await other.claim_accepted(fresh[1:2])
    again = return_to_queue(tried, BackToQueue(clock.now, True, "again"), "local/ingest-1", clock.now)
    await jobs.bulk_write(fenced_updates([(tried, again)]))
    claimed = await claims(jobs, clock).claim_accepted(fresh)
    assert [one.id for one in claimed] == [fresh[2].id]
    assert await read(jobs, taken.id) == taken


@pytest.mark.parametrize(
    "after",
    [
        lambda one, now: return_to_queue(one, BackToQueue(now, True, "$why", 14, "message"), "i", now),
        lambda one, now: return_to_queue(one, BackToQueue(now, False, "nobody", 14, "m"), "i", now),
        lambda one, now: end(one, End(Outcome.FAILED, Code.INTERNAL, "broken"), "i", now),
        lambda one, now: replace(end(one, End(Outcome.SUCCEEDED), "i", now), request=None),
    ],
)
async def test_a_fenced_update_writes_what_the_function_says(jobs: Collection, clock: TestClock, after: Any) -> None:
    await put(jobs, job(**FULL))
    [[held], _] = await claims(jobs, clock).claim_due(1, [])
    clock.advance(seconds=1)
    wanted = after(held, clock.now)
    await jobs.bulk_write(fenced_updates([(held, wanted)]))
    assert await read(jobs, held.id) == wanted


async def test_a_slow_worker_writes_nothing(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, job())
    slow = claims(jobs, clock)
    [[held], _] = await slow.claim_due(1, [])
    clock.advance(seconds=6)
    [(taken, lost)] = await claims(jobs, clock, "local/ingest-1").take_lapsed(10)
    assert lost == held.lease
    assert taken.lease is not None
    assert await read(jobs, held.id) == take_over(held, taken.lease)
    written = await jobs.bulk_write(fenced_updates([(held, end(held, End(Outcome.SUCCEEDED), "i", clock.now))]))
    assert written.matched_count == 0
    assert held.lease is not None
    assert await slow.renew({held.id: held.lease}) == {held.id}
    # And with the same lease, but another attempt: nothing either.
    stale = replace(taken, attempts=taken.attempts + 1)
    assert (await jobs.bulk_write(fenced_updates([(stale, claim(stale, taken.lease, clock.now))]))).matched_count == 0


async def test_a_renewed_lease_does_not_lapse(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, job(), job())
    worker = claims(jobs, clock)
    held, _ = await worker.claim_due(2, [])
    clock.advance(seconds=4)
    assert await worker.renew({one.id: one.lease for one in held if one.lease}) == set()
    clock.advance(seconds=4)
    assert await worker.take_lapsed(10) == []
    clock.advance(seconds=1)
    assert len(await worker.take_lapsed(10)) == 2


class Unanswered:
    """A collection whose next update of many is done, or not, and never answered."""

    def __init__(self, jobs: Collection, *, is_done: bool) -> None:
        self._jobs = jobs
        self._is_done = is_done
        self.is_broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    async def update_many(self, *args: Any) -> Any:
        if not self.is_broken:
            return await self._jobs.update_many(*args)
        self.is_broken = False
        if self._is_done:
            await self._jobs.update_many(*args)
        raise AutoReconnect("the connection broke")


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("is_fresh", [True, False])
async def test_a_claim_that_was_not_answered_costs_no_attempt(
    jobs: Collection, clock: TestClock, is_done: bool, is_fresh: bool
) -> None:
    waiting = [job(), job()]
    await put(jobs, *waiting)
    worker = claims(cast(Collection, Unanswered(jobs, is_done=is_done)), clock)
    with pytest.raises(Unavailable):
        await (worker.claim_accepted(waiting) if is_fresh else worker.claim_due(10, []))
    clock.advance(seconds=30)
    assert await worker.take_lapsed(10) == []
    claimed, _ = await worker.claim_due(10, [])
    assert {one.id: one.attempts for one in claimed} == {one.id: 1 for one in waiting}
    assert claimed == [await read(jobs, one.id) for one in claimed]
    assert len(await worker.take_lapsed(10)) == 2 * is_done, "from now on they are as all others"


async def test_claimers_never_share_a_job(jobs: Collection, clock: TestClock) -> None:
    waiting = [job() for _ in range(200)]
    await put(jobs, *waiting)
    claimed: list[str] = []

    async def work(claimer: Claims) -> None:
        while await jobs.find_one({"due_at": {"$gt": EPOCH}}):
            claimed.extend(one.id for one in (await claimer.claim_due(13, []))[0])

    await asyncio.gather(*(work(claims(jobs, clock, f"local/ingest-{n}")) for n in range(4)))
    assert sorted(claimed) == [one.id for one in waiting]


async def test_what_is_not_due_or_closed_is_left_alone(jobs: Collection, clock: TestClock) -> None:
    clock.advance(seconds=-1)
    await put(jobs, job(model_name="a"))
    worker = claims(jobs, clock)
    assert await worker.claim_due(10, []) == ([], False)
    clock.advance(seconds=1)
    assert await worker.claim_due(10, ["a"]) == ([], False)
    await put(jobs, job(model_name="b"), job(model_name="b"))
    [[b], is_more] = await worker.claim_due(1, ["a"])
    assert (b.model_name, is_more) == ("b", True)


async def test_cancelling_takes_it_from_whoever_has_it(jobs: Collection, clock: TestClock) -> None:
    waiting, other = job(), job()
    await put(jobs, waiting, other)
    worker = claims(jobs, clock)
    taken = await worker.take_to_cancel(waiting.id, "$reason")
    assert taken is not None
    assert await read(jobs, waiting.id) == replace(taken, request=b"request")
    assert await worker.take_to_cancel(waiting.id, "again") is None
    [[held], _] = await worker.claim_due(1, [])
    taken = await worker.take_to_cancel(other.id, "")
    assert taken is not None
    assert taken.state is State.RUNNING
    assert held.lease is not None
    assert await worker.renew({held.id: held.lease}) == {held.id}
    await jobs.bulk_write(fenced_updates([(taken, end(taken, End(Outcome.CANCELLED, 1, "x"), "i", clock.now))]))
    assert await worker.take_to_cancel(other.id, "") is None
    assert await worker.take_to_cancel("nowhere", "") is None


async def test_deadlines_are_found_in_the_queue_only(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, job(deadline=clock.now), job(deadline=clock.now, model_name="running"), job())
    worker = claims(jobs, clock)
    [[_], _] = await worker.claim_due(1, ["m"])
    [late] = await worker.take_expired(10)
    assert late.model_name == "m"
    assert await worker.take_expired(10) == []


async def test_a_process_inherits_what_its_predecessor_held(jobs: Collection, clock: TestClock) -> None:
    await put(jobs, job(), job())
    await claims(jobs, clock, process="old").claim_due(1, [])
    await claims(jobs, clock, "local/ingest-1").claim_due(1, [])
    successor = claims(jobs, clock, process="new")
    assert await successor.expire_inherited() == 1
    assert len(await successor.take_lapsed(10)) == 1
    assert await successor.expire_inherited() == 0


def stages(plan: Any) -> set[str]:
    """Every stage of a query plan."""
    if isinstance(plan, dict):
        own = {plan["stage"]} if "stage" in plan else set()
        return own.union(*map(stages, plan.values()))
    return set().union(*map(stages, plan)) if isinstance(plan, list) else set()


NOW = {"$lte": START, "$gt": EPOCH}


@pytest.mark.parametrize(
    ("query", "sort", "index"),
    [
        ({"lane": job().tenant_queue.text, "due_at": NOW}, "due_at", "lanes"),
        ({"lane": range_of("t"), "due_at": {"$gt": EPOCH}}, None, "lanes"),
        ({"lane": None, "due_at": {"$gt": EPOCH}}, None, "lanes"),
        ({"lease.expires_at": {"$lte": START}}, "lease.expires_at", "leased"),
        ({"deadline": NOW, "due_at": {"$gt": EPOCH}}, None, "waiting_deadline"),
        ({"lease.expires_at": {"$gt": EPOCH}, "lease.owner": "o", "lease.process": {"$ne": "p"}}, None, "leased"),
        ({"$or": [{"tenant": "t", "key": "k"}, {"tenant": "t", "key": "l"}]}, None, "idempotency"),
        *(
            (job_scan._split(Filter(state, model, tenant).query())[0] | after, "-_id", None)
            for state in (None, State.DEAD)
            for model in ("", "m")
            for tenant in ("", "t")
            for after in ({}, {"_id": {"$lt": "x"}})
        ),
    ],
)
async def test_no_query_scans_the_collection(
    jobs: Collection, query: dict[str, Any], sort: str | None, index: str | None
) -> None:
    await put(jobs, *(job() for _ in range(50)))
    cursor = jobs.find(query, WITHOUT_REQUEST)
    if sort:
        cursor = cursor.sort(sort.removeprefix("-"), -1 if sort.startswith("-") else 1)
    plan = (await cursor.explain())["queryPlanner"]["winningPlan"]
    assert not stages(plan) & {"COLLSCAN", "SORT"}, plan
    if index:
        assert f"'indexName': '{index}'" in str(plan)
