"""Jobs go to infer many at a time, and each fares as if it had gone alone."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from pymongo import AsyncMongoClient

from mesh.rpc.client.channel import Channel
from services.ingest.dispatch.remote import BulkEntry, GivenUpJobs, RemoteModel
from shoal.access.caller_header import JOB_RETRY_HEADER
from shoal.errors import Code
from shoal.inference.v2 import bulk_pb2, inference_pb2
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, failing, submit

S = grpc.StatusCode


async def accepted(client: Client, *submits: pb.SubmitRequest) -> list[str]:
    async def each() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n, one in enumerate(submits):
            yield pb.SubmitStreamRequest(sequence=n, submit=one)

    answers = [answer async for answer in client.stub.SubmitStream(each(), timeout=60)]
    assert all(answer.job_id for answer in answers)
    return [answer.job_id for answer in answers]


async def test_each_of_a_bulk_has_its_own_end(client: Client, mesh: FakeMesh) -> None:
    async def moody(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        if request.id.endswith("7"):
            await failing(context, S.INVALID_ARGUMENT, f"not {request.id}")
        if request.id.endswith("9") and mesh.infer.calls[request.id] == 1:
            await failing(context, S.INTERNAL, "once")
        return await echo(request, context)

    mesh.infer.model = moody
    retry = pb.RetryPolicy(max_attempts=2)
    ids = await accepted(
        client, *(submit(request_id=f"b{n}", data=b"%d" % n, retry=retry, tenant="t") for n in range(400))
    )
    for n, job_id in enumerate(ids):
        job = await client.ended(job_id)
        result = mesh.store.results[job_id]
        if n % 10 == 7:
            assert (job.state, job.last_code, job.last_message) == (pb.JOB_STATE_FAILED, 3, f"not b{n}")
        else:
            assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 2 if n % 10 == 9 else 1)
            assert list(result.response.raw_output_contents) == [b"%d" % n]
            assert (result.instance, result.model_version, result.attempt) == ("local/infer-0", "1", job.attempts)
            assert not result.response.parameters  # Nobody asked for an explanation.
    assert max(mesh.infer.bulks) > 1
    assert any(told.get("x-shoal-model") == "echo" for told in mesh.infer.metadata.values())


async def test_a_bulk_that_is_over_leaves_nothing_that_waits(mesh: FakeMesh) -> None:
    async with Channel(mesh.address) as channel:
        model, before = RemoteModel(channel), asyncio.all_tasks()
        request = inference_pb2.ModelInferRequest(model_name="echo").SerializeToString()
        for _ in range(5):
            entries = [BulkEntry(str(n), request, 20.0) for n in range(3)]
            answers = [one async for some in model.infer_bulk("echo", entries, GivenUpJobs()) for one in some]
            assert sorted(job_id for job_id, _ in answers) == ["0", "1", "2"]
        names = [task for task in asyncio.all_tasks() - before if "request_iterator" in repr(task)]
        await until(lambda: all(task.done() for task in names), "nobody waits for what may be given up")


async def test_an_infer_without_a_bulk_door_is_called_job_by_job(client: Client, mesh: FakeMesh) -> None:
    mesh.infer.has_bulks = False
    ids = await accepted(client, *(submit(request_id=f"w{n}") for n in range(100)))
    for job_id in ids:
        assert (await client.ended(job_id)).state == pb.JOB_STATE_SUCCEEDED
    assert {mesh.infer.calls[f"w{n}"] for n in range(100)} == {1}
    assert mesh.infer.bulks == []


@pytest.fixture
async def own(own_mesh: FakeMesh, start_ingest: StartIngest) -> AsyncIterator[tuple[Client, IngestProcess]]:
    """An instance of the test's own: others would wait for its slow models."""
    process = start_ingest()
    await process.until_ready()
    client = Client(process.address)
    yield client, process
    await client.channel.close()


async def test_a_cancelled_job_leaves_its_bulk_and_the_others_stay(
    own: tuple[Client, IngestProcess], own_mesh: FakeMesh
) -> None:
    client, _ = own
    may, gone = asyncio.Event(), list[str]()

    async def slow(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        try:
            await may.wait()
        except asyncio.CancelledError:
            gone.append(request.id)
            raise
        return await echo(request, context)

    own_mesh.infer.model = slow
    first = (await client.submit(request_id="first")).job.id
    await until(lambda: own_mesh.infer.calls["first"] == 1)
    ids = await accepted(client, *(submit(request_id=f"c{n}") for n in range(30)))
    await until(lambda: all(own_mesh.infer.calls[f"c{n}"] for n in range(30)), "all are in calls")
    assert max(own_mesh.infer.bulks) > 1
    cancelled = await client.stub.CancelJob(pb.CancelJobRequest(id=ids[7], reason="test"), timeout=20)
    assert cancelled.job.state == pb.JOB_STATE_CANCELLED
    await until(lambda: gone == ["c7"], "its entry is given up, and no other")
    may.set()
    for n, job_id in enumerate([*ids, first]):
        expected = pb.JOB_STATE_CANCELLED if n == 7 else pb.JOB_STATE_SUCCEEDED
        assert (await client.ended(job_id)).state == expected
    assert gone == ["c7"]


async def test_a_model_that_is_slow_leaves_room_for_others(
    own: tuple[Client, IngestProcess], own_mesh: FakeMesh
) -> None:
    client, _ = own
    may = asyncio.Event()

    async def by_name(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        if request.model_name.startswith("slow"):
            await may.wait()
        return await echo(request, context)

    own_mesh.infer.model = by_name
    slow = await accepted(client, *(submit(model=f"slow {n % 3}", request_id="s") for n in range(3_000)))
    await until(lambda: own_mesh.infer.calls["s"] >= 90, "the slow ones have what they get")
    quick = await accepted(client, *(submit(request_id="q") for _ in range(200)))
    await until(lambda: own_mesh.store.results.keys() >= set(quick), "the quick ones ended")
    assert not own_mesh.store.results.keys() & set(slow)
    may.set()
    await until(lambda: own_mesh.store.results.keys() >= set(slow), "the slow ones ended", within_s=60)


async def test_when_an_instance_dies_its_jobs_come_back_alone_and_say_so(
    own: tuple[Client, IngestProcess], own_mesh: FakeMesh, mongo_uri: str, mongo_database: str
) -> None:
    client, _ = own
    seen: list[list[bool]] = []

    async def dying(first: bulk_pb2.InferBulkRequest, context: Any) -> None:
        seen.append([entry.is_retry for entry in first.entries])
        if len(first.entries) > 1:
            await failing(context, S.UNAVAILABLE, "upstream reset: connection termination")

    own_mesh.infer.before_bulk = dying
    first = await accepted(client, *(submit(request_id=f"d{n}") for n in range(50)))
    for job_id in first:
        job = await client.ended(job_id)
        assert job.state == pb.JOB_STATE_SUCCEEDED
        assert job.attempts <= 2
    many = [entries for entries in seen if len(entries) > 1]
    assert many
    assert not any(is_retry for entries in many for is_retry in entries)
    alone = [name for name, told in own_mesh.infer.metadata.items() if told.get(JOB_RETRY_HEADER) == "1"]
    assert len(alone) == sum(map(len, many))
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        counted = await mongo[mongo_database]["jobs"].count_documents({"last_code": int(Code.UNAVAILABLE)})
    assert counted == len(alone)


@pytest.mark.parametrize("size", [1, 300 << 10], ids=["small", "stored-apart"])
async def test_a_job_that_may_have_killed_an_instance_is_checked_in_all_later_attempts(
    client: Client, mesh: FakeMesh, size: int
) -> None:
    seen: list[bool] = []

    async def deadly(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        seen.append(dict(context.invocation_metadata()).get(JOB_RETRY_HEADER) == "1")
        if len(seen) in (1, 3):
            await failing(context, S.UNAVAILABLE, "upstream reset: connection termination")
        if len(seen) in (2, 4):
            await failing(context, S.RESOURCE_EXHAUSTED, "the queue is full", retry_after_ms="1")
        return await echo(request, context)

    mesh.infer.model = deadly
    retry = pb.RetryPolicy(max_attempts=5)
    ended = await client.ended((await client.submit(data=bytes(size), retry=retry)).job.id)
    assert (ended.state, ended.attempts) == (pb.JOB_STATE_SUCCEEDED, 3)
    assert seen == [False, True, True, True, True]


async def test_jobs_that_have_failed_otherwise_are_checked_in_all_later_attempts(
    client: Client, mesh: FakeMesh
) -> None:
    seen: defaultdict[str, list[bool]] = defaultdict(list)

    async def note(first: bulk_pb2.InferBulkRequest, context: Any) -> None:
        for entry in first.entries:
            seen[inference_pb2.ModelInferRequest.FromString(entry.request).id].append(entry.is_retry)

    async def once(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        if len(seen[request.id]) < mesh.infer.calls[request.id]:
            seen[request.id].append(dict(context.invocation_metadata()).get(JOB_RETRY_HEADER) == "1")
        if mesh.infer.calls[request.id] < 3:
            await failing(context, S.INTERNAL, "not yet")
        return await echo(request, context)

    mesh.infer.before_bulk, mesh.infer.model = note, once
    retry = pb.RetryPolicy(max_attempts=3)
    ids = await accepted(client, *(submit(request_id=f"f{n}", retry=retry) for n in range(50)))
    for job_id in ids:
        assert (await client.ended(job_id)).state == pb.JOB_STATE_SUCCEEDED
    assert max(mesh.infer.bulks) > 1
    assert seen == {f"f{n}": [False, True, True] for n in range(50)}


async def test_a_job_is_claimed_in_the_write_that_makes_it_durable_where_there_is_room(
    start_ingest: StartIngest, own_mesh: FakeMesh
) -> None:
    process = start_ingest(max_in_flight=1)  # Four are held, and of those two claimed at a time.
    await process.until_ready()
    client, may = Client(process.address), asyncio.Event()

    async def slow(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        await may.wait()
        return await echo(request, context)

    first = await client.submit()
    assert (first.job.state, first.job.attempts) == (pb.JOB_STATE_RUNNING, 1)
    assert [step.reason for step in first.job.transitions] == ["submitted", "claimed"]
    ended = await client.ended(first.job.id)
    assert [step.state for step in ended.transitions] == [1, 2, 3]
    own_mesh.infer.model = slow
    held = await client.submit(request_id="held")
    await until(lambda: own_mesh.infer.calls["held"] == 1)
    others = [await client.submit() for _ in range(6)]
    assert others[-1].job.state == pb.JOB_STATE_QUEUED
    may.set()
    for other in (held, *others):
        job = await client.ended(other.job.id)
        assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
    await client.channel.close()
