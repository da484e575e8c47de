"""A job that many wait for: its dependents are read in pages, count in the backlog, and delay nobody else's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from pymongo.asynchronous.collection import AsyncCollection

from services.ingest.dispatch import cascade
from services.ingest.dispatch.cascade import Cascade
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.documents import document_of
from services.ingest.job import End, Job, State
from services.ingest.job_events import JobEvents
from services.ingest.mongo_jobs import MongoJobs
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh
from tests.ingest.making import TestClock, instance, job

Collection = AsyncCollection[dict[str, Any]]
PAGE = 20
MANY = 5 * PAGE + 3


class PagedJobs(MongoJobs):
    """Jobs that remember how many of them each read returned."""

    def __init__(self, jobs: Collection) -> None:
        super().__init__(jobs)
        self.read_sizes: list[int] = []

    async def dependents(self, *args: Any) -> list[Job]:
        return self._noted(await super().dependents(*args))

    async def dependents_of(self, *args: Any) -> list[Job]:
        return self._noted(await super().dependents_of(*args))

    def _noted(self, found: list[Job]) -> list[Job]:
        self.read_sizes.append(len(found))
        return found


@dataclass
class Holder:
    """The dispatcher, as the cascade needs it: holds up to `capacity` jobs, which end when `ends` is called."""

    room: int = 1_000
    held: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    left_backlog: int = 0

    @property
    def capacity(self) -> int:
        return self.room - len(self.held)

    def end(self, job: Job, how: End) -> None:
        assert len(self.held) < self.room
        self.held.append(job.id)

    def unblocked(self, jobs: int) -> None:
        self.left_backlog += jobs

    def ends(self) -> None:
        self.ended += self.held
        self.held.clear()


@dataclass
class World:
    """A cascade on a real database."""

    jobs: Collection
    clock: TestClock
    holder: Holder = field(default_factory=Holder)
    released: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = PagedJobs(self.jobs)
        events, here = JobEvents(), instance(self.clock)
        events.due_again.subscribe(lambda jobs: self.released.extend(job.id for job in jobs))
        claims = Claims(self.store, here, lease_ms=60_000)
        self.cascade = Cascade(self.store, claims, cast(Dispatcher, self.holder), events, here)

    async def put(self, state: State, many: int, tenant: str) -> tuple[Job, list[str]]:
        """Insert an ended job and `many` that wait for it."""
        first = job(state=state, due_at=None, tenant=tenant)
        waits = {"due_at": None, "tenant": tenant, "depends_on": (first.id,), "waits_for": (first.id,)}
        made = [job(**waits) for _ in range(many)]
        await self.jobs.insert_many([document_of(one) for one in (first, *made)])
        return first, [one.id for one in made]

    async def turn(self) -> None:
        await self.cascade._process_notices()


@pytest.fixture
def world(jobs: Collection, clock: TestClock, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(cascade, "PAGE_JOBS", PAGE)
    monkeypatch.setattr(cascade, "_FULL_WAIT_S", 0.0)
    return World(jobs, clock)


async def test_the_dependents_of_one_job_are_read_in_pages(world: World) -> None:
    first, ids = await world.put(State.SUCCEEDED, MANY, "noisy")
    world.cascade.changed(first.id)
    for _ in range(MANY // PAGE + 2):
        await world.turn()
    assert sorted(world.released) == ids
    assert max(world.store.read_sizes) == PAGE
    assert world.holder.left_backlog == MANY
    reads = len(world.store.read_sizes)
    await world.turn()
    assert len(world.store.read_sizes) == reads


async def test_the_dependents_of_another_job_come_in_between(world: World) -> None:
    noisy, many = await world.put(State.SUCCEEDED, MANY, "noisy")
    quiet, (one,) = await world.put(State.SUCCEEDED, 1, "quiet")
    world.cascade.changed(noisy.id)
    await world.turn()
    world.cascade.changed(quiet.id)
    await world.turn()
    assert one in world.released
    assert len(world.released) < len(many)


async def test_ends_that_the_dispatcher_cannot_hold_yet_leave_room_to_others(world: World) -> None:
    world.holder.room = 5
    noisy, many = await world.put(State.FAILED, MANY, "noisy")
    quiet, (one,) = await world.put(State.DEAD, 1, "quiet")
    world.cascade.changed(noisy.id)
    await world.turn()
    world.cascade.changed(quiet.id)
    turns = 0
    while one not in world.holder.held:
        turns += 1
        assert turns < 5
        world.holder.ends()
        await world.turn()
    while len(world.holder.ended) <= MANY:
        turns += 1
        assert turns < MANY
        await world.turn()
        world.holder.ends()
    assert sorted(world.holder.ended) == sorted([*many, one])


async def test_a_job_that_has_not_ended_has_only_one_page_read(world: World) -> None:
    first, _ = await world.put(State.QUEUED, MANY, "noisy")
    world.cascade.changed(first.id)
    for _ in range(5):
        await world.turn()
    assert sum(world.store.read_sizes) <= 2 * PAGE
    assert not world.released


async def test_counting_dependents_reads_none_of_them(jobs: Collection) -> None:
    first, second = job(due_at=None, state=State.DEAD), job()
    waits = {"due_at": None, "depends_on": (first.id, second.id), "waits_for": (first.id, second.id)}
    await jobs.insert_many([document_of(one) for one in (first, second, *(job(**waits) for _ in range(30)))])
    await jobs.database.command("profile", 2)
    assert await MongoJobs(jobs).count_waiting(1_000) == 31
    assert await MongoJobs(jobs).count_waiting(20) == 20
    await jobs.database.command("profile", 0)
    commands = await jobs.database["system.profile"].find({"command.aggregate": jobs.name}).to_list()
    assert len(commands) >= 4
    assert sum(one["docsExamined"] for one in commands) == 0


async def test_jobs_that_wait_for_others_count_in_the_backlog(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    may = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await may.wait()

    own_mesh.infer.model = waits
    ingest = start_ingest(max_backlog=10)
    await ingest.until_ready()
    client = Client(ingest.address)
    first = (await client.submit()).job.id
    refusal: grpc.aio.AioRpcError | None = None
    for _ in range(100):
        try:
            await client.submit(depends_on=[pb.Dependency(job_id=first)])
        except grpc.aio.AioRpcError as err:
            refusal = err
            break
    assert refusal is not None
    assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "which is twice as many as all tenants together may still queue" in (refusal.details() or "")
    assert (await client.submit(tenant="another")).job.id
    may.set()
    await client.channel.close()
