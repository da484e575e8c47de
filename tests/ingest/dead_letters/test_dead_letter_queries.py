"""What dead letters ask MongoDB: each question is answered by an index, however many jobs have ended otherwise."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from services.ingest.documents import WITHOUT_REQUEST, document_of, job_of, requeueing
from services.ingest.job import Job, State, requeue
from services.ingest.job_store import DeadFilter
from tests.ingest.making import START, job

Collection = AsyncCollection[dict[str, Any]]
LATER = datetime(2030, 1, 1, tzinfo=UTC)
FILTERS = [
    DeadFilter(),
    DeadFilter(State.FAILED),
    DeadFilter(tenant="t"),
    DeadFilter(model_name="m"),
    DeadFilter(model_name="m", tenant="t", code=13, before=LATER),
    DeadFilter(State.FAILED, code=3),
    DeadFilter(before=LATER),
]


async def put(jobs: Collection, *made: Job) -> None:
    await jobs.insert_many([document_of(one) for one in made])


@pytest.mark.parametrize("among", FILTERS, ids=range(len(FILTERS)))
@pytest.mark.parametrize("direction", [-1, 1])
async def test_every_question_is_answered_by_an_index(jobs: Collection, among: DeadFilter, direction: int) -> None:
    ended = [job(state=state, due_at=None, tenant="t", last_code=13) for state in (State.SUCCEEDED, State.DEAD) * 200]
    await put(jobs, *ended)
    found = await jobs.find(among.query(), WITHOUT_REQUEST).sort("_id", direction).limit(100).explain()
    plan = str(found["queryPlanner"]["winningPlan"])
    assert "COLLSCAN" not in plan
    assert "'SORT'" not in plan
    assert found["executionStats"]["totalDocsExamined"] <= 200  # Never the ones that succeeded.


async def test_a_requeue_writes_what_requeue_says_once(jobs: Collection) -> None:
    dead = job(state=State.DEAD, due_at=None, attempts=3, last_code=13, deadline=START)
    await put(jobs, dead)
    again = requeue(dead, "why", "i", LATER)
    await jobs.bulk_write([requeueing(dead, again)])
    document = await jobs.find_one({"_id": dead.id})
    assert document is not None
    assert job_of(document) == again
    done = await jobs.bulk_write([requeueing(dead, requeue(dead, "twice", "j", LATER))])
    assert done.matched_count == 0
