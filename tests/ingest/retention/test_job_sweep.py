"""Jobs that have stayed long enough are removed, with their requests; others are not, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import connect, ensure_collection
from mesh.mongo_clock import milliseconds
from mesh.removal_guard import MARKS, REST
from services.ingest.documents import INDEXES, JOBS, VALIDATOR, document_of
from services.ingest.job import FINAL, Job, State
from services.ingest.retention import sweep as sweeping
from services.ingest.retention.expired_share import ExpiredShare
from services.ingest.retention.retention_repository import JOB_RETENTION, RetentionRepository
from services.ingest.retention.retention_repository import VALIDATOR as RULE_VALIDATOR
from services.ingest.retention.rules import Keep, Rule, What
from services.ingest.retention.sweep import JobSweep
from services.ingest.tenants.settings import EVERYONE
from services.ingest.ulid import Ulids
from shoal.errors import ResourceExhausted
from tests.ingest.making import START, TestClock, job
from tests.removal_guards import guard_of

Collection = AsyncCollection[dict[str, Any]]
WEEK = timedelta(days=7)
DEFAULTS: dict[What, Keep] = dict.fromkeys(FINAL, WEEK)


class Payloads:
    """Remembers what was dropped."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    async def drop(self, job_ids: Sequence[str]) -> None:
        self.dropped += job_ids


class World:
    """Jobs, rules and a sweep, on a clock that moves when it is told to."""

    def __init__(self, jobs: Collection, rules: Collection) -> None:
        self.jobs = jobs
        self.clock = TestClock()
        self.repository = RetentionRepository(rules, DEFAULTS)
        self.payloads = Payloads()
        self.leads = True
        self.ulids = Ulids(lambda: milliseconds(self.clock.now))
        self.sweep = JobSweep(
            jobs,
            self.payloads,  # type: ignore[arg-type]
            self.repository,
            leads=lambda: self.leads,
            clock=self.clock,
            ready=asyncio.Event(),
        )

    async def put(self, state: State, age: timedelta = timedelta(0), **fields: Any) -> Job:
        """A job that was submitted now, and ended so long ago."""
        ended = None if state not in FINAL else self.clock.now - age
        made = job(id=self.ulids.new(), state=state, due_at=None, updated_at=ended or self.clock.now, **fields)
        await self.jobs.insert_one(document_of(made))
        return made

    async def left(self) -> set[str]:
        return {document["_id"] async for document in self.jobs.find({}, {"_id": 1})}


@pytest.fixture
async def world(mongo_uri: str, mongo_database: str) -> AsyncIterator[World]:
    async with connect(mongo_uri) as client:
        database = client[mongo_database]
        jobs = await ensure_collection(database, JOBS, validator=VALIDATOR, indexes=INDEXES)
        rules = await ensure_collection(database, JOB_RETENTION, validator=RULE_VALIDATOR, indexes=[])
        yield World(jobs, rules)


async def test_what_has_ended_goes_after_its_time(world: World) -> None:
    old = [await world.put(state) for state in sorted(FINAL)]
    waits = await world.put(State.QUEUED)
    world.clock.advance(days=6)
    young = await world.put(State.SUCCEEDED)
    assert await world.sweep.round() == 0
    world.clock.advance(days=1, seconds=1)
    assert await world.sweep.round() == len(old)
    assert await world.left() == {waits.id, young.id}
    assert await world.sweep.round() == 0


async def test_tenants_have_their_own_word(world: World) -> None:
    await world.repository.set(Rule("short", State.SUCCEEDED, timedelta(hours=1)))
    await world.repository.set(Rule("long", State.SUCCEEDED, None))
    await world.repository.set(Rule(EVERYONE, State.SUCCEEDED, timedelta(days=2)))
    jobs = {name: await world.put(State.SUCCEEDED, tenant=name) for name in ("short", "long", "other")}
    world.clock.advance(hours=2)
    await world.sweep.round()
    assert await world.left() == {jobs["long"].id, jobs["other"].id}
    world.clock.advance(days=3)
    await world.sweep.round()
    assert await world.left() == {jobs["long"].id}
    await world.repository.inherit("long", State.SUCCEEDED)
    await world.sweep.round()  # A rule that changed is looked at from the beginning.
    assert await world.left() == set()


async def test_rules_that_there_are_can_be_changed_when_there_may_be_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.ingest.retention.retention_repository.MOST", 1)
    await world.repository.set(Rule("a", State.DEAD, None))
    with pytest.raises(ResourceExhausted, match="there are 1 rules, which is the limit: let some tenants inherit"):
        await world.repository.set(Rule("b", State.DEAD, None))
    await world.repository.set(Rule("a", State.DEAD, timedelta(hours=1)))
    assert (await world.repository.read()).own == {("a", State.DEAD): timedelta(hours=1)}


async def test_what_others_still_wait_for_stays_until_they_know_that_it_succeeded(world: World) -> None:
    by_id, keyed = await world.put(State.SUCCEEDED), await world.put(State.SUCCEEDED, key="k", digest=b"d")
    other = await world.put(State.SUCCEEDED, key="k", digest=b"d", tenant="other")
    waits = await world.put(State.QUEUED, depends_on=(by_id.id, "key:k"), waits_for=(by_id.id, "key:k"))
    world.clock.advance(days=8)  # The node was off, say.
    assert await world.sweep.round() == 1
    assert await world.left() == {by_id.id, keyed.id, waits.id}
    assert other.id not in await world.left()
    await world.jobs.update_one({"_id": waits.id}, {"$unset": {"waits_for": ""}})
    world.clock.advance(days=1, seconds=1)
    assert await world.sweep.round() == 2
    assert await world.left() == {waits.id}


async def test_what_a_dead_letter_would_wait_for_again_stays_as_long_as_it_does(world: World) -> None:
    await world.repository.set(Rule(EVERYONE, State.FAILED, timedelta(days=30)))
    by_id, keyed = await world.put(State.SUCCEEDED), await world.put(State.SUCCEEDED, key="k", digest=b"d")
    letter = await world.put(State.FAILED, depends_on=(by_id.id, "key:k"), waits_for=(by_id.id, "key:k"))
    await world.jobs.update_one({"_id": letter.id}, {"$rename": {"waits_for": "unmet"}})
    world.clock.advance(days=8)
    assert await world.sweep.round() == 0
    assert await world.left() == {by_id.id, keyed.id, letter.id}
    world.clock.advance(days=30)
    await world.sweep.round()
    world.clock.advance(days=1, seconds=1)
    await world.sweep.round()
    assert await world.left() == set()


async def test_what_took_long_is_found_a_day_later(world: World) -> None:
    slow = await world.put(State.RUNNING)
    quick = await world.put(State.SUCCEEDED)
    world.clock.advance(days=8)
    await world.jobs.update_one({"_id": slow.id}, {"$set": {"state": "succeeded", "updated_at": world.clock.now}})
    await world.sweep.round()
    assert await world.left() == {slow.id}
    for _ in range(7):
        assert slow.id in await world.left()
        world.clock.advance(days=1, seconds=1)
        await world.sweep.round()
    assert quick.id not in await world.left()
    assert await world.left() == set()


async def test_many_pages_and_their_requests(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "PAGE_JOBS", 7)
    apart = [await world.put(State.DEAD, is_apart=True, request=None) for _ in range(10)]
    for _ in range(25):
        await world.put(State.DEAD)
    kept = await world.put(State.DEAD, tenant="kept")
    await world.repository.set(Rule("kept", State.DEAD, None))
    world.clock.advance(days=8)
    assert await world.sweep.round() == 35
    assert await world.left() == {kept.id}
    assert sorted(world.payloads.dropped) == sorted(one.id for one in apart)


async def test_a_dead_letter_that_is_requeued_meanwhile_stays(world: World) -> None:
    letter = await world.put(State.DEAD, is_apart=True, request=None)
    world.clock.advance(days=8)
    again = {"$set": {"state": "queued", "updated_at": world.clock.now, "generation": 2}}
    await world.jobs.update_one({"_id": letter.id}, again)
    # As if it had been read before that.
    await world.sweep._remove([letter], State.DEAD, world.clock.now - WEEK)
    assert await world.left() == {letter.id}
    assert world.payloads.dropped == []


async def test_who_does_not_lead_removes_nothing(world: World) -> None:
    one = await world.put(State.SUCCEEDED)
    world.clock.advance(days=8)
    world.leads = False
    assert await world.sweep.round() == 0
    assert await world.left() == {one.id}


async def test_pages_are_read_by_an_index(world: World) -> None:
    await world.jobs.insert_many(
        [document_of(job(state=State.SUCCEEDED, due_at=None, submitted_at=START)) for _ in range(300)]
    )
    query = {"state": "dead", "_id": {"$gt": "", "$lt": "Z"}}
    found = await world.jobs.find(query).sort("_id", 1).limit(100).explain()
    assert found["executionStats"]["totalDocsExamined"] == 0
    assert "'SORT'" not in str(found["queryPlanner"]["winningPlan"])


async def test_a_year_ahead_removes_no_job_until_a_rule_is_set(world: World) -> None:
    steady = [timedelta(0)]
    share = ExpiredShare(world.jobs, world.repository)
    guard = guard_of(world.jobs.database[MARKS], "jobs", share, world.clock, lambda: steady[0])
    sweep = JobSweep(
        world.jobs,
        world.payloads,  # type: ignore[arg-type]
        world.repository,
        leads=lambda: True,
        clock=guard,
        ready=asyncio.Event(),
        check=guard.check,
    )
    old = await world.put(State.SUCCEEDED, timedelta(days=6))
    young = await world.put(State.SUCCEEDED)
    await sweep._run_round()
    world.clock.advance(days=365)
    for _ in range(3):
        world.clock.advance(days=0, seconds=REST.total_seconds())
        steady[0] += REST
        await sweep._run_round()
    assert await world.left() == {old.id, young.id}
    await world.repository.set(Rule(EVERYONE, State.SUCCEEDED, WEEK))
    await sweep._run_round()
    assert await world.left() == set()
