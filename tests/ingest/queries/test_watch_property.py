"""Whatever happens to jobs, and wherever a watcher is cut off, it is told every transition once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import connect, ensure_collection
from services.ingest.documents import (
    INDEXES,
    JOBS,
    VALIDATOR,
    claiming,
    document_of,
    fenced_updates,
    job_of,
    requeueing,
)
from services.ingest.job import (
    DEAD_LETTERS,
    BackToQueue,
    End,
    Job,
    Lease,
    Outcome,
    State,
    claim,
    end,
    requeue,
    return_to_queue,
)
from services.ingest.queries.filters import JobFilter
from services.ingest.queries.watch_many import WatchMany, WatchUpdate
from services.ingest.ulid import Ulids
from shoal.errors import Code
from tests.ingest.making import START, job

Collection = AsyncCollection[dict[str, Any]]
ENDS = [End(Outcome.SUCCEEDED), End(Outcome.FAILED, Code.INTERNAL), End(Outcome.CANCELLED, Code.CANCELLED)]
ids = Ulids(lambda: 1)

steps = st.lists(
    st.one_of(
        st.just(("submit",)),
        st.just(("adopt",)),
        st.tuples(st.just("move"), st.integers(0, 9), st.integers(0, 3)),
        st.tuples(st.just("read"), st.integers(1, 4)),
        st.just(("cut",)),
    ),
    min_size=1,
    max_size=30,
)


class Watcher:
    """Reads a watch, and goes on with the last token after each cut."""

    def __init__(self, jobs: Collection, wanted: JobFilter, existing: bool) -> None:
        self.watch = WatchMany(jobs, max_watches=1)
        self.wanted = wanted
        self.existing = existing
        self.token = ""
        self.told: list[Job] = []
        self.stream: AsyncGenerator[WatchUpdate, None] | None = None

    async def stand(self) -> None:
        self.stream = self.watch.follow(self.wanted, existing=self.existing, token=self.token)
        self.token = (await anext(self.stream)).token

    async def read(self, many: int) -> None:
        assert self.stream is not None
        for _ in range(many):
            told = await asyncio.wait_for(anext(self.stream), 30)
            while told.job is None:
                told = await asyncio.wait_for(anext(self.stream), 30)
            self.token = told.token
            self.told.append(told.job)

    async def cut(self) -> None:
        assert self.stream is not None
        await self.stream.aclose()
        await self.stand()


async def move(jobs: Collection, before: Job, how: int) -> Job:
    """One transition of a job, as its workers would write it."""
    now = before.updated_at + timedelta(milliseconds=how % 2)  # Some within the same millisecond.
    if before.state is State.QUEUED:
        await jobs.update_one({"_id": before.id}, claiming(Lease(ids.new(), "i", "p", now), now))
    elif before.state is State.RUNNING and how == 3:
        await jobs.bulk_write(
            fenced_updates([(before, return_to_queue(before, BackToQueue(now, False, "released"), "i", now))])
        )
    elif before.state is State.RUNNING:
        await jobs.bulk_write(fenced_updates([(before, end(before, ENDS[how], "i", now))]))
    elif before.state in DEAD_LETTERS:
        await jobs.bulk_write([requeueing(before, requeue(before, "", "i", now))])
    document = await jobs.find_one({"_id": before.id})
    assert document is not None
    return job_of(document)


async def watched(uri: str, database: str, script: list[tuple[Any, ...]]) -> None:
    async with connect(uri) as client:
        jobs = await ensure_collection(client[database], JOBS, validator=VALIDATOR, indexes=INDEXES)
        tenant = ids.new()
        watcher = Watcher(jobs, JobFilter(tenant=tenant), existing=False)
        await watcher.stand()
        made: list[Job] = []
        written: list[tuple[str, int, State]] = []
        for what, *args in script:
            if what == "submit":
                made.append(job(tenant=tenant, submitted_at=START))
                await jobs.insert_many([document_of(made[-1]), document_of(job(tenant="another"))])
                written.append((made[-1].id, 1, State.QUEUED))
            elif what == "adopt":  # Claimed as it is made.
                one = job(tenant=tenant, submitted_at=START)
                made.append(claim(one, Lease(ids.new(), "i", "p", START), START))
                await jobs.insert_one(document_of(made[-1]))
                written += [(one.id, 1, State.QUEUED), (one.id, 2, State.RUNNING)]
            elif what == "move" and made:
                at, how = args[0] % len(made), args[1]
                after = await move(jobs, made[at], how)
                if after.transition_count > made[at].transition_count:
                    written.append((after.id, after.transition_count, after.state))
                made[at] = after
            elif what == "read":
                await watcher.read(min(args[0], len(written) - len(watcher.told)))
            elif what == "cut":
                await watcher.cut()
        await watcher.read(len(written) - len(watcher.told))
        assert [(told.id, told.transition_count, told.state) for told in watcher.told] == written
        newest = {one.id: one for one in made}
        for told in watcher.told:
            assert told.transitions == newest[told.id].transitions[: told.transition_count]
        assert watcher.stream is not None
        await watcher.stream.aclose()


@settings(max_examples=25)
@given(steps)
def test_every_transition_is_told_once_and_in_order(mongo_uri: str, script: list[tuple[Any, ...]]) -> None:
    asyncio.run(watched(mongo_uri, "test_watch_property", script))


async def listing(uri: str, database: str, there: int, later: int, cuts: list[int]) -> None:
    async with connect(uri) as client:
        jobs = await ensure_collection(client[database], JOBS, validator=VALIDATOR, indexes=INDEXES)
        tenant = ids.new()
        before = [job(tenant=tenant) for _ in range(there)]
        if before:
            await jobs.insert_many(map(document_of, before))
        watcher = Watcher(jobs, JobFilter(tenant=tenant, states=frozenset({State.QUEUED})), existing=True)
        await watcher.stand()
        # Those that come while the others are told are told by the listing, or by the changes, or by both.
        after = [job(tenant=tenant) for _ in range(later)]
        if after:
            await jobs.insert_many(map(document_of, after))
        for told in range(there):
            if told in cuts:
                await watcher.cut()
            await watcher.read(1)
        while {one.id for one in watcher.told} != {one.id for one in before + after}:
            await watcher.read(1)
        async with aclosing(watcher.stream):  # type: ignore[type-var]
            assert [one.id for one in watcher.told[:there]] == [one.id for one in before]


@settings(max_examples=10)
@given(st.integers(0, 12), st.integers(0, 5), st.lists(st.integers(0, 12), max_size=4))
def test_the_jobs_that_are_there_are_told_too(mongo_uri: str, there: int, later: int, cuts: list[int]) -> None:
    asyncio.run(listing(mongo_uri, "test_watch_property", there, later, cuts))
