"""What an instance holds in memory agrees with what it holds in the database, however late an answer of that comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo_clock import Clock, utc_now
from mesh.process.backoff import Backoff
from services.ingest.dispatch.attempt import Decision
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.lease_keeper import LeaseKeeper
from services.ingest.dispatch.model_gate import ModelGate
from services.ingest.dispatch.recorder import Recorder, result_of
from services.ingest.dispatch.remote import GivenUpJobs
from services.ingest.documents import document_of, job_of
from services.ingest.intake.backlog import JobBacklog
from services.ingest.intake.payloads import Payloads
from services.ingest.job import BackToQueue, End, Job, Lease, Outcome, Policy, State, claim
from services.ingest.job_events import JobEvents
from services.ingest.job_store import UnknownOutcome
from services.ingest.mongo_jobs import MongoJobs
from shoal.errors import Code, Unavailable
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.making import TestClock, instance, job

Collection = AsyncCollection[dict[str, Any]]


class LateAnswers:
    """A collection that answers bulk writes, which are done at once, when it may."""

    def __init__(self, jobs: Collection) -> None:
        self._jobs = jobs
        self.may = asyncio.Event()

    async def bulk_write(self, *args: Any, **options: Any) -> Any:
        done = await self._jobs.bulk_write(*args, **options)
        await self.may.wait()
        return done


class Fails:
    """Attempts, as the dispatcher needs them: each job's first `failures` fail, the next is answered when it may be."""

    def __init__(self, failures: int = 1) -> None:
        self._failures = failures
        self.may = asyncio.Event()
        self.began: list[int] = []

    async def run(self, jobs: Sequence[Job], given_up: GivenUpJobs) -> AsyncGenerator[list[tuple[Job, Decision]], None]:
        self.began += [one.attempts for one in jobs]
        if jobs[0].attempts <= self._failures:
            yield [(one, BackToQueue(utc_now(), True, "failed")) for one in jobs]
            return
        await self.may.wait()
        yield [(one, result_of(one, End(Outcome.SUCCEEDED))) for one in jobs]


class Store:
    """The store, as the recorder needs it."""

    def __init__(self) -> None:
        self.results: list[store_pb2.Result] = []

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End | None]:
        self.results += results
        return [None for _ in results]

    async def recorded_ends(self, job_ids: Sequence[str]) -> dict[str, End]:
        return {}


class NoPayloads:
    """Nothing is kept apart."""

    async def drop(self, job_ids: Sequence[str]) -> None:
        assert not job_ids


@dataclass
class Instance:
    """What of an instance holds jobs, on a real database. `written` is what states are written to."""

    jobs: Collection
    clock: Clock
    attempts: Any
    written: Any = None
    lease_ms: int = 60_000
    poll_ms: int = 10
    drain_ms: int = 1_000
    store: Store = field(default_factory=Store)
    changed: list[str] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        payloads, backlog, events = cast(Payloads, NoPayloads()), JobBacklog(1_000), JobEvents()
        events.changed.subscribe(self.changed.append)
        here = replace(instance(self.clock), ready=self.ready)
        claims = Claims(MongoJobs(self.jobs), here, lease_ms=self.lease_ms)
        self.recorder = Recorder(MongoJobs(self.written or self.jobs), self.store, payloads, events, here)
        self.dispatcher = Dispatcher(
            claims,
            self.attempts,
            self.recorder,
            instance=here,
            gate=ModelGate(),
            backlog=backlog,
            max_in_flight=8,
            poll_ms=self.poll_ms,
            drain_ms=self.drain_ms,
        )
        self.keeper = LeaseKeeper(
            MongoJobs(self.jobs), claims, self.dispatcher, self.store, payloads, backlog, here, renew_ms=1_500
        )

    async def has_ended(self, *made: Job) -> None:
        async def all_have() -> bool:
            found = await self.jobs.find({"_id": {"$in": [one.id for one in made]}}).to_list()
            return all(job_of(document).state is State.SUCCEEDED for document in found)

        await until(all_have, "they have succeeded")


async def test_a_job_that_is_claimed_again_before_its_return_is_known_to_be_written_stays_held(
    jobs: Collection,
) -> None:
    late, attempts = LateAnswers(jobs), Fails()
    here = Instance(jobs, utc_now, attempts, written=late)
    made = [job() for _ in range(3)]
    await jobs.insert_many([document_of(one) for one in made])
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await until(lambda: attempts.began.count(2) == 3, "claimed anew, while nobody knows that they were put back")
        late.may.set()
        await until(lambda: len(here.changed) >= 3, "now it is known")
        assert here.dispatcher.held().keys() == {one.id for one in made}
        attempts.may.set()
        await here.has_ended(*made)
        await until(lambda: not here.dispatcher.held(), "all are let go")
    assert sorted(result.job_id for result in here.store.results) == [one.id for one in made]
    assert {result.attempt for result in here.store.results} == {2}


async def test_a_queued_job_runs_when_it_is_due_and_not_at_the_next_poll(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts, poll_ms=600_000)
    now = utc_now()
    first = job(due_at=now + timedelta(seconds=0.3))
    second = job(due_at=now + timedelta(seconds=1), model_name="other")
    await jobs.insert_many([document_of(one) for one in (first, second)])
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await here.has_ended(first, second)


async def test_a_poll_that_finds_a_job_is_followed_by_another_soon(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts)
    first, second = job(), job()
    await jobs.insert_one(document_of(first))
    # It has found nothing for long: its intervals are of an hour.
    idle = here.dispatcher._polls = Backoff(0.01, 3_600.0)
    for _ in range(32):
        idle.next_s()
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await here.has_ended(first)
        await jobs.insert_one(document_of(second))
        await here.has_ended(second)


async def test_jobs_of_a_model_that_was_closed_run_when_it_opens_and_not_at_the_next_idle_poll(
    jobs: Collection,
) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts)
    waiting = job()
    await jobs.insert_one(document_of(waiting))
    here.dispatcher._gate.refused(waiting.model_name, utc_now(), retry_after_ms=500)
    here.dispatcher._polls = Backoff(3_600.0, 3_600.0)
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await here.has_ended(waiting)


async def test_leases_that_lapsed_while_mongodb_was_away_cost_their_holder_nothing(jobs: Collection) -> None:
    clock, attempts = TestClock(), Fails(failures=0)
    here = Instance(jobs, clock, attempts, lease_ms=5_000)
    made = job(policy=Policy(max_attempts=1))
    await jobs.insert_one(document_of(made))
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await until(lambda: attempts.began == [1], "it is in a call")
        clock.advance(seconds=30)  # Nothing could be renewed; and what is lapsed may be looked for first.
        await here.keeper._recover_and_expire()
        assert here.dispatcher.held().keys() == {made.id}
        await here.keeper._renew()
        attempts.may.set()
        await here.has_ended(made)
    assert [result.attempt for result in here.store.results] == [1]


async def test_a_lapsed_lease_of_which_its_holder_knows_nothing_is_taken_up_by_itself(jobs: Collection) -> None:
    clock, attempts = TestClock(), Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, clock, attempts, lease_ms=5_000)
    made = job()
    lost = Lease("its claim was made, and its answer was lost", "local/ingest-0", "p", clock.now)
    await jobs.insert_one(document_of(claim(made, lost, clock.now)))
    clock.advance(seconds=1)
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await here.keeper._recover_and_expire()
        await here.has_ended(made)
    assert [result.attempt for result in here.store.results] == [2]


async def test_a_job_of_one_attempt_whose_call_outlasts_the_drain_is_dead_and_others_return(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    here = Instance(jobs, utc_now, attempts, drain_ms=0)
    once, often = job(policy=Policy(max_attempts=1)), job()
    await jobs.insert_many([document_of(one) for one in (once, often)])
    async with here.recorder, here.dispatcher:
        here.ready.set()
        await until(lambda: attempts.began == [1, 1], "both are in calls")
    found = {one["_id"]: job_of(one) for one in await jobs.find().to_list()}
    assert (found[once.id].state, found[once.id].attempts, found[once.id].last_code) == (State.DEAD, 1, Code.ABORTED)
    assert (found[often.id].state, found[often.id].attempts) == (State.QUEUED, 0)
    assert [result.job_id for result in here.store.results] == [once.id]


async def test_an_insert_that_mongodb_makes_after_its_error_runs_a_job_of_one_attempt(jobs: Collection) -> None:
    clock, attempts = TestClock(), Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, clock, attempts, lease_ms=5_000)
    async with here.recorder, here.dispatcher:
        here.ready.set()
        made = here.dispatcher.claim_in_write([job(policy=Policy(max_attempts=1))])
        here.dispatcher.settle_write(made, UnknownOutcome(Unavailable("no answer")))
        await until(lambda: not here.dispatcher.held(), "nothing of the job is known here")
        await jobs.insert_many([document_of(one) for one in made])
        clock.advance(seconds=30)
        await here.keeper._recover_and_expire()
        here.dispatcher.wake()

        async def has_ended() -> bool:
            return all(job_of(one).is_final for one in await jobs.find().to_list())

        await until(has_ended, "its end")
    assert [job_of(one).state for one in await jobs.find().to_list()] == [State.SUCCEEDED]
    assert attempts.began == [1]
