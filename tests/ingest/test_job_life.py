"""A job's life, from submit to its one result, through a real process and a real MongoDB."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, Model, echo, failing, reached, submit

S = grpc.StatusCode
QUICK = pb.RetryPolicy(
    max_attempts=3, initial_backoff=Duration(nanos=1_000_000), max_backoff=Duration(nanos=10_000_000)
)
PATIENT = pb.RetryPolicy(max_attempts=3, initial_backoff=Duration(seconds=3_600), max_backoff=Duration(seconds=3_600))


def states(job: pb.Job) -> list[str]:
    return [pb.JobState.Name(step.state).removeprefix("JOB_STATE_") for step in job.transitions]


def fails(times: int, code: grpc.StatusCode, message: str = "as wanted", **trailing: str) -> Model:
    """A model that fails so many times, and then answers."""
    left = times

    async def model(request: Any, context: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            await failing(context, code, message, **trailing)
        return await echo(request, context)

    return model


async def test_a_job_runs_and_its_result_is_recorded(client: Client, mesh: FakeMesh) -> None:
    await reached(client)
    accepted = await client.submit(data=b"tensor", tenant="t", labels={"a.b": "$c"})
    assert accepted.job.state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)  # Adopted in the same write.
    assert not accepted.existed
    job = await client.ended(accepted.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    assert states(job) == ["QUEUED", "RUNNING", "SUCCEEDED"]
    assert all(step.instance == "local/ingest-0" for step in job.transitions)
    assert dict(job.labels) == {"a.b": "$c"}
    result = mesh.store.results[job.id]
    assert list(result.response.raw_output_contents) == [b"tensor"]
    assert result.instance == "local/infer-0"
    assert not result.response.parameters  # Only ingest had asked for an explanation.
    assert (result.tenant, result.attempt, result.model_version) == ("t", 1, "1")
    assert result.submitted_at == job.submitted_at
    assert dict(result.labels) == {"a.b": "$c"}
    assert mesh.infer.metadata[""]["x-envoy-max-retries"] == "0"


async def test_a_client_that_asks_is_told_who_answered(client: Client, mesh: FakeMesh) -> None:
    request = submit()
    request.request.parameters["explain"].bool_param = True
    accepted = await client.stub.Submit(request)
    await client.ended(accepted.job.id)
    result = mesh.store.results[accepted.job.id]
    assert result.response.parameters["replica"].string_param == "local/infer-0"


async def test_a_failure_that_may_pass_is_tried_again(client: Client, mesh: FakeMesh) -> None:
    await reached(client)
    mesh.infer.model = fails(2, S.INTERNAL, "broken")
    job = await client.ended((await client.submit(retry=QUICK)).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 3)
    assert (job.last_code, job.last_message) == (Code.INTERNAL, "broken")
    assert states(job) == ["QUEUED", "RUNNING", "QUEUED", "RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert job.transitions[2].reason == "INTERNAL: attempt 1 of 3 failed"
    assert mesh.store.results[job.id].attempt == 3


async def test_a_request_at_fault_fails_at_once(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = fails(9, S.INVALID_ARGUMENT, "input 'x': expected FP32, got INT8")
    job = await client.ended((await client.submit(retry=QUICK)).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_FAILED, 1)
    result = mesh.store.results[job.id]
    assert result.outcome == store_pb2.Result.OUTCOME_FAILED
    assert (result.code, result.message) == (Code.INVALID_ARGUMENT, "input 'x': expected FP32, got INT8")
    assert result.lease_id


async def test_out_of_attempts_is_dead_and_blocks_nobody(client: Client, mesh: FakeMesh) -> None:
    async def model(request: Any, context: Any) -> Any:
        if request.id == "poison":
            await failing(context, S.UNAVAILABLE, "Socket closed")
        return await echo(request, context)

    mesh.infer.model = model
    poison = await client.submit(request_id="poison", retry=QUICK)
    others = [await client.submit() for _ in range(20)]
    for other in others:
        assert (await client.ended(other.job.id)).state == pb.JOB_STATE_SUCCEEDED
    job = await client.ended(poison.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_DEAD, 3)
    assert mesh.infer.calls["poison"] == 3
    assert mesh.store.results[job.id].outcome == store_pb2.Result.OUTCOME_FAILED


async def test_a_job_names_the_codes_that_are_worth_a_retry(client: Client, mesh: FakeMesh) -> None:
    only = pb.RetryPolicy(
        max_attempts=3, initial_backoff=Duration(nanos=1_000_000), retry_codes=[Code.INVALID_ARGUMENT]
    )
    mesh.infer.model = fails(1, S.INVALID_ARGUMENT, "not yet")
    job = await client.ended((await client.submit(retry=only)).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 2)
    mesh.infer.model = fails(9, S.INVALID_ARGUMENT, "never")
    job = await client.ended((await client.submit(retry=only)).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_DEAD, 3)
    mesh.infer.model = fails(9, S.INTERNAL, "broken")
    job = await client.ended((await client.submit(retry=only)).job.id)
    assert (job.state, job.attempts, job.last_code) == (pb.JOB_STATE_FAILED, 1, Code.INTERNAL)


async def test_a_job_does_not_run_before_its_time(client: Client, mesh: FakeMesh) -> None:
    later = (await client.submit(request_id="later", delay=Duration(seconds=3_600))).job
    soon = (await client.submit(request_id="soon", delay=Duration(nanos=400_000_000))).job
    assert later.not_before.seconds - later.submitted_at.seconds in (3_599, 3_600)
    for other in [await client.submit() for _ in range(20)]:
        await client.ended(other.job.id)
    ended = await client.ended(soon.id)
    assert ended.state == pb.JOB_STATE_SUCCEEDED
    assert ended.transitions[1].at.ToMilliseconds() - soon.submitted_at.ToMilliseconds() >= 400
    assert (await client.get(later.id)).state == pb.JOB_STATE_QUEUED
    assert mesh.infer.calls["later"] == 0
    assert (await cancel(client, later.id)).state == pb.JOB_STATE_CANCELLED


@pytest.mark.parametrize("code", [S.UNAVAILABLE, S.UNIMPLEMENTED])
async def test_a_mesh_without_anybody_costs_no_attempt(client: Client, mesh: FakeMesh, code: grpc.StatusCode) -> None:
    await reached(client)
    mesh.infer.model = fails(4, code, "")
    job = await client.ended((await client.submit(retry=pb.RetryPolicy(max_attempts=1))).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    assert states(job).count("RUNNING") == 5


async def test_what_is_shed_comes_back_when_it_was_told_to(client: Client, mesh: FakeMesh) -> None:
    await reached(client)
    mesh.infer.model = fails(1, S.RESOURCE_EXHAUSTED, "queue full", retry_after_ms="300")
    job = await client.ended((await client.submit(retry=pb.RetryPolicy(max_attempts=1))).job.id)
    assert job.state == pb.JOB_STATE_SUCCEEDED
    failed, retried = job.transitions[2].at, job.transitions[3].at
    assert retried.ToMilliseconds() - failed.ToMilliseconds() >= 299


async def test_a_model_that_comes_late_is_waited_for(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = fails(1, S.NOT_FOUND, "no model 'echo'")
    job = await client.ended((await client.submit()).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 2)


async def test_an_attempt_has_an_end(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    async def hangs(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    own_mesh.infer.model = hangs
    ingest = start_ingest(attempt_timeout_ms=100)
    await ingest.until_ready()
    client = Client(ingest.address)
    job = await client.ended((await client.submit(retry=QUICK)).job.id)
    assert (job.state, job.attempts, job.last_code) == (pb.JOB_STATE_DEAD, 3, Code.DEADLINE_EXCEEDED)

    async def thinks(request: Any, context: Any) -> Any:
        await asyncio.sleep(0.3)
        return await echo(request, context)

    own_mesh.infer.model = thinks
    patient = pb.RetryPolicy(max_attempts=1, attempt_timeout=Duration(seconds=60))
    job = await client.ended((await client.submit(retry=patient)).job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    await client.channel.close()


async def test_a_deadline_ends_a_running_job(client: Client, mesh: FakeMesh) -> None:
    given_up = asyncio.Event()

    async def hangs(request: Any, context: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    await reached(client)
    mesh.infer.model = hangs
    # A busy machine takes a while until the job runs.
    job = await client.ended((await client.submit(deadline=Duration(seconds=3))).job.id)
    assert job.state == pb.JOB_STATE_EXPIRED
    assert mesh.store.results[job.id].outcome == store_pb2.Result.OUTCOME_EXPIRED
    await asyncio.wait_for(given_up.wait(), 60)


async def test_a_deadline_ends_a_job_that_waits_for_its_next_attempt(client: Client, mesh: FakeMesh) -> None:
    await reached(client)
    mesh.infer.model = fails(9, S.INTERNAL, "broken")
    accepted = await client.submit(retry=PATIENT, deadline=Duration(seconds=3))
    job = await client.ended(accepted.job.id)
    assert (job.state, job.attempts) == (pb.JOB_STATE_EXPIRED, 1)
    assert job.last_message.endswith("last attempt: INTERNAL: broken")
    assert mesh.store.results[job.id].code == Code.DEADLINE_EXCEEDED


async def cancel(client: Client, job_id: str, reason: str = "") -> pb.Job:
    response = await client.stub.CancelJob(pb.CancelJobRequest(id=job_id, reason=reason), timeout=20)
    job: pb.Job = response.job
    return job


async def test_cancelling_a_waiting_job(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.model = fails(9, S.INTERNAL)
    accepted = await client.submit(retry=PATIENT)

    async def waits() -> bool:
        return (await client.get(accepted.job.id)).HasField("not_before")

    await until(waits, "backoff")
    job = await cancel(client, accepted.job.id, "$not wanted")
    assert job.state == pb.JOB_STATE_CANCELLED
    assert job.transitions[-1].reason == "cancelled: $not wanted"
    assert mesh.store.results[job.id].outcome == store_pb2.Result.OUTCOME_CANCELLED
    assert await cancel(client, accepted.job.id, "again") == job


async def test_cancelling_a_running_job_gives_up_its_call(client: Client, mesh: FakeMesh) -> None:
    runs, given_up = asyncio.Event(), asyncio.Event()

    async def hangs(request: Any, context: Any) -> Any:
        runs.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    mesh.infer.model = hangs
    accepted = await client.submit()
    await asyncio.wait_for(runs.wait(), 60)
    job = await cancel(client, accepted.job.id)
    assert (job.state, states(job)[-1]) == (pb.JOB_STATE_CANCELLED, "CANCELLED")
    await asyncio.wait_for(given_up.wait(), 60)
    assert len(mesh.store.puts[job.id]) == 1


async def test_cancelling_after_the_answer_was_recorded_changes_nothing(client: Client, mesh: FakeMesh) -> None:
    recorded, may_answer = asyncio.Event(), asyncio.Event()

    async def records_and_waits(request: store_pb2.PutResultsRequest, context: Any) -> None:
        for result in request.results:
            mesh.store.results.setdefault(result.job_id, result)
        if not recorded.is_set():
            recorded.set()
            await may_answer.wait()

    mesh.store.before = records_and_waits
    accepted = await client.submit()
    await asyncio.wait_for(recorded.wait(), 60)
    cancelling = asyncio.create_task(cancel(client, accepted.job.id))
    may_answer.set()
    assert (await cancelling).state == pb.JOB_STATE_SUCCEEDED
    assert mesh.store.results[accepted.job.id].outcome == store_pb2.Result.OUTCOME_SUCCEEDED


async def test_another_instance_cancels_a_running_job(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    runs, given_up = asyncio.Event(), asyncio.Event()

    async def hangs(request: Any, context: Any) -> Any:
        runs.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    own_mesh.infer.model = hangs
    first, second = start_ingest(0, poll_ms=60_000), start_ingest(1, poll_ms=60_000)
    await first.until_ready()
    await second.until_ready()
    one, other = Client(first.address), Client(second.address)
    accepted = await one.submit()
    await asyncio.wait_for(runs.wait(), 60)
    job = await cancel(other, accepted.job.id)
    assert job.state == pb.JOB_STATE_CANCELLED
    assert job.transitions[-1].instance == "local/ingest-1"
    await asyncio.wait_for(given_up.wait(), 60)
    assert (await one.get(accepted.job.id)).state == pb.JOB_STATE_CANCELLED
    for client in (one, other):
        await client.channel.close()


async def test_the_trace_of_the_submitter_goes_on(client: Client, mesh: FakeMesh) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
    response = await client.stub.Submit(submit(request_id="traced"), metadata=metadata)
    await client.ended(response.job.id)
    assert mesh.infer.metadata["traced"]["traceparent"].split("-")[1] == trace


async def test_an_answer_that_the_store_refuses_ends_as_failed_and_spares_the_others(
    client: Client, mesh: FakeMesh
) -> None:
    async def picky(request: store_pb2.PutResultsRequest, context: Any) -> None:
        if any(result.response.id == "bad" for result in request.results):
            await failing(context, S.INVALID_ARGUMENT, "results[0].response: too large")

    mesh.store.before = picky
    ids = ["bad" if n == 7 else f"good {n}" for n in range(20)]
    accepted = await asyncio.gather(*(client.submit(request_id=request_id) for request_id in ids))
    jobs = [await client.ended(answer.job.id) for answer in accepted]
    assert [job.state for job in jobs].count(pb.JOB_STATE_SUCCEEDED) == 19
    bad = jobs[7]
    assert bad.state == pb.JOB_STATE_FAILED
    assert "the store refuses the result" in mesh.store.results[bad.id].message


async def test_a_store_that_is_away_loses_no_answer(client: Client, mesh: FakeMesh) -> None:
    is_away = True

    async def away(request: store_pb2.PutResultsRequest, context: Any) -> None:
        if is_away:
            await failing(context, S.UNAVAILABLE, "no healthy upstream")

    mesh.store.before = away
    accepted = [await client.submit(request_id=f"held {n}") for n in range(10)]
    await until(lambda: all(mesh.infer.calls[f"held {n}"] for n in range(10)), "all called")
    assert (await client.get(accepted[0].job.id)).state == pb.JOB_STATE_RUNNING
    is_away = False
    for answer in accepted:
        assert (await client.ended(answer.job.id)).state == pb.JOB_STATE_SUCCEEDED
    assert {mesh.infer.calls[f"held {n}"] for n in range(10)} == {1}  # Held, not run again.
