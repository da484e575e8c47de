"""Rounds of firing on a real database: a tenant whose schedules cannot fire, or fire slowly, delays only its own."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, connect, ensure_collection
from mesh.mongo_lease import LeaderLease
from services.ingest.intake.intake import Accepted
from services.ingest.job import Job
from services.ingest.schedules import firing
from services.ingest.schedules.documents import INDEXES, RETIRED_INDEXES, SCHEDULES, VALIDATOR, document_of, id_of
from services.ingest.schedules.firing import Firing
from services.ingest.schedules.schedule import Misfire, Schedule
from services.ingest.schedules.schedule_repository import ScheduleRepository
from services.ingest.schedules.turns import turns
from shoal.errors import AlreadyExists, ResourceExhausted
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.making import START, TestClock, job

Collection = AsyncCollection[Document]
AT_ONCE = 20
MANY = 30


@pytest.fixture
async def schedules(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collection]:
    async with connect(mongo_uri) as client:
        yield await ensure_collection(client[mongo_database], SCHEDULES, validator=VALIDATOR, indexes=INDEXES)


def schedule(tenant: str, n: int = 0, **fields: Any) -> Schedule:
    made: dict[str, Any] = {
        "cron": "* * * * * *",
        "template": b"",
        "misfire": Misfire.LATEST,
        "next_at": START,
        **fields,
    }
    return Schedule(tenant=tenant, name=f"s{n:04}", zone="UTC", created_at=START, updated_at=START, **made)


class Rounds:
    """Firing whose submits are answered by tenant: accepted, refused, or held up."""

    def __init__(self, schedules: Collection, clock: TestClock) -> None:
        self.submitted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.full: set[str] = set()
        self.callers: list[bytes] = []
        self.held_up: dict[str, asyncio.Event] = {}
        self.firing = Firing(
            schedules,
            cast(LeaderLease, SimpleNamespace(token=1)),
            submit=self.submit,
            find=cast(Any, None),
            read=cast(Any, None),
            cancel=cast(Any, None),
            clock=clock,
            ready=asyncio.Event(),
        )

    async def settle(self) -> None:
        """Rounds until one submits nothing."""
        before = -1
        while self.submitted.total() > before:
            before = self.submitted.total()
            await self.firing.fire_due()

    async def submit(self, submit: pb.SubmitRequest, caller: bytes) -> Accepted:
        self.submitted[submit.tenant] += 1
        self.callers.append(caller)
        if submit.tenant in self.full:
            raise ResourceExhausted(f"the quota of tenant {submit.tenant!r} is spent")
        if submit.tenant in self.held_up:
            await self.held_up[submit.tenant].wait()
        self.accepted[submit.tenant] += 1
        return Accepted(job(), False)


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "DUE_AT_ONCE", AT_ONCE)


async def put(schedules: Collection, *made: Schedule) -> None:
    await schedules.insert_many([document_of(one) for one in made])


async def test_the_job_of_a_time_runs_for_the_caller_that_stored_the_schedule(
    schedules: Collection, clock: TestClock
) -> None:
    rounds = Rounds(schedules, clock)
    clock.advance(seconds=1)
    await put(schedules, schedule("acme", caller=b"claims"))
    await rounds.firing.fire_due()
    assert rounds.callers == [b"claims"]


async def test_a_time_that_has_a_job_keeps_it_and_the_next_time_gets_a_new_one(
    schedules: Collection, clock: TestClock
) -> None:
    rounds, kept, new = Rounds(schedules, clock), job(), job()

    async def submit(request: pb.SubmitRequest, caller: bytes) -> Accepted:
        if request.idempotency_key == one.key_of(START):
            raise AlreadyExists("the key has another request")
        return Accepted(new, False)

    async def find(tenant: str, key: str) -> Job | None:
        return kept if (tenant, key) == ("acme", one.key_of(START)) else None

    rounds.firing._submit, rounds.firing._find = submit, find
    one = schedule("acme")
    await put(schedules, one)
    last = []
    for seconds in (0.1, 1.0):
        clock.advance(seconds=seconds)
        await rounds.firing.fire_due()
        last.append((await schedules.find_one({}) or {})["last_job"])
    assert last == [kept.id, new.id]


async def test_the_next_round_is_when_a_schedule_is_due(schedules: Collection, clock: TestClock) -> None:
    rounds = Rounds(schedules, clock)
    assert await rounds.firing.fire_due() == firing.AHEAD_S
    await put(schedules, schedule("acme", next_at=clock.now + timedelta(seconds=0.3)))
    assert await rounds.firing.fire_due() == pytest.approx(0.3)
    assert rounds.accepted == {}
    clock.advance(seconds=0.3)
    assert await rounds.firing.fire_due() == firing.TICK_S
    assert rounds.accepted == {"acme": 1}


async def test_a_tenant_whose_quota_is_spent_does_not_stop_the_schedules_of_others(
    schedules: Collection, clock: TestClock, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = Rounds(schedules, clock)
    rounds.full = {"noisy"}
    clock.advance(seconds=2)
    # Longer due than any other, and more than a round has.
    await put(schedules, *(schedule("noisy", n) for n in range(MANY)))
    await put(schedules, schedule("quiet", next_at=START + timedelta(seconds=1)))
    with caplog.at_level(logging.WARNING, "services.ingest.schedules"):
        await rounds.firing.fire_due()
        assert rounds.accepted == {"quiet": 1}
        await rounds.settle()
        assert rounds.submitted["noisy"] == MANY
        # Again after one second, then after two more.
        for seconds, tries in ((0.5, 1), (0.5, 2), (1.5, 2), (0.5, 3)):
            clock.advance(seconds=seconds)
            await rounds.settle()
            assert rounds.submitted["noisy"] == tries * MANY
    assert rounds.accepted["quiet"] >= 3
    assert sum("cannot fire" in record.message for record in caplog.records) == MANY
    # The pause ends within the grace, and the schedules fire when there is room.
    rounds.full = set()
    clock.advance(seconds=4)
    await rounds.settle()
    assert rounds.accepted["noisy"] == MANY
    assert await schedules.count_documents({"tries": {"$exists": True}}) == 0


async def test_a_tenant_whose_jobs_are_slow_to_be_accepted_does_not_hold_up_others(
    schedules: Collection, clock: TestClock
) -> None:
    rounds = Rounds(schedules, clock)
    rounds.held_up["slow"] = may = asyncio.Event()
    await put(schedules, *(schedule("slow", n) for n in range(MANY)), *(schedule(f"t{n}") for n in range(10)))
    round_ = asyncio.create_task(rounds.firing.fire_due())
    async with asyncio.timeout(60):
        while len(rounds.accepted) < 10:
            await asyncio.sleep(0.01)
    assert rounds.submitted["slow"] == 1
    may.set()
    await round_


async def test_a_schedule_that_cannot_be_read_does_not_stop_the_others(schedules: Collection, clock: TestClock) -> None:
    rounds = Rounds(schedules, clock)
    broken = document_of(schedule("a", template=b"no message"))
    await schedules.insert_one(broken)
    await put(schedules, schedule("a", 1), schedule("b"))
    await rounds.firing.fire_due()
    assert rounds.accepted == {"a": 1, "b": 1}
    document = await schedules.find_one({"_id": broken["_id"]})
    assert document is not None
    assert document["try_again_at"] > clock()


async def test_a_time_that_could_not_be_fired_is_skipped_after_its_grace_and_says_so(
    schedules: Collection, clock: TestClock
) -> None:
    rounds = Rounds(schedules, clock)
    rounds.full = {"t"}
    await put(schedules, schedule("t", cron="0 3 * * *", misfire=Misfire.SKIP))
    for _ in range(11):
        await rounds.firing.fire_due()
        clock.advance(seconds=10)
    document = await schedules.find_one({})
    assert document is not None
    assert document["last_skip"] == "it could not be fired at 2026-01-02T03:04:05Z"
    assert document["next_at"] > clock()
    assert rounds.submitted["t"] >= 4


async def test_a_change_by_a_client_ends_the_pause(schedules: Collection, clock: TestClock) -> None:
    rounds = Rounds(schedules, clock)
    rounds.full = {"t"}
    await put(schedules, schedule("t"))
    await rounds.firing.fire_due()
    rounds.full = set()
    await ScheduleRepository(schedules, clock).put(schedule("t"), replaces=True)
    await rounds.firing.fire_due()
    assert rounds.accepted == {"t": 1}


async def test_due_schedules_are_found_without_reading_one(schedules: Collection) -> None:
    await put(schedules, *(schedule("t", n) for n in range(300)))
    due = {"next_at": {"$lte": START}, "try_again_at": {"$not": {"$gt": START}}}
    found = await schedules.find(due, {"tenant": 1}).sort("next_at", 1).explain()
    stats = found["executionStats"]
    assert (stats["nReturned"], stats["totalDocsExamined"]) == (300, 0)


async def test_the_index_of_an_earlier_version_goes(schedules: Collection) -> None:
    await schedules.create_index("next_at", name="due", partialFilterExpression={"next_at": {"$exists": True}})
    await ensure_collection(
        schedules.database, SCHEDULES, validator=VALIDATOR, indexes=INDEXES, retired=RETIRED_INDEXES
    )
    assert "due" not in await schedules.index_information()


def test_tenants_take_turns() -> None:
    due = [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]
    assert turns(due, 4) == {"a": ["a1", "a2"], "b": ["b1"], "c": ["c1"]}
    assert turns(due, 2) == {"a": ["a1"], "b": ["b1"]}
    assert turns(due, 100) == {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"], "c": ["c1"]}
    assert id_of("a", "x") != id_of("b", "x")
