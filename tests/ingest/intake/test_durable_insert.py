"""One insert has one outcome: the claimer takes it once, and subscribers hear of what is durable."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from services.ingest.intake.durable_insert import DurableInsert
from services.ingest.job import Job, Lease, claim
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Inserted, JobStore, UnknownOutcome
from shoal.errors import AlreadyExists, Unavailable
from tests.ingest.making import START, job

LEASE = Lease("l", "local/ingest-0", "p", START)


class Claims:
    """Claims every job in its insert, and keeps the outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[list[str], Inserted | UnknownOutcome]] = []

    def claim_in_write(self, jobs: Sequence[Job]) -> list[Job]:
        return [claim(one, LEASE, START) for one in jobs]

    def settle_write(self, jobs: Sequence[Job], outcome: Inserted | UnknownOutcome) -> None:
        assert all(one.lease == LEASE for one in jobs)
        self.outcomes.append(([one.id for one in jobs], outcome))


class Store:
    """Answers an insert as the test wants it, or never."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    async def insert(self, jobs: Sequence[Job]) -> Inserted | UnknownOutcome:
        if self._outcome is None:
            await asyncio.Event().wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        outcome: Inserted | UnknownOutcome = self._outcome(jobs)
        return outcome


def insert_into(store: Store) -> tuple[DurableInsert, Claims, list[Job]]:
    claims, events, heard = Claims(), JobEvents(), list[Job]()
    events.accepted.subscribe(heard.extend)
    return DurableInsert(cast(JobStore, store), claims, events), claims, heard


async def test_subscribers_hear_of_the_jobs_that_were_written_as_they_were_written() -> None:
    refusal = AlreadyExists("taken")
    insert, claims, heard = insert_into(Store(lambda jobs: Inserted(jobs[:1], {jobs[1].id: refusal})))
    one, other = job(), job()
    outcome = await insert([one, other])
    assert outcome == Inserted([claim(one, LEASE, START)], {other.id: refusal})
    assert claims.outcomes == [([one.id, other.id], outcome)]
    assert heard == [claim(one, LEASE, START)]


async def test_of_an_unknown_outcome_only_the_claimer_hears() -> None:
    unknown = UnknownOutcome(Unavailable("no answer"))
    insert, claims, heard = insert_into(Store(lambda _: unknown))
    one = job()
    assert await insert([one]) == unknown
    assert (claims.outcomes, heard) == ([([one.id], unknown)], [])


async def test_the_outcome_of_an_insert_that_fails_unexpectedly_is_unknown() -> None:
    insert, claims, heard = insert_into(Store(RuntimeError("a fault")))
    with pytest.raises(RuntimeError):
        await insert([job()])
    [(_, outcome)] = claims.outcomes
    assert isinstance(outcome, UnknownOutcome)
    assert not heard


async def test_the_outcome_of_an_insert_that_is_cancelled_is_unknown() -> None:
    insert, claims, heard = insert_into(Store(None))
    task = asyncio.create_task(insert([job()]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [(_, outcome)] = claims.outcomes
    assert isinstance(outcome, UnknownOutcome)
    assert not heard


def test_subscribers_are_called_in_the_order_of_their_subscription() -> None:
    events, heard = JobEvents(), list[str]()
    events.changed.subscribe(lambda job_id: heard.append(f"first {job_id}"), lambda job_id: heard.append("second"))
    events.changed.subscribe(lambda job_id: heard.append("third"))
    events.changed("j")
    assert heard == ["first j", "second", "third"]
