"""Get, list and watch, and what they refuse."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from services.ingest.job import State, Transition
from services.ingest.queries.watch import views_between
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.faults import Client, FakeMesh, echo, failing, reached
from tests.ingest.making import START, job

S = grpc.StatusCode
NOWHERE = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    answer = call.read() if hasattr(call, "read") else call
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize(
    ("job_id", "code"),
    [
        ("", S.INVALID_ARGUMENT),
        (NOWHERE, S.NOT_FOUND),
        ("nope", S.NOT_FOUND),
        ("x" * 1_000_000, S.NOT_FOUND),
        ("$where\x00", S.NOT_FOUND),
    ],
)
async def test_jobs_that_are_not_there(client: Client, job_id: str, code: grpc.StatusCode) -> None:
    assert (await refusal(client.stub.GetJob(pb.GetJobRequest(id=job_id))))[0] is code
    assert (await refusal(client.stub.CancelJob(pb.CancelJobRequest(id=job_id))))[0] is code
    assert (await refusal(client.stub.WatchJob(pb.WatchJobRequest(id=job_id))))[0] is code


async def test_a_reason_has_a_length(client: Client) -> None:
    answer = await refusal(client.stub.CancelJob(pb.CancelJobRequest(id=NOWHERE, reason="r" * 1_001)))
    assert answer == (S.INVALID_ARGUMENT, "reason: at most 1000 characters, got 1001")


async def pages(client: Client, size: int, **wanted: Any) -> list[list[str]]:
    found: list[list[str]] = []
    token = ""
    while True:
        request = pb.ListJobsRequest(page_size=size, page_token=token, **wanted)
        response = await client.stub.ListJobs(request, timeout=20)
        found.append([one.id for one in response.jobs])
        token = response.next_page_token
        if not token:
            return found


async def test_lists_are_newest_first_a_page_at_a_time(client: Client, mesh: FakeMesh) -> None:
    tenant, model = uuid.uuid4().hex, uuid.uuid4().hex
    made = [(await client.submit(tenant=tenant, model=model if n % 2 else "echo")).job.id for n in range(7)]
    for job_id in made:
        await client.ended(job_id)
    newest_first = made[::-1]
    assert await pages(client, 3, tenant=tenant) == [newest_first[:3], newest_first[3:6], newest_first[6:]]
    assert await pages(client, 7, tenant=tenant) == [newest_first]
    assert await pages(client, 0, model_name=model) == [newest_first[1::2]]
    assert await pages(client, 0, tenant=tenant, state=pb.JOB_STATE_SUCCEEDED) == [newest_first]
    assert await pages(client, 0, tenant=tenant, state=pb.JOB_STATE_DEAD) == [[]]
    assert (await pages(client, 1_000))[0][:7] == newest_first


async def test_lists_refuse_what_makes_no_sense(client: Client, mesh: FakeMesh) -> None:
    tenant = uuid.uuid4().hex
    for _ in range(3):
        await client.submit(tenant=tenant)
    page = await client.stub.ListJobs(pb.ListJobsRequest(tenant=tenant, page_size=1))
    for wrong in (
        pb.ListJobsRequest(page_size=-1),
        pb.ListJobsRequest(page_size=1_001),
        pb.ListJobsRequest(state=99),  # type: ignore[arg-type]
        pb.ListJobsRequest(page_token="ü"),
        pb.ListJobsRequest(page_token="AAAA"),
        pb.ListJobsRequest(page_token="W10="),
        pb.ListJobsRequest(page_token="[" * 1_000_000),
        pb.ListJobsRequest(tenant="another", page_token=page.next_page_token),
    ):
        assert (await refusal(client.stub.ListJobs(wrong)))[0] is S.INVALID_ARGUMENT


async def test_a_watcher_is_told_each_transition(client: Client, mesh: FakeMesh) -> None:
    async def fails_once(request: Any, context: Any) -> Any:
        if mesh.infer.calls[request.id] == 1:
            await failing(context, S.INTERNAL)
        return await echo(request, context)

    await reached(client)
    mesh.infer.model = fails_once
    accepted = await client.submit(
        request_id="watched", retry=pb.RetryPolicy(initial_backoff=Duration(nanos=300_000_000))
    )
    told = [answer.job async for answer in client.stub.WatchJob(pb.WatchJobRequest(id=accepted.job.id), timeout=30)]
    steps = [len(one.transitions) for one in told]
    assert steps == list(range(steps[0], 6))
    assert [one.state for one in told] == [one.transitions[-1].state for one in told]
    assert told[-1].state == pb.JOB_STATE_SUCCEEDED
    late = [answer async for answer in client.stub.WatchJob(pb.WatchJobRequest(id=accepted.job.id), timeout=30)]
    assert len(late) == 1


async def test_many_watch_one_job_and_some_leave(client: Client, mesh: FakeMesh) -> None:
    may = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await may.wait()
        return await echo(request, context)

    mesh.infer.model = waits
    accepted = await client.submit()
    watches = [client.stub.WatchJob(pb.WatchJobRequest(id=accepted.job.id), timeout=60) for _ in range(50)]
    for watch in watches:
        await watch.read()
    for watch in watches[::2]:
        watch.cancel()
    may.set()
    for watch in watches[1::2]:
        last = None
        async for answer in watch:
            last = answer.job
        assert last is not None
        assert last.state == pb.JOB_STATE_SUCCEEDED


def test_views_between_two_looks() -> None:
    first = job()
    steps = tuple(Transition(State.RUNNING, START, n, "i", f"{n}") for n in range(1, 4))
    later = replace(first, state=State.RUNNING, attempts=3, transitions=first.transitions + steps)
    views = views_between(first, later)
    assert [view.attempts for view in views] == [1, 2, 3]
    assert views[-1] is later
    assert views_between(later, later) == []
    many = tuple(Transition(State.RUNNING, START, n, "i", f"{n}") for n in range(300))
    flooded = replace(first, transitions=many)
    assert views_between(first, flooded) == [flooded]


async def test_a_request_is_kept_for_as_long_as_it_was_asked_for(client: Client, mesh: FakeMesh) -> None:
    large = b"x" * (2 << 20)  # Kept apart from its job.
    for value in (b"small", large):
        kept = await client.submit(data=value, keep_request=True)
        assert kept.job.keeps_request
        gone = await client.submit(data=value)
        for each in (kept, gone):
            await client.ended(each.job.id)
        answer = await client.stub.GetPayload(pb.GetPayloadRequest(id=kept.job.id), timeout=20)
        assert answer.request.raw_input_contents == [value]
        code, said = await refusal(client.stub.GetPayload(pb.GetPayloadRequest(id=gone.job.id)))
        assert code is S.FAILED_PRECONDITION
        assert "is succeeded, and its request is not kept" in said
    assert (await refusal(client.stub.GetPayload(pb.GetPayloadRequest(id=NOWHERE))))[0] is S.NOT_FOUND
    assert (await refusal(client.stub.GetPayload(pb.GetPayloadRequest())))[0] is S.INVALID_ARGUMENT
