"""Dead letters through a real process: listed, looked into, requeued as a new generation, removed."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pymongo import AsyncMongoClient

from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.ingest.faults import Client, FakeMesh, echo, failing

S = grpc.StatusCode
ONCE = pb.RetryPolicy(max_attempts=1)
NOWHERE = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


class Mood:
    """A model that fails with `code` until it is mended."""

    def __init__(self, code: grpc.StatusCode = S.INTERNAL) -> None:
        self.code: grpc.StatusCode | None = code

    async def __call__(self, request: Any, context: Any) -> Any:
        if self.code is not None:
            await failing(context, self.code, "as the test wants it")
        return await echo(request, context)


async def dead(client: Client, **fields: Any) -> pb.Job:
    fields.setdefault("retry", ONCE)
    return await client.ended((await client.submit(**fields)).job.id)


async def listed(client: Client, size: int = 0, **among: Any) -> list[list[str]]:
    pages: list[list[str]] = []
    token = ""
    while True:
        request = pb.ListDeadLettersRequest(filter=pb.DeadLetterFilter(**among), page_size=size, page_token=token)
        answer = await client.stub.ListDeadLetters(request, timeout=20)
        pages.append([job.id for job in answer.jobs])
        token = answer.next_page_token
        if not token:
            return pages


async def requeue(client: Client, *ids: str, reason: str = "", **among: Any) -> pb.RequeueDeadLettersResponse:
    request = pb.RequeueDeadLettersRequest(ids=ids, reason=reason)
    if not ids:
        request.filter.CopyFrom(pb.DeadLetterFilter(**among))
    answer: pb.RequeueDeadLettersResponse = await client.stub.RequeueDeadLetters(request, timeout=20)
    return answer


async def purge(client: Client, *ids: str, limit: int = 0, **among: Any) -> pb.PurgeDeadLettersResponse:
    request = pb.PurgeDeadLettersRequest(ids=ids, limit=limit)
    if not ids:
        request.filter.CopyFrom(pb.DeadLetterFilter(**among))
    answer: pb.PurgeDeadLettersResponse = await client.stub.PurgeDeadLetters(request, timeout=20)
    return answer


async def refusal(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is S.INVALID_ARGUMENT
    return caught.value.details() or ""


async def test_a_requeued_job_runs_again_and_its_result_stands(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = mood = Mood()
    job = await dead(client, data=b"tensor", retry=pb.RetryPolicy(max_attempts=2, initial_backoff=Duration(nanos=1)))
    assert (job.state, job.attempts, job.generation) == (pb.JOB_STATE_DEAD, 2, 1)
    mood.code = None
    assert list((await requeue(client, job.id, reason="mended")).ids) == [job.id]
    again = await client.ended(job.id)
    assert (again.state, again.attempts, again.generation) == (pb.JOB_STATE_SUCCEEDED, 1, 2)
    steps = [(step.generation, step.state, step.attempt, step.reason) for step in again.transitions]
    assert steps[-4:] == [
        (1, pb.JOB_STATE_DEAD, 2, "as the test wants it"),
        (2, pb.JOB_STATE_QUEUED, 0, "requeued: mended"),
        (2, pb.JOB_STATE_RUNNING, 1, "claimed"),
        (2, pb.JOB_STATE_SUCCEEDED, 1, "answered"),
    ]
    result = mesh.store.results[job.id]
    assert (result.generation, result.outcome) == (2, store_pb2.Result.OUTCOME_SUCCEEDED)
    assert list(result.response.raw_output_contents) == [b"tensor"]


async def test_a_request_at_fault_may_be_requeued_too_and_fail_again(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = Mood(S.INVALID_ARGUMENT)
    job = await dead(client, data=b"x" * (2 << 20))  # Kept apart from its job.
    assert job.state == pb.JOB_STATE_FAILED
    for generation in (2, 3):
        await requeue(client, job.id)
        again = await client.ended(job.id)
        assert (again.state, again.generation) == (pb.JOB_STATE_FAILED, generation)
    assert mesh.store.results[job.id].generation == 3
    mesh.infer.model = echo
    await requeue(client, job.id)
    assert (await client.ended(job.id)).state == pb.JOB_STATE_SUCCEEDED


async def test_a_deadline_begins_anew(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = Mood()
    job = await dead(client, deadline=Duration(seconds=3_600))
    mesh.infer.model = echo
    await requeue(client, job.id)
    again = await client.ended(job.id)
    assert again.state == pb.JOB_STATE_SUCCEEDED
    requeued = next(step.at for step in again.transitions if step.generation == 2)
    assert again.deadline.ToMilliseconds() - requeued.ToMilliseconds() == 3_600_000


async def test_what_is_no_dead_letter_is_named_and_left_alone(client: Client, mesh: FakeMesh) -> None:
    done = await dead(client)
    assert done.state == pb.JOB_STATE_SUCCEEDED
    waiting = (await client.submit(delay=Duration(seconds=3_600))).job
    for answer in (
        await requeue(client, done.id, waiting.id, NOWHERE),
        await purge(client, done.id, waiting.id, NOWHERE),
    ):
        assert not answer.ids
        assert {one.id: one.code for one in answer.refused} == {
            done.id: Code.FAILED_PRECONDITION,
            waiting.id: Code.FAILED_PRECONDITION,
            NOWHERE: Code.NOT_FOUND,
        }
    assert (await client.get(done.id)) == done
    assert (await client.get(waiting.id)).state == pb.JOB_STATE_QUEUED


async def test_lists_are_narrowed_and_paged(client: Client, mesh: FakeMesh) -> None:
    tenant, model = uuid.uuid4().hex, uuid.uuid4().hex
    mesh.infer.model = mood = Mood()
    made = [(await dead(client, tenant=tenant, model=model if n % 2 else "echo")).id for n in range(5)]
    mood.code = S.UNAVAILABLE
    mesh.infer.model = mood
    last = await dead(client, tenant=tenant, retry=pb.RetryPolicy(max_attempts=1, retry_codes=[Code.UNAVAILABLE]))
    mood.code = S.INVALID_ARGUMENT
    failed = await dead(client, tenant=tenant)
    assert await listed(client, tenant=tenant) == [[last.id, *made[::-1]]]
    assert await listed(client, 4, tenant=tenant) == [[last.id, *made[:1:-1]], made[1::-1]]
    assert await listed(client, tenant=tenant, model_name=model) == [[made[3], made[1]]]
    assert await listed(client, tenant=tenant, code=Code.INTERNAL) == [made[::-1]]
    assert await listed(client, tenant=tenant, state=pb.JOB_STATE_FAILED) == [[failed.id]]
    assert await listed(client, 2, tenant=tenant, before=Timestamp(seconds=1)) == [[]]
    in_an_hour = Timestamp(seconds=last.updated_at.seconds + 3_600)
    assert await listed(client, 3, tenant=tenant, before=in_an_hour) == [[last.id, *made[:2:-1]], made[2::-1]]


async def test_a_filter_requeues_and_purges_many(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    mesh.infer.model = mood = Mood()
    jobs = await asyncio.gather(*(dead(client, tenant=tenant) for _ in range(30)))
    ids = sorted(job.id for job in jobs)
    some = await purge(client, tenant=tenant, limit=10)
    assert (list(some.ids), some.more) == (ids[:10], True)
    mood.code = None
    rest = await requeue(client, tenant=tenant)
    assert (list(rest.ids), rest.more) == (ids[10:], False)
    for job_id in ids[10:]:
        assert (await client.ended(job_id)).state == pb.JOB_STATE_SUCCEEDED
    assert await listed(client, tenant=tenant) == [[]]


async def test_jobs_that_die_again_are_not_requeued_twice_and_none_is_left(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    mesh.infer.model = Mood()
    jobs = await asyncio.gather(*(dead(client, tenant=tenant) for _ in range(9)))
    requeued: list[str] = []
    token = ""
    for page in range(3):
        request = pb.RequeueDeadLettersRequest(filter=pb.DeadLetterFilter(tenant=tenant), limit=4, page_token=token)
        answer = await client.stub.RequeueDeadLetters(request, timeout=20)
        requeued += answer.ids
        token = answer.next_page_token
        assert answer.more == bool(token) == (page < 2)
        # They die again before the next page, and so do new jobs.
        for job_id in answer.ids:
            assert (await client.ended(job_id)).generation == 2
        await dead(client, tenant=tenant)
    assert requeued == sorted(job.id for job in jobs)
    assert [(await client.get(job.id)).generation for job in jobs] == [2] * len(jobs)


async def test_pages_of_a_purge_are_of_letters_from_before_the_first(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    mesh.infer.model = Mood()
    ids = sorted([(await dead(client, tenant=tenant)).id for _ in range(3)])
    among = pb.DeadLetterFilter(tenant=tenant)
    first = await client.stub.PurgeDeadLetters(pb.PurgeDeadLettersRequest(filter=among, limit=2), timeout=20)
    late = await dead(client, tenant=tenant)
    request = pb.PurgeDeadLettersRequest(filter=among, limit=2, page_token=first.next_page_token)
    second = await client.stub.PurgeDeadLetters(request, timeout=20)
    assert ([*first.ids, *second.ids], second.next_page_token) == (ids, "")
    assert await listed(client, tenant=tenant) == [[late.id]]
    other = pb.PurgeDeadLettersRequest(filter=pb.DeadLetterFilter(tenant="other"), page_token=first.next_page_token)
    for wrong in (other, pb.PurgeDeadLettersRequest(filter=among, page_token="nonsense")):
        assert "page_token: not the next_page_token" in await refusal(client.stub.PurgeDeadLetters(wrong))
    by_id = pb.PurgeDeadLettersRequest(ids=[late.id], page_token=first.next_page_token)
    assert "page_token: only a filter has pages" in await refusal(client.stub.PurgeDeadLetters(by_id))


async def test_what_is_purged_is_gone_with_its_request(
    client: Client, mesh: FakeMesh, mongo_uri: str, shared_database: str
) -> None:
    mesh.infer.model = Mood()
    key = uuid.uuid4().hex
    job = await dead(client, data=b"x" * (2 << 20), idempotency_key=key)
    assert list((await purge(client, job.id)).ids) == [job.id]
    with pytest.raises(grpc.aio.AioRpcError, match="no job"):
        await client.get(job.id)
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        assert await mongo[shared_database]["payloads"].count_documents({"_id": job.id}) == 0
    assert job.id in mesh.store.results
    assert not (await client.submit(idempotency_key=key)).existed


async def test_many_requeue_one_letter_and_it_runs_once_more(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = mood = Mood()
    job = await dead(client, request_id=(name := uuid.uuid4().hex))
    mood.code = None
    answers = await asyncio.gather(*(requeue(client, job.id) for _ in range(20)))
    assert any(job.id in answer.ids for answer in answers)
    again = await client.ended(job.id)
    assert (again.state, again.generation) == (pb.JOB_STATE_SUCCEEDED, 2)
    assert mesh.infer.calls[name] == 2


@pytest.mark.parametrize("call", ["RequeueDeadLetters", "PurgeDeadLetters"])
async def test_what_makes_no_sense_is_refused(client: Client, call: str) -> None:
    message = getattr(pb, f"{call}Request")
    ask = getattr(client.stub, call)
    everything = pb.DeadLetterFilter()
    assert "give one of them" in await refusal(ask(message()))
    assert "give one of them" in await refusal(ask(message(ids=[NOWHERE], filter=everything)))
    assert "ids[1]: not a job's id: 'x'" in await refusal(ask(message(ids=[NOWHERE, "x"])))
    assert "ids: at most 1000, got 1001" in await refusal(ask(message(ids=[NOWHERE] * 1_001)))
    assert "limit: 1 to 1000" in await refusal(ask(message(filter=everything, limit=1_001)))
    running = pb.DeadLetterFilter(state=pb.JOB_STATE_RUNNING)
    assert "dead letters are dead or failed, not running" in await refusal(ask(message(filter=running)))
    assert "filter.code" in await refusal(ask(message(filter=pb.DeadLetterFilter(code=99))))
    assert "filter.before" in await refusal(ask(message(filter=pb.DeadLetterFilter(before=Timestamp(nanos=-1)))))


async def test_lists_refuse_what_makes_no_sense(client: Client) -> None:
    for wrong in (
        pb.ListDeadLettersRequest(page_size=1_001),
        pb.ListDeadLettersRequest(page_token="W10="),
        pb.ListDeadLettersRequest(filter=pb.DeadLetterFilter(state=pb.JOB_STATE_QUEUED)),
    ):
        await refusal(client.stub.ListDeadLetters(wrong))
    too_long = pb.RequeueDeadLettersRequest(ids=[NOWHERE], reason="r" * 1_001)
    assert "reason: at most 1000" in await refusal(client.stub.RequeueDeadLetters(too_long))
