"""The book and the ledger on a real MongoDB: who may write what, what is counted, and that queries have indexes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from pymongo import AsyncMongoClient

from mesh import mongo
from mesh.mongo_clock import milliseconds
from services.ingest.batches import batch_repository
from services.ingest.batches.batch import Batch, BatchState, Chunk, ChunkState, Ending
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.batcher import Batcher
from services.ingest.batches.chunk_repository import ChunkCounts, ChunkRepository
from services.ingest.batches.chunk_runner import ChunkRunner
from services.ingest.batches.documents import (
    BATCH_INDEXES,
    BATCH_VALIDATOR,
    BATCHES,
    CHUNK_INDEXES,
    CHUNK_VALIDATOR,
    CHUNKS,
)
from services.ingest.batches.duties import Duties
from services.ingest.batches.inputs.locations import Entry
from services.ingest.batches.inputs.piece import Span
from services.ingest.batches.outputs.part_summary import PartSummary
from services.ingest.retention.retention_repository import JOB_RETENTION, RetentionRepository
from services.ingest.retention.retention_repository import VALIDATOR as RULE_VALIDATOR
from services.ingest.retention.rules import BATCHES as RULED
from services.ingest.retention.rules import Rule, Rules
from services.ingest.tenants.settings import EVERYONE
from services.ingest.ulid import Ulids
from shoal.errors import AlreadyExists
from tests.breakable import until
from tests.ingest.batches.making import START, batch
from tests.ingest.making import TestClock

ENTRY = Entry("file:///in.jsonl", 100, "v1")
DONE = PartSummary(9, 1, 500, {"INTERNAL": 1})


@pytest.fixture
async def database(mongo_uri: str, mongo_database: str) -> AsyncIterator[Any]:
    async with mongo.connect(mongo_uri) as client:
        found = client[mongo_database]
        await mongo.ensure_collection(found, BATCHES, validator=BATCH_VALIDATOR, indexes=BATCH_INDEXES)
        await mongo.ensure_collection(found, CHUNKS, validator=CHUNK_VALIDATOR, indexes=CHUNK_INDEXES)
        await mongo.ensure_collection(found, JOB_RETENTION, validator=RULE_VALIDATOR, indexes=[])
        yield found


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


def chunk_repository_of(
    database: Any, clock: TestClock, owner: str = "local/ingest-0", process: str = "p"
) -> ChunkRepository:
    ulids = Ulids(lambda: milliseconds(clock()))
    return ChunkRepository(
        database[CHUNKS], clock=clock, new_id=ulids.new, owner=owner, process=process, lease_ms=1_000
    )


def chunks(one: Batch, count: int, first: int = 0) -> list[Chunk]:
    return [Chunk(one.id, n, ENTRY, 0, 10, Span(10 * n, 10, n, n + 1), 10 * n) for n in range(first, first + count)]


async def claimed(chunk_repository: ChunkRepository, one: Batch) -> Chunk:
    found = await chunk_repository.claim(one.id)
    assert found is not None
    return found


async def test_a_plan_is_a_log_that_takes_each_number_once(database: Any, clock: TestClock, tmp_path: Path) -> None:
    chunk_repository, one = chunk_repository_of(database, clock), batch(tmp_path)
    assert await chunk_repository.last_chunk(one.id) is None
    assert await chunk_repository.append(chunks(one, 3))
    assert not await chunk_repository.append(chunks(one, 3, first=2))
    tail = await chunk_repository.last_chunk(one.id)
    assert tail is not None
    assert (tail.number, tail.span, tail.entry) == (2, Span(20, 10, 2, 3), ENTRY)


async def test_of_many_who_want_a_chunk_one_has_it(database: Any, clock: TestClock, tmp_path: Path) -> None:
    one = batch(tmp_path)
    chunk_repositories = [chunk_repository_of(database, clock, f"local/ingest-{n}") for n in range(8)]
    await chunk_repositories[0].append(chunks(one, 5))
    found = await asyncio.gather(*(chunk_repository.claim(one.id) for chunk_repository in chunk_repositories))
    assert sorted(chunk.number for chunk in found if chunk is not None) == [0, 1, 2, 3, 4]


async def test_who_lost_a_chunk_writes_nothing_about_it(database: Any, clock: TestClock, tmp_path: Path) -> None:
    one = batch(tmp_path)
    slow, quick = chunk_repository_of(database, clock, "a"), chunk_repository_of(database, clock, "b")
    await slow.append(chunks(one, 1))
    old = await claimed(slow, one)
    assert await quick.claim(one.id) is None
    clock.advance(seconds=2)
    new = await claimed(quick, one)
    assert (old.number, new.number, new.attempts) == (0, 0, 2)
    assert old.lease is not None
    assert await slow.renew({old.id: (old.lease, ChunkCounts())}) == {old.id}
    assert not await slow.stage(old, "old", DONE, ["1"])
    assert not await slow.release(old, is_counted=True)
    assert not await slow.mark_done(old)
    assert await quick.stage(new, "new", DONE, ["2"])
    assert not await slow.stage(old, "old", DONE, ["1"])
    assert await quick.mark_done(new)
    totals = await quick.totals(one.id)
    assert (totals.ok, totals.failed, totals.versions) == (9, 1, ("2",))


async def test_a_lease_that_is_renewed_does_not_lapse(database: Any, clock: TestClock, tmp_path: Path) -> None:
    one = batch(tmp_path)
    chunk_repository = chunk_repository_of(database, clock)
    await chunk_repository.append(chunks(one, 1))
    chunk = await claimed(chunk_repository, one)
    assert chunk.lease is not None
    for _ in range(5):
        clock.advance(milliseconds=800)
        assert await chunk_repository.renew({chunk.id: (chunk.lease, ChunkCounts(3, 1, "waits"))}) == set()
        assert await chunk_repository.claim(one.id) is None
    totals = await chunk_repository.totals(one.id)
    assert (totals.rows, totals.ok, totals.failed, totals.chunks_done, totals.note) == (10, 3, 1, 0, "waits")


async def test_a_staged_chunk_is_only_published(database: Any, clock: TestClock, tmp_path: Path) -> None:
    """Its holder died between the two steps: whoever claims it sees what is left to do."""
    one = batch(tmp_path)
    chunk_repository = chunk_repository_of(database, clock)
    await chunk_repository.append(chunks(one, 2))
    chunk = await claimed(chunk_repository, one)
    assert await chunk_repository.claim(one.id, only_staged=True) is None
    assert await chunk_repository.stage(chunk, "name", DONE, ["1"])
    clock.advance(seconds=2)
    assert await chunk_repository.is_busy(one.id)
    again = await chunk_repository.claim(one.id, only_staged=True)
    assert again is not None
    assert (again.state, again.staged, again.ok, again.failed) == (ChunkState.STAGED, "name", 9, 1)
    assert await chunk_repository.mark_done(again)
    assert not await chunk_repository.is_busy(one.id)
    assert await chunk_repository.has_unfinished(one.id)
    await chunk_repository.drop_unfinished(one.id)
    assert not await chunk_repository.has_unfinished(one.id)
    assert await chunk_repository.claim(one.id) is None


async def test_what_is_given_back_is_not_counted_twice(database: Any, clock: TestClock, tmp_path: Path) -> None:
    one = batch(tmp_path)
    chunk_repository = chunk_repository_of(database, clock)
    await chunk_repository.append(chunks(one, 1))
    chunk = await claimed(chunk_repository, one)
    # A cancellation may come between the write and the answer to it: then it is staged, and given back all the same.
    assert await chunk_repository.stage(chunk, "name", DONE, ["1"])
    assert await chunk_repository.release(chunk, until=clock() + timedelta(seconds=5), is_counted=False)
    assert (await chunk_repository.totals(one.id)).ok == 0
    assert await chunk_repository.claim(one.id) is None
    clock.advance(seconds=6)
    again = await claimed(chunk_repository, one)
    assert (again.state, again.attempts) == (ChunkState.RUNNING, 1)


async def test_a_restarted_instance_frees_what_it_left(database: Any, clock: TestClock, tmp_path: Path) -> None:
    one = batch(tmp_path)
    before, other = chunk_repository_of(database, clock), chunk_repository_of(database, clock, "local/ingest-1")
    after = chunk_repository_of(database, clock, process="q")
    await before.append(chunks(one, 3))
    await claimed(before, one)
    await claimed(other, one)
    assert await after.release_stale() == 1
    assert (await claimed(after, one)).number == 0


async def test_codes_add_up_over_equal_chunks(database: Any, clock: TestClock, tmp_path: Path) -> None:
    one = batch(tmp_path)
    chunk_repository = chunk_repository_of(database, clock)
    await chunk_repository.append(chunks(one, 3))
    for codes in ({"A": 1}, {"A": 1}, {"A": 2, "B": 3}):
        chunk = await claimed(chunk_repository, one)
        await chunk_repository.stage(chunk, "n", PartSummary(0, sum(codes.values()), 1, codes), ["1"])
        await chunk_repository.mark_done(chunk)
    totals = await chunk_repository.totals(one.id)
    assert (dict(totals.codes), totals.failed, totals.chunks_done) == ({"A": 4, "B": 3}, 7, 3)


async def test_one_duty_at_a_time_and_one_ending(database: Any, clock: TestClock, tmp_path: Path) -> None:
    repositories = [
        BatchRepository(database[BATCHES], chunk_repository_of(database, clock, f"i{n}"), clock=clock, instance=f"i{n}")
        for n in range(2)
    ]
    one = batch(tmp_path, key="k", digest=b"d", free_at=START)
    assert await repositories[0].add(one) == (one, False)
    assert await repositories[1].add(replace(one, id="0" * 26)) == (await repositories[0].get(one.id), True)
    with pytest.raises(AlreadyExists, match="was used by batch"):
        await repositories[1].add(replace(one, id="0" * 26, digest=b"other"))
    held = await repositories[0].claim_duty(one.id)
    assert held is not None
    assert await repositories[1].claim_duty(one.id) is None
    clock.advance(seconds=2)
    taken = await repositories[1].claim_duty(one.id)
    assert taken is not None
    assert not await repositories[0].record_listing(held, ENTRY, 1)
    assert await repositories[1].record_listing(taken, ENTRY, 1)
    assert await repositories[0].request_end(one.id, Ending(BatchState.CANCELLED, "first")) is not None
    assert await repositories[1].request_end(one.id, Ending(BatchState.FAILED, "second")) is None
    assert await repositories[0].change_state(one.id, BatchState.RUNNING, BatchState.PAUSED, "no") is None
    assert await repositories[0].stopped([one.id]) == {one.id}
    final = await repositories[0].claim_duty(one.id)
    assert final is not None
    assert await repositories[0].end(final, Ending(BatchState.CANCELLED, "first"))
    ended = await repositories[0].get(one.id)
    assert (ended.state, ended.message, ended.is_final) == (BatchState.CANCELLED, "first", True)
    assert not await repositories[0].active()
    assert await repositories[0].filter_active([one.id]) == set()


def stages(plan: Any) -> list[str]:
    """All stages of an explained plan."""
    if isinstance(plan, dict):
        own = [plan["stage"]] if "stage" in plan else []
        return own + [stage for value in plan.values() for stage in stages(value)]
    return [stage for value in plan for stage in stages(value)] if isinstance(plan, list) else []


@pytest.mark.parametrize(
    ("collection", "query", "sort"),
    [
        (BATCHES, {"is_active": True}, [("_id", 1)]),
        (BATCHES, {"tenant": "t", "is_active": True}, None),
        (BATCHES, {"tenant": "t", "key": "k"}, None),
        (BATCHES, {"state": "running"}, [("_id", -1)]),
        (BATCHES, {"model_name": "m"}, [("_id", -1)]),
        (BATCHES, {"tenant": "t"}, [("_id", -1)]),
        (BATCHES, {"tenant": "t", "state": "running", "model_name": "m", "_id": {"$lt": "x"}}, [("_id", -1)]),
        (CHUNKS, {"batch": "b"}, [("number", -1)]),
        (CHUNKS, {"batch": "b", "state": "done"}, [("number", 1)]),
        (CHUNKS, {"batch": "b", "free_at": {"$gt": START, "$lte": START}}, [("number", 1)]),
    ],
    ids=str,
)
async def test_every_query_has_an_index(
    collection: str, query: dict[str, Any], sort: Any, database: Any, tmp_path: Path
) -> None:
    cursor = database[collection].find(query)
    plan = await (cursor.sort(sort) if sort else cursor).explain()
    found = stages(plan["queryPlanner"]["winningPlan"])
    assert "COLLSCAN" not in found
    assert "SORT" not in found
    assert "IXSCAN" in found


async def test_a_claim_in_a_long_plan_looks_at_few_chunks(
    database: Any, clock: TestClock, tmp_path: Path, mongo_uri: str
) -> None:
    """Those that are done lie before those that are free: they are not looked at."""
    one, chunk_repository = batch(tmp_path), chunk_repository_of(database, clock)
    await chunk_repository.append(chunks(one, 2_000))
    await database[CHUNKS].update_many(
        {"batch": one.id, "number": {"$lt": 1_900}}, {"$set": {"state": "done"}, "$unset": {"free_at": ""}}
    )
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as client:
        found = await client[database.name].command(
            "explain",
            {
                "findAndModify": CHUNKS,
                "query": {"batch": one.id, "free_at": {"$lte": clock(), "$gt": START - timedelta(days=9_999)}},
                "sort": {"number": 1},
                "hint": "undone",
                "update": {"$set": {"attempts": 1}},
            },
            verbosity="executionStats",
        )
    assert found["executionStats"]["totalDocsExamined"] <= 1
    assert (await claimed(chunk_repository, one)).number == 1_900


async def ended(repository: BatchRepository, chunk_repository: ChunkRepository, one: Batch, state: BatchState) -> Batch:
    await repository.add(one)
    await chunk_repository.append(chunks(one, 2))
    taken = await repository.claim_duty(one.id)
    assert taken is not None
    assert await repository.end(taken, Ending(state, "as the test wants it"))
    return await repository.get(one.id)


async def test_the_poll_for_active_batches_reads_no_inputs(database: Any, clock: TestClock, tmp_path: Path) -> None:
    repository = BatchRepository(
        database[BATCHES], chunk_repository_of(database, clock), clock=clock, instance="local/ingest-0"
    )
    one = batch(tmp_path, inputs=tuple(f"file:///{'x' * 2_000}-{number}" for number in range(1_000)))
    await repository.add(one)
    assert [found.inputs for found in await repository.active()] == [()]
    assert (await repository.get(one.id)).inputs == one.inputs


@pytest.mark.parametrize("keep", [timedelta(days=30), None], ids=["30-days", "for-ever"])
async def test_batches_that_ended_long_ago_go_with_their_chunks_and_no_others(
    database: Any, clock: TestClock, tmp_path: Path, keep: timedelta | None
) -> None:
    chunk_repository = chunk_repository_of(database, clock)
    repository = BatchRepository(database[BATCHES], chunk_repository, clock=clock, instance="local/ingest-0")
    ids = Ulids(lambda: milliseconds(clock()))
    retention = RetentionRepository(database[JOB_RETENTION], {RULED: keep})

    def made(**fields: Any) -> Batch:
        return batch(tmp_path, id=ids.new(), free_at=clock(), updated_at=clock(), submitted_at=clock(), **fields)

    old = [
        await ended(repository, chunk_repository, made(key=f"{state}", tenant="t"), state)
        for state in (BatchState.SUCCEEDED, BatchState.FAILED, BatchState.CANCELLED)
    ]
    long, paused = made(), made(state=BatchState.PAUSED)
    for each in (long, paused):  # Submitted long ago, as well: one ends just now, one goes on.
        await repository.add(each)
        await chunk_repository.append(chunks(each, 2))
    clock.advance(days=29)
    taken = await repository.claim_duty(long.id)
    assert taken is not None
    assert await repository.end(taken, Ending(BatchState.SUCCEEDED, "it took long"))
    young = await ended(repository, chunk_repository, made(), BatchState.SUCCEEDED)
    clock.advance(days=1, seconds=1)
    ready = asyncio.Event()
    ready.set()
    batcher = Batcher(
        repository,
        chunk_repository,
        cast(Duties, None),
        cast(ChunkRunner, None),
        clock=clock,
        ready=ready,
        slots=1,
        poll_ms=60_000,
        renew_ms=60_000,
        retention=retention,
        sweep_s=0.05,
    )
    batcher.stop()  # Nothing is to be run here.
    stays = {long.id, paused.id, young.id} | (set() if keep else {each.id for each in old})
    async with batcher:

        async def is_swept() -> bool:
            left = {document["_id"] async for document in database[BATCHES].find({}, {"_id": 1})}
            return left == stays and await chunk_repository.batch_ids() == {paused.id}

        await until(is_swept, "what is over is gone")
    earlier = await repository.find_by_key("t", "succeeded")
    assert (earlier is None) == (keep is not None), "its key is free with it"
    assert await repository.remove_ended(Rules({RULED: timedelta(days=30)}), clock()) == (0 if keep else 3)


async def test_batches_stay_as_long_as_their_tenants_say(
    database: Any, clock: TestClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_repository, "_REMOVED_AT_ONCE", 2)
    chunk_repository = chunk_repository_of(database, clock)
    repository = BatchRepository(database[BATCHES], chunk_repository, clock=clock, instance="local/ingest-0")
    ids = Ulids(lambda: milliseconds(clock()))
    tenants = ["kept", "short", "other", "kept", "kept", "short", "other", "kept"]
    for tenant in tenants:
        one = batch(tmp_path, id=ids.new(), free_at=clock(), updated_at=clock(), submitted_at=clock(), tenant=tenant)
        await ended(repository, chunk_repository, one, BatchState.SUCCEEDED)
    week, month = timedelta(days=7), timedelta(days=30)
    retention = RetentionRepository(database[JOB_RETENTION], {RULED: month})
    await retention.set(Rule("kept", RULED, None))
    await retention.set(Rule("short", RULED, week))

    async def removed() -> tuple[int, set[str]]:
        many = await repository.remove_ended(await retention.read(), clock())
        return many, {document["tenant"] async for document in database[BATCHES].find()}

    clock.advance(days=7)
    assert await removed() == (0, {"kept", "short", "other"})
    clock.advance(seconds=1)
    assert await removed() == (2, {"kept", "other"})
    clock.advance(days=23)
    assert await removed() == (2, {"kept"})
    await retention.set(Rule(EVERYONE, RULED, None))
    await retention.inherit("kept", RULED)
    assert await removed() == (0, {"kept"})
    await retention.set(Rule(EVERYONE, RULED, week))
    assert await removed() == (4, set())
