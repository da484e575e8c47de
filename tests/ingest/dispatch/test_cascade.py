"""Jobs that depend on jobs, through real processes: they run after these or end with these, whoever is killed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from pymongo import AsyncMongoClient

from services.ingest.documents import EPOCH, INDEXES, JOBS
from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, failing, submit
from tests.long_form import by_form

S = grpc.StatusCode
NOWHERE = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
ONCE = pb.RetryPolicy(max_attempts=1)
CHAINS = 6
LENGTH = 8


def after(*references: str) -> list[pb.Dependency]:
    """Ids, and keys with a + before them."""
    return [
        pb.Dependency(idempotency_key=one[1:]) if one.startswith("+") else pb.Dependency(job_id=one)
        for one in references
    ]


class Hold:
    """A model that waits until it may answer, and remembers the order of its calls."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.order: list[str] = []

    async def __call__(self, request: Any, context: Any) -> Any:
        self.order.append(request.id)
        await self.may.wait()
        if request.id == "bad":
            await failing(context, S.INVALID_ARGUMENT, "wrong tensor")
        return await echo(request, context)


async def test_a_job_runs_after_those_that_it_depends_on(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = hold = Hold()
    key = uuid.uuid4().hex
    first = (await client.submit(request_id="1")).job
    second = (await client.submit(request_id="2", idempotency_key=key)).job
    last = (await client.submit(request_id="3", depends_on=after(first.id, f"+{key}"))).job
    assert last.transitions[0].reason == "submitted, waits for 2 jobs"
    assert list(last.depends_on) == after(first.id, f"+{key}")
    await until(lambda: len(hold.order) == 2, "two calls")

    async def is_by_id() -> bool:
        return list((await client.get(last.id)).waits_for) == after(first.id, second.id)

    await until(is_by_id, "the key was looked up")
    assert (await client.get(last.id)).state == pb.JOB_STATE_QUEUED
    hold.may.set()
    ended = await client.ended(last.id)
    assert ended.state == pb.JOB_STATE_SUCCEEDED
    assert not ended.waits_for
    assert sorted(hold.order[:2]) == ["1", "2"]
    assert hold.order[2:] == ["3"]
    assert ended.transitions[1].reason == "its 2 dependencies have succeeded"


async def test_what_has_succeeded_before_is_not_waited_for(client: Client, mesh: FakeMesh) -> None:
    first = await client.ended((await client.submit()).job.id)
    ended = await client.ended((await client.submit(depends_on=after(first.id))).job.id)
    assert ended.state == pb.JOB_STATE_SUCCEEDED


@pytest.mark.parametrize("fails", [False, True])
async def test_a_failure_spreads(client: Client, mesh: FakeMesh, fails: bool) -> None:
    mesh.infer.model = hold = Hold()
    choice = pb.ON_DEPENDENCY_FAILURE_FAIL if fails else pb.ON_DEPENDENCY_FAILURE_CANCEL
    bad = (await client.submit(request_id="bad")).job
    good = (await client.submit(request_id="good")).job
    child = (await client.submit(request_id="x", depends_on=after(good.id, bad.id), on_dependency_failure=choice)).job
    grandchild = (await client.submit(request_id="y", depends_on=after(child.id))).job
    hold.may.set()
    ended = await client.ended(child.id)
    assert ended.state == (pb.JOB_STATE_FAILED if fails else pb.JOB_STATE_CANCELLED)
    assert ended.transitions[-1].reason.endswith(f"it depends on job {bad.id}, which is failed: wrong tensor")
    assert ended.last_code == (Code.FAILED_PRECONDITION if fails else Code.CANCELLED)
    result = mesh.store.results[child.id]
    assert result.outcome == (store_pb2.Result.OUTCOME_FAILED if fails else store_pb2.Result.OUTCOME_CANCELLED)
    last = await client.ended(grandchild.id)
    assert last.state == pb.JOB_STATE_CANCELLED
    assert child.id in last.transitions[-1].reason
    assert not {"x", "y"} & {*hold.order}


async def test_a_requeue_of_both_runs_both(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = hold = Hold()
    hold.may.set()
    bad = (await client.submit(request_id="bad")).job
    choice = pb.ON_DEPENDENCY_FAILURE_FAIL
    child = (await client.submit(request_id="x", depends_on=after(bad.id), on_dependency_failure=choice)).job
    await client.ended(child.id)
    mesh.infer.model = echo
    for job_id in (bad.id, child.id):
        request = pb.RequeueDeadLettersRequest(ids=[job_id])
        assert list((await client.stub.RequeueDeadLetters(request, timeout=20)).ids) == [job_id]
    ended = await client.ended(child.id)
    assert (ended.state, ended.generation) == (pb.JOB_STATE_SUCCEEDED, 2)


@pytest.mark.parametrize("by_key", [False, True])
async def test_a_requeue_outlives_the_removal_of_what_had_succeeded(
    client: Client, mesh: FakeMesh, mongo_uri: str, shared_database: str, by_key: bool
) -> None:
    key = uuid.uuid4().hex
    good = (await client.submit(request_id="good", idempotency_key=f"{key} good")).job.id
    await client.ended(good)
    mesh.infer.model = hold = Hold()
    bad = (await client.submit(request_id="bad", idempotency_key=f"{key} bad")).job.id
    depends_on = after(f"+{key} good", f"+{key} bad") if by_key else after(good, bad)
    choice = pb.ON_DEPENDENCY_FAILURE_FAIL
    child = (await client.submit(request_id="x", depends_on=depends_on, on_dependency_failure=choice)).job.id
    hold.may.set()
    assert (await client.ended(child)).state == pb.JOB_STATE_FAILED
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:  # Retention keeps dead letters for longer.
        await mongo[shared_database][JOBS].delete_one({"_id": good})
    mesh.infer.model = echo
    for job_id in (bad, child):
        await client.stub.RequeueDeadLetters(pb.RequeueDeadLettersRequest(ids=[job_id]), timeout=20)
    ended = await client.ended(child)
    assert (ended.state, ended.generation) == (pb.JOB_STATE_SUCCEEDED, 2), ended.last_message


async def test_one_that_waits_is_cancelled_and_expires_like_any(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = hold = Hold()
    first = (await client.submit(request_id="1")).job
    waits = (await client.submit(depends_on=after(first.id))).job
    expires = (await client.submit(depends_on=after(first.id), deadline=Duration(nanos=300_000_000))).job
    answer = await client.stub.CancelJob(pb.CancelJobRequest(id=waits.id, reason="why"), timeout=20)
    assert answer.job.state == pb.JOB_STATE_CANCELLED
    assert (await client.ended(expires.id)).state == pb.JOB_STATE_EXPIRED
    hold.may.set()
    assert (await client.ended(first.id)).state == pb.JOB_STATE_SUCCEEDED


async def test_not_before_counts_beside_dependencies(client: Client, mesh: FakeMesh) -> None:
    first = await client.ended((await client.submit()).job.id)
    later = (await client.submit(depends_on=after(first.id), delay=Duration(seconds=3_600))).job

    async def is_released() -> bool:
        return not (await client.get(later.id)).waits_for

    await until(is_released, "its dependency has succeeded")
    job = await client.get(later.id)
    assert (job.state, job.not_before) == (pb.JOB_STATE_QUEUED, later.not_before)
    await client.stub.CancelJob(pb.CancelJobRequest(id=later.id), timeout=20)


async def test_what_is_not_there_cannot_be_depended_on(client: Client, mesh: FakeMesh) -> None:
    others = (await client.submit(tenant="other", idempotency_key=(key := uuid.uuid4().hex))).job
    for reference in (NOWHERE, others.id, f"+{key}", "+nope"):
        with pytest.raises(grpc.aio.AioRpcError, match="depends_on: this tenant has no job") as caught:
            await client.submit(depends_on=after(reference))
        assert caught.value.code() is S.NOT_FOUND


async def test_a_repeat_is_the_first_job_even_when_its_dependencies_are_gone(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = Hold()
    mesh.infer.model.may.set()
    bad = await client.ended((await client.submit(request_id="bad")).job.id)
    fields: dict[str, Any] = {"idempotency_key": uuid.uuid4().hex, "depends_on": after(bad.id)}
    first = await client.submit(**fields)
    await client.ended(first.job.id)
    await client.stub.PurgeDeadLetters(pb.PurgeDeadLettersRequest(ids=[bad.id]), timeout=20)
    again = await client.submit(**fields)
    assert (again.existed, again.job.id) == (True, first.job.id)
    with pytest.raises(grpc.aio.AioRpcError, match="was used for job"):
        await client.submit(**{**fields, "data": b"other"})


async def test_one_stream_brings_a_chain(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = hold = Hold()
    hold.may.set()
    tag = uuid.uuid4().hex

    async def requests() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n in range(100):
            depends_on = after(f"+{tag} {n - 1}") if n else []
            one = submit(request_id=f"{n}", idempotency_key=f"{tag} {n}", depends_on=depends_on)
            yield pb.SubmitStreamRequest(sequence=n, submit=one)
        # Not in a circle: what comes later is not there yet.
        yield pb.SubmitStreamRequest(
            sequence=100, submit=submit(idempotency_key=f"{tag} a", depends_on=after(f"+{tag} b"))
        )
        yield pb.SubmitStreamRequest(
            sequence=101, submit=submit(idempotency_key=f"{tag} b", depends_on=after(f"+{tag} a"))
        )

    answers = [answer async for answer in client.stub.SubmitStream(requests(), timeout=60)]
    assert [answer.code for answer in answers] == [0] * 100 + [Code.NOT_FOUND] * 2
    assert (await client.ended(answers[99].job_id, within_s=90)).state == pb.JOB_STATE_SUCCEEDED
    assert hold.order == [str(n) for n in range(100)]


async def chain(client: Client, n: int) -> list[str]:
    """Jobs each of which depends on the one before; the fifth of every other chain fails."""
    made: list[str] = []
    for at in range(LENGTH):
        request_id = "bad" if n % 2 and at == 4 else f"{n} {at}"
        fields: dict[str, Any] = {"depends_on": after(made[-1])} if made else {}
        made.append((await client.submit(request_id=request_id, tenant=f"{n}", **fields)).job.id)
    return made


async def kill_in_turn(ingests: list[IngestProcess], is_done: asyncio.Event, count: Any) -> None:
    for kill in range(by_form(3, 6)):
        before = count()
        await until(lambda seen=before: count() >= seen + 3 or is_done.is_set(), "3 more results")
        for victim in ingests if kill % 3 == 2 else [ingests[kill % 2]]:
            victim.kill()
            victim.start()


@pytest.mark.timeout(240)
async def test_no_kill_leaves_a_dependent_behind(
    own_mesh: FakeMesh, start_ingest: StartIngest, mongo_uri: str, mongo_database: str
) -> None:
    hold = Hold()
    hold.may.set()
    own_mesh.infer.model = hold
    ingests = [start_ingest(n, lease_ms=2_000, renew_ms=500) for n in range(2)]
    clients = [Client(ingest.address) for ingest in ingests]
    for ingest in ingests:
        await ingest.until_ready()
    chains = [await chain(clients[n % 2], n) for n in range(CHAINS)]
    is_done = asyncio.Event()
    killing = asyncio.create_task(kill_in_turn(ingests, is_done, lambda: len(own_mesh.store.results)))
    every = {job_id for made in chains for job_id in made}
    await until(lambda: every <= own_mesh.store.results.keys(), "every result", within_s=120)
    is_done.set()
    await killing
    for ingest in ingests:
        await ingest.until_ready()
    for n, made in enumerate(chains):
        jobs = [await clients[0].ended(job_id, within_s=60) for job_id in made]
        states = [pb.JobState.Name(job.state).removeprefix("JOB_STATE_") for job in jobs]
        good = LENGTH if n % 2 == 0 else 4
        assert states == ["SUCCEEDED"] * good + (["FAILED"] + ["CANCELLED"] * 3 if n % 2 else [])
        # None began before the one that it depends on had ended.
        for before, job in pairwise(jobs[:good]):
            began = next(step.at for step in job.transitions if step.state == pb.JOB_STATE_RUNNING)
            assert began.ToMilliseconds() >= before.transitions[-1].at.ToMilliseconds() - 1
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        left = {"$or": [{"waits_for": {"$exists": True}}, {"due_at": {"$gt": EPOCH}}, {"lease": {"$exists": True}}]}
        assert await mongo[mongo_database][JOBS].count_documents(left) == 0
    for client in clients:
        await client.channel.close()


async def test_the_questions_are_answered_by_indexes(mongo_uri: str, mongo_database: str) -> None:
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        jobs = mongo[mongo_database][JOBS]
        await jobs.create_indexes(list(INDEXES))
        await jobs.insert_many([{"_id": f"{n:04}", "state": "queued", "tenant": "", "key": f"{n}"} for n in range(500)])
        waits = {"waits_for": {"$exists": True}, "lease": {"$exists": False}}
        for query, index in (
            ({**waits, "waits_for": {"$in": ["a", "b"]}}, "dependents_of"),
            ({**waits, "waits_for": "a", "_id": {"$gt": ""}}, "dependents_of"),
            ({"waits_for": {"$gt": ""}}, "dependents_of"),
            ({"tenant": "", "key": {"$in": ["a"]}}, "idempotency"),
            ({**waits, "state": "queued", "_id": {"$gt": ""}}, "all_dependents"),
        ):
            cursor = jobs.find(query)
            if index == "all_dependents":
                cursor = cursor.sort("_id", 1).limit(500).hint(index)
            found = await cursor.explain()
            assert f"'indexName': '{index}'" in str(found["queryPlanner"]["winningPlan"])
            assert found["executionStats"]["totalDocsExamined"] == 0
