"""What has waited goes before what comes now, also of a model that was busy when the queue was read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import timedelta
from typing import Any

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo_clock import utc_now
from services.ingest.dispatch.attempt import Decision
from services.ingest.dispatch.recorder import RESULT_ITEMS, STATE_ITEMS, EndingJob
from services.ingest.dispatch.remote import GivenUpJobs
from services.ingest.documents import document_of
from services.ingest.job import BackToQueue, End, Job, Lease, Outcome, claim
from services.ingest.job_store import Inserted
from shoal.errors import Unavailable
from tests.breakable import until
from tests.ingest.dispatch.test_holding import Instance, result_of
from tests.ingest.making import job

Collection = AsyncCollection[dict[str, Any]]
A_MINUTE_MS = 60_000


class Answers:
    """Attempts, as the dispatcher needs them: answered when they may be. `between` is called once answers are taken."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.began: list[str] = []
        self.between: Callable[[], None] = lambda: None

    async def run(self, jobs: Sequence[Job], given_up: GivenUpJobs) -> AsyncGenerator[list[tuple[Job, Decision]], None]:
        self.began += [one.id for one in jobs]
        await self.may.wait()
        yield [(one, result_of(one, End(Outcome.SUCCEEDED))) for one in jobs]
        self.between()


def waiting(**fields: Any) -> Job:
    """A job that has been due for a while."""
    return job(due_at=utc_now() - timedelta(seconds=5), **fields)


async def busy(one: Instance) -> list[Job]:
    """Many jobs of a model that is busy. Of other models none waits, and what comes is claimed at once."""
    made = [waiting() for _ in range(100)]
    await one.jobs.insert_many([document_of(each) for each in made])
    one.ready.set()
    await until(lambda: len(one.dispatcher.held()) == 16, "one call is under way, and as many jobs stand in line")
    await until(lambda: adopts(one, waiting(model_name="other")), "the queue was read, but for the busy model")
    return made


def adopts(one: Instance, new: Job) -> bool:
    """Whether a job that comes now would be claimed at once."""
    (made,) = one.dispatcher.claim_in_write([new])
    one.dispatcher.settle_write([made], Inserted([], {made.id: Unavailable("not written")}))
    return made.lease is not None


async def test_a_backlog_goes_on_as_soon_as_its_model_is_free(jobs: Collection) -> None:
    answers = Answers()
    one = Instance(jobs, utc_now, answers, poll_ms=A_MINUTE_MS)
    async with one.recorder, one.dispatcher:
        made = await busy(one)
        answers.may.set()
        await one.has_ended(*made)  # None of them waits for the next poll.


async def test_what_comes_does_not_pass_a_backlog_whose_model_has_just_become_free(jobs: Collection) -> None:
    answers = Answers()
    one = Instance(jobs, utc_now, answers)
    passed: list[bool] = []
    turns: list[bool] = []
    # An instance that may have eight in calls holds 32: so long it has not claimed the last of them.

    def between() -> None:
        if len(answers.began) <= 68:
            passed.append(adopts(one, waiting()))
            turns.append(adopts(one, waiting(tenant="light")))

    answers.between = between
    async with one.recorder, one.dispatcher:
        made = await busy(one)
        answers.may.set()
        await one.has_ended(*made)
        assert passed
        assert not any(passed)
        # Another tenant, whose jobs wait behind no others of its own, has its turns as soon as the model is free.
        assert any(turns)
        await until(lambda: adopts(one, waiting()), "nothing waits any more")


async def test_the_records_of_a_tenants_jobs_do_not_wait_for_all_those_of_another(jobs: Collection) -> None:
    here = Instance(jobs, utc_now, Answers())
    now = utc_now()
    lease = Lease("l", "local/ingest-0", "p", now + timedelta(minutes=1))

    def held(others: int) -> list[Job]:
        return [claim(waiting(tenant=tenant), lease, now) for tenant in ["big"] * others + ["small"]]

    ended, returned = held(4 * RESULT_ITEMS), held(4 * STATE_ITEMS)
    await jobs.insert_many([document_of(one) for one in ended + returned])
    async with here.recorder:
        endings = [EndingJob(one, result_of(one, End(Outcome.SUCCEEDED))) for one in ended]
        await asyncio.gather(*(here.recorder.end([each], lambda _: True, lambda _: None) for each in endings))
        here.changed.clear()
        again = BackToQueue(now, True, "failed")
        await asyncio.gather(
            *(here.recorder.put_back([(one, again)], lambda _: True, lambda _: None) for one in returned)
        )
    # A job waits for one write, and is in the next.
    assert [each.tenant for each in here.store.results].index("small") < 2 * RESULT_ITEMS
    assert here.changed.index(returned[-1].id) < 2 * STATE_ITEMS
