"""Waiting for jobs to end: whoever ends them, whenever they are waited for, whatever is away meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from services.ingest.documents import JOBS, document_of
from services.ingest.job import Job, Policy, State
from services.ingest.queries.completions import Completions
from shoal.errors import Code, DataLoss, NotFound, PermissionDenied, ShoalError, Unavailable
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.making import job

pytestmark = pytest.mark.mongo


class Answers:
    """The store, as faulty as a test wants it."""

    def __init__(self) -> None:
        self.results: dict[str, store_pb2.Result] = {}
        self.refused: set[str] = set()
        self.error: ShoalError | None = None
        self.sizes: list[int] = []
        self.page = 1_000

    async def read(self, job_ids: Sequence[str]) -> tuple[dict[str, store_pb2.Result], bool]:
        self.sizes.append(len(job_ids))
        if self.error is not None:
            raise self.error
        if self.refused & set(job_ids):
            raise PermissionDenied("a blob may not be read")
        found = {name: self.results[name] for name in job_ids if name in self.results}
        return dict(list(found.items())[: self.page]), len(found) <= self.page


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
async def jobs(mongo_uri: str, mongo_database: str) -> AsyncIterator[Any]:
    async with AsyncMongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
        yield client[mongo_database][JOBS]


@pytest.fixture
async def endings(jobs: Any, answers: Answers) -> AsyncIterator[Completions]:
    ready = asyncio.Event()
    ready.set()
    async with Completions(jobs, answers, ready=ready) as made:
        yield made


async def put(jobs: Any, made: Job, state: State = State.QUEUED) -> str:
    document = document_of(replace(made, state=state))
    await jobs.replace_one({"_id": made.id}, document, upsert=True)
    return made.id


async def test_a_poke_ends_the_wait_and_only_that_of_a_job_that_has_ended(endings: Completions, jobs: Any) -> None:
    one, two = job(), job()
    ids = [await put(jobs, each) for each in (one, two)]
    waits = [asyncio.create_task(endings.until_ended(name)) for name in ids]
    await put(jobs, one, State.SUCCEEDED)
    for name in ids:
        endings.poke(name)
    await asyncio.wait_for(waits[0], 30)
    assert not waits[1].done()
    await put(jobs, two, State.DEAD)
    await asyncio.wait_for(waits[1], 30)  # Nobody poked: another instance has ended it.


async def test_a_poke_that_came_before_the_wait_counts(endings: Completions, jobs: Any) -> None:
    name = await put(jobs, job(), State.FAILED)
    endings.poke(name)
    await asyncio.wait_for(endings.until_ended(name), 30)


async def test_what_has_ended_long_ago_or_is_there_no_more_has_ended(endings: Completions, jobs: Any) -> None:
    name = await put(jobs, job(), State.EXPIRED)
    await asyncio.wait_for(endings.until_ended(name, is_old=True), 30)
    await asyncio.wait_for(endings.until_ended(job().id), 30)


async def test_many_wait_for_one_job_and_one_who_leaves_takes_nobody_along(endings: Completions, jobs: Any) -> None:
    made = job()
    name = await put(jobs, made)
    waits = [asyncio.create_task(endings.until_ended(name)) for _ in range(5)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await put(jobs, made, State.CANCELLED)
    endings.poke(name)
    await asyncio.wait_for(asyncio.gather(*waits[1:]), 30)


async def test_thousands_are_waited_for_in_few_questions(endings: Completions, jobs: Any) -> None:
    made = [job() for _ in range(3_000)]
    await jobs.insert_many([document_of(each) for each in made])
    waits = [asyncio.create_task(endings.until_ended(each.id)) for each in made]
    await asyncio.sleep(0)
    await jobs.update_many({}, {"$set": {"state": str(State.SUCCEEDED)}})
    await asyncio.wait_for(asyncio.gather(*waits), 60)


async def test_results_are_read_together_and_one_that_cannot_be_had_harms_nobody_else(
    endings: Completions, answers: Answers
) -> None:
    names = [job().id for _ in range(150)]
    answers.results = {name: store_pb2.Result(job_id=name) for name in names}
    answers.results[names[3]].answer_removed_at.GetCurrentTime()
    del answers.results[names[4]]
    answers.refused = {names[5]}
    answers.results[names[6]].answer_lost = "a digest does not fit"
    found = await asyncio.gather(*(endings.result(name) for name in names), return_exceptions=True)
    assert max(answers.sizes) == 100
    assert isinstance(found[5], PermissionDenied)
    with pytest.raises(DataLoss, match="its answer is damaged in the store: a digest does not fit"):
        raise found[6]  # type: ignore[misc]
    assert isinstance(found[4], NotFound)
    with pytest.raises(NotFound, match="retention has removed its answer"):
        raise found[3]  # type: ignore[misc]
    assert [each.result.job_id for n, each in enumerate(found) if n not in (3, 4, 5, 6)] == [  # type: ignore[union-attr]
        name for n, name in enumerate(names) if n not in (3, 4, 5, 6)
    ]


async def test_a_store_that_is_away_is_said_to_be(endings: Completions, answers: Answers) -> None:
    answers.error = Unavailable("no store")
    with pytest.raises(Unavailable, match="no store"):
        await endings.result(job().id)


async def test_a_database_that_is_away_is_waited_for(jobs: Any, answers: Answers) -> None:
    ready = asyncio.Event()
    broken = AsyncMongoClient[dict[str, Any]]("mongodb://127.0.0.1:1", serverSelectionTimeoutMS=50)
    asked: list[str] = []

    class Collection:
        """The real one, and before that one that is away."""

        def find(self, query: Any, *more: Any) -> Any:
            asked.append("asked")
            return (broken["d"]["c"] if len(asked) < 3 else jobs).find(query, *more)

    made = job()
    name = await put(jobs, made, State.SUCCEEDED)
    async with Completions(Collection(), answers, ready=ready) as endings:  # type: ignore[arg-type]
        wait = asyncio.create_task(endings.until_ended(name, is_old=True))
        ready.set()
        await until(lambda: wait.done(), "the end")
    assert len(asked) >= 3
    await broken.close()


async def test_a_result_that_was_recorded_here_is_at_hand_for_whoever_waited(
    endings: Completions, jobs: Any, answers: Answers
) -> None:
    name, other = [await put(jobs, job(), State.RUNNING) for _ in range(2)]
    waits = [asyncio.create_task(endings.until_ended(each)) for each in (name, name, other)]
    await asyncio.sleep(0)
    recorded = store_pb2.Result(job_id=name, attempt=2)
    answers.results = {name: store_pb2.Result(job_id=name, attempt=2, instance="read back")}
    endings.recorded(job(), recorded)
    await asyncio.wait_for(asyncio.gather(*waits[:2]), 30)
    assert not waits[2].done()
    assert (await endings.result(name)).result is recorded
    assert (await endings.result(name)).result.instance == "read back", "it is at hand once"
    endings.recorded(job(), store_pb2.Result(job_id=job().id))  # Nobody waits for it.
    waits[2].cancel()


async def test_results_that_nobody_fetches_do_not_fill_the_memory(
    endings: Completions, jobs: Any, answers: Answers
) -> None:
    names = [await put(jobs, job(), State.RUNNING) for _ in range(3)]
    ends: list[str] = []
    for name in names:
        endings.watch(name, lambda name=name: ends.append(name))  # type: ignore[misc]
        recorded = store_pb2.Result(job_id=name)
        recorded.response.raw_output_contents.append(bytes(7 << 20))
        endings.recorded(job(), recorded)
    assert ends == names
    answers.results = {name: store_pb2.Result(job_id=name, instance="read back") for name in names}
    assert [(await endings.result(name)).result.instance for name in names] == ["read back", "", ""]
    large = store_pb2.Result(job_id=await put(jobs, job(), State.RUNNING))
    large.response.raw_output_contents.append(bytes(17 << 20))
    endings.watch(large.job_id, lambda: ends.append(large.job_id))
    endings.recorded(job(), large)
    assert ends[-1] == large.job_id
    with pytest.raises(NotFound):
        await endings.result(large.job_id)  # It is asked for.


async def test_a_failure_that_nobody_fetched_does_not_hide_the_answer_of_a_requeue(
    endings: Completions, jobs: Any, answers: Answers
) -> None:
    made = job()
    name = await put(jobs, made, State.RUNNING)
    ended: list[str] = []
    client = partial(ended.append, name)
    endings.watch(name, client)
    endings.recorded(made, store_pb2.Result(job_id=name, outcome=2, code=Code.INTERNAL, generation=1))
    assert ended == [name]
    endings.forget(name, client)  # It is gone before it is told how.
    answers.results = {name: store_pb2.Result(job_id=name, outcome=1, generation=2)}  # Recorded somewhere else.
    assert (await endings.result(name)).state is State.SUCCEEDED


async def test_the_state_of_a_failure_is_that_of_the_job_s_own_policy(
    endings: Completions, jobs: Any, answers: Answers
) -> None:
    own = Policy(codes=(Code.INVALID_ARGUMENT,))
    made, asked = [job(policy=own), job(policy=own), job(), job()], []
    ids = [await put(jobs, each, State.RUNNING) for each in made]
    await jobs.delete_one({"_id": ids[3]})
    codes = [Code.INVALID_ARGUMENT, Code.INTERNAL, Code.INTERNAL, Code.INVALID_ARGUMENT]
    results = [store_pb2.Result(job_id=name, outcome=2, code=code) for name, code in zip(ids, codes, strict=True)]
    expected = [State.DEAD, State.FAILED, State.DEAD, State.FAILED]
    answers.results = {each.job_id: each for each in results}
    assert [(await endings.result(name)).state for name in ids] == expected, "as they are read back"
    for each, result in zip(made, results, strict=True):
        endings.watch(each.id, lambda name=each.id: asked.append(name))  # type: ignore[misc]
        endings.recorded(each, result)
    assert asked == ids
    answers.error = Unavailable("not to be asked")
    assert [(await endings.result(name)).state for name in ids] == expected, "as they were recorded here"


async def test_the_policies_of_jobs_that_did_not_fail_are_not_asked_for(answers: Answers) -> None:
    class Nothing:
        """No jobs may be looked for."""

        def find(self, *query: Any) -> Any:
            raise AssertionError(query)

    name = job().id
    answers.results = {name: store_pb2.Result(job_id=name, outcome=1)}
    async with Completions(Nothing(), answers, ready=asyncio.Event()) as endings:  # type: ignore[arg-type]
        assert (await endings.result(name)).state is State.SUCCEEDED


async def test_large_results_are_given_to_their_callers_before_further_ones_are_read(
    endings: Completions, answers: Answers
) -> None:
    """Callers count the memory of a result when they get it: 100 results of 120 MiB are never read at once."""
    names = [str(number) for number in range(7)]
    answers.results = {
        name: store_pb2.Result(job_id=name, outcome=store_pb2.Result.OUTCOME_SUCCEEDED) for name in names
    }
    answers.page = 2
    given: list[str] = []
    given_before: list[int] = []
    read = answers.read

    async def watched(job_ids: Sequence[str]) -> tuple[dict[str, store_pb2.Result], bool]:
        given_before.append(len(given))
        return await read(job_ids)

    answers.read = watched  # type: ignore[method-assign]

    async def result(name: str) -> None:
        ended = await endings.result(name)
        assert ended.result.job_id == name
        given.append(name)

    async with asyncio.timeout(30):
        await asyncio.gather(*map(result, names), return_exceptions=False)
        with pytest.raises(NotFound):
            await endings.result("none")
    assert sorted(given) == names
    # The first result may be read alone.
    assert all(before >= 2 * turn - 1 for turn, before in enumerate(given_before[:4]))
