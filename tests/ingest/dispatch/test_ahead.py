"""A few jobs are called while they are being written; what comes of it counts once they are durable, and else not."""

from __future__ import annotations

import asyncio

from services.ingest.clock import utc_now
from services.ingest.dispatch.ahead import MOST, Ahead
from services.ingest.documents import document_of, job_of
from services.ingest.job import Job, State
from tests.breakable import until
from tests.ingest.dispatch.test_holding import Collection, Fails, Instance
from tests.ingest.making import job


def made(**fields: object) -> Job:
    now = utc_now()
    return job(**{"submitted_at": now, "updated_at": now, "due_at": now, **fields})


async def state_of(jobs: Collection, one: Job) -> Job | None:
    document = await jobs.find_one({"_id": one.id})
    return None if document is None else job_of(document)


async def test_a_lone_job_is_called_before_it_is_durable_and_ends_after(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts)
    async with here.recorder, here.dispatcher as dispatcher:
        (one,) = dispatcher.adopt([made()])
        await until(lambda: attempts.began == [1], "it was called")
        await asyncio.sleep(0)
        assert dispatcher.held() == {}, "there is no lease to renew yet"
        assert here.store.results == []
        await jobs.insert_one(document_of(one))
        dispatcher.accept([one])
        await here.has_ended(one)
    assert [result.job_id for result in here.store.results] == [one.id]
    assert attempts.began == [1]


async def test_a_call_that_takes_longer_than_the_write_goes_on(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    here = Instance(jobs, utc_now, attempts)
    async with here.recorder, here.dispatcher as dispatcher:
        (one,) = dispatcher.adopt([made()])
        await until(lambda: attempts.began == [1], "it was called")
        await jobs.insert_one(document_of(one))
        dispatcher.accept([one])
        assert dispatcher.held().keys() == {one.id}
        attempts.may.set()
        await here.has_ended(one)
    assert attempts.began == [1]


async def test_nothing_is_recorded_of_a_job_that_was_not_written(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts)
    async with here.recorder, here.dispatcher as dispatcher:
        refused, called = made(), made()
        room = dispatcher.room
        (refused,) = dispatcher.adopt([refused])
        await until(lambda: attempts.began == [1], "it was called")
        dispatcher.forget([refused])
        assert dispatcher.room == room
        attempts.may.clear()
        (called,) = dispatcher.adopt([called])
        await until(lambda: attempts.began == [1, 1], "it was called")
        dispatcher.forget([called])  # In the middle of its call.
        attempts.may.set()
        assert dispatcher.room == room
        dispatcher.accept([])
    assert here.store.results == []


async def test_a_job_of_which_it_is_not_clear_whether_it_was_written_goes_to_the_queue(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts)
    async with here.recorder, here.dispatcher as dispatcher:
        there, nowhere = dispatcher.adopt([made(), made()])
        await until(lambda: attempts.began == [1, 1], "they were called")
        await jobs.insert_one(document_of(there))
        dispatcher.disown([there, nowhere])

        async def is_back() -> bool:
            found = await state_of(jobs, there)
            return found is not None and found.state is State.QUEUED and found.attempts == 0

        await until(is_back, "it is back")
    assert here.store.results == []
    assert await state_of(jobs, nowhere) is None


async def test_a_key_that_was_seen_is_not_run_before_it_is_known_to_be_new(jobs: Collection) -> None:
    attempts = Fails(failures=0)
    attempts.may.set()
    here = Instance(jobs, utc_now, attempts)
    async with here.recorder, here.dispatcher as dispatcher:
        (first,) = dispatcher.adopt([made(key="k")])
        await until(lambda: attempts.began == [1], "it was called")
        await jobs.insert_one(document_of(first))
        dispatcher.accept([first])
        await here.has_ended(first)
        (again,) = dispatcher.adopt([made(key="k")])
        (other,) = dispatcher.adopt([made(key="k", tenant="another")])
        await until(lambda: attempts.began == [1, 1], "the other tenant's was called")
        dispatcher.forget([again, other])
    assert attempts.began == [1, 1]


def test_many_are_not_begun() -> None:
    ahead: Ahead[str] = Ahead()
    few = [made() for _ in range(MOST)]
    assert ahead.may_begin(few)
    ahead.begin(few)
    assert not ahead.may_begin([made()])
    ahead.pop(few[0].id)
    assert ahead.may_begin([made()])
    assert not ahead.may_begin([made(is_apart=True)])
    assert not ahead.may_begin([made(), made()])


def test_keys_are_forgotten_in_their_order() -> None:
    ahead: Ahead[str] = Ahead()
    for number in range(10_001):
        assert ahead.may_begin([made(key=str(number))])
    assert ahead.may_begin([made(key="0")])
    assert not ahead.may_begin([made(key="10000")])
