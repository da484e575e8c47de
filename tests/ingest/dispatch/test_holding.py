"""What an instance holds in memory agrees with what it holds in the database, however late an answer of that comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, cast

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import connect, ensure_collection
from services.ingest.clock import utc_now
from services.ingest.dispatch.attempt import Attempts, Decision
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.gate import Gate
from services.ingest.dispatch.recorder import Recorder, result_of
from services.ingest.dispatch.remote import GivenUp
from services.ingest.documents import INDEXES, JOBS, VALIDATOR, document_of, job_of
from services.ingest.intake.backlog import Backlog
from services.ingest.intake.payloads import Payloads
from services.ingest.job import Again, End, Job, Outcome, State
from services.ingest.ulid import Ulids
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.making import job

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


class FailsOnce:
    """Attempts, as the dispatcher needs them: each job's first fails, its second is answered when it may be."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.began: list[int] = []

    async def run(self, jobs: Sequence[Job], given_up: GivenUp) -> AsyncGenerator[list[tuple[Job, Decision]], None]:
        self.began += [one.attempts for one in jobs]
        if jobs[0].attempts == 1:
            yield [(one, Again(utc_now(), True, "failed")) for one in jobs]
            return
        await self.may.wait()
        yield [(one, result_of(one, End(Outcome.SUCCEEDED))) for one in jobs]


class Store:
    """The store, as the recorder needs it."""

    def __init__(self) -> None:
        self.results: list[store_pb2.Result] = []

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End]:
        self.results += results
        return [End(Outcome(result.outcome)) for result in results]

    async def standing(self, job_ids: Sequence[str]) -> dict[str, End]:
        return {}


class NoPayloads:
    """Nothing is kept apart."""

    async def drop(self, job_ids: Sequence[str]) -> None:
        assert not job_ids


@pytest.fixture
async def jobs(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collection]:
    async with connect(mongo_uri) as client:
        yield await ensure_collection(client[mongo_database], JOBS, validator=VALIDATOR, indexes=INDEXES)


async def test_a_job_that_is_claimed_again_before_its_return_is_known_to_be_written_stays_held(
    jobs: Collection,
) -> None:
    late, attempts, store, ids, ready = LateAnswers(jobs), FailsOnce(), Store(), Ulids(lambda: 1), asyncio.Event()
    returned: list[str] = []
    claims = Claims(jobs, clock=utc_now, new_id=ids.new, owner="local/ingest-0", process="p", lease_ms=60_000)
    recorder = Recorder(
        cast(Collection, late),
        store,
        cast(Payloads, NoPayloads()),
        clock=utc_now,
        instance="local/ingest-0",
        on_change=returned.append,
    )
    dispatcher = Dispatcher(
        claims,
        cast(Attempts, attempts),
        recorder,
        gate=Gate(),
        backlog=Backlog(1_000),
        clock=utc_now,
        instance="local/ingest-0",
        ready=ready,
        max_in_flight=8,
        poll_ms=10,
        drain_ms=1_000,
    )
    made = [job() for _ in range(3)]
    await jobs.insert_many([document_of(one) for one in made])

    async def state(one: Job) -> State:
        return job_of(cast(dict[str, Any], await jobs.find_one({"_id": one.id}))).state

    async with recorder, dispatcher:
        ready.set()
        await until(lambda: attempts.began.count(2) == 3, "claimed anew, while nobody knows that they were put back")
        late.may.set()
        await until(lambda: len(returned) >= 3, "now it is known")
        assert dispatcher.held().keys() == {one.id for one in made}
        attempts.may.set()
        for one in made:

            async def has_ended(one: Job = one) -> bool:
                return await state(one) is State.SUCCEEDED

            await until(has_ended, "it ended")
        await until(lambda: not dispatcher.held(), "all are let go")
    assert sorted(result.job_id for result in store.results) == [one.id for one in made]
    assert {result.attempt for result in store.results} == {2}
