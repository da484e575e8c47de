"""Submitting through a real process: acknowledgement, idempotency, streams, refusals, hostile input."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from pymongo import AsyncMongoClient

from services.ingest.ulid import is_ulid
from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, failing, submit

S = grpc.StatusCode


@pytest.fixture
def key() -> str:
    """An idempotency key that no other test uses."""
    return uuid.uuid4().hex


def refused(call: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str]:
    return call.value.code(), call.value.details() or ""


async def stream(client: Client, *requests: pb.SubmitStreamRequest) -> list[pb.SubmitStreamResponse]:
    async def each() -> AsyncIterator[pb.SubmitStreamRequest]:
        for request in requests:
            yield request

    return [answer async for answer in client.stub.SubmitStream(each(), timeout=60)]


async def test_an_acknowledged_job_is_in_the_database(client: Client, mongo_uri: str, shared_database: str) -> None:
    accepted = await client.submit(model="nobody")
    assert is_ulid(accepted.job.id)
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        assert await mongo[shared_database]["jobs"].find_one({"_id": accepted.job.id})


async def test_a_key_finds_the_first_job(key: str, client: Client, mesh: FakeMesh) -> None:
    first = await client.submit(idempotency_key=key, tenant=key)
    again = await client.submit(idempotency_key=key, tenant=key)
    assert (again.existed, again.job.id) == (True, first.job.id)
    other = await client.submit(idempotency_key=key, tenant="another")
    assert other.job.id != first.job.id
    with pytest.raises(grpc.aio.AioRpcError) as call:
        await client.submit(idempotency_key=key, tenant=key, data=b"other")
    assert refused(call)[0] is S.ALREADY_EXISTS
    assert first.job.id in refused(call)[1]
    await client.ended(first.job.id)
    late = await client.submit(idempotency_key=key, tenant=key)
    assert (late.existed, late.job.state) == (True, pb.JOB_STATE_SUCCEEDED)


async def test_a_key_used_by_many_at_once_is_one_job(key: str, client: Client, mesh: FakeMesh) -> None:
    same = await asyncio.gather(*(client.submit(idempotency_key=key, request_id="one") for _ in range(50)))
    assert len({answer.job.id for answer in same}) == 1
    assert sum(not answer.existed for answer in same) == 1
    await client.ended(same[0].job.id)
    assert mesh.infer.calls["one"] == 1


async def test_a_stream_is_acknowledged_in_its_order(client: Client, mesh: FakeMesh) -> None:
    requests = [pb.SubmitStreamRequest(sequence=1_000 - n, submit=submit(request_id=f"stream {n}")) for n in range(300)]
    answers = await stream(client, *requests)
    assert [answer.sequence for answer in answers] == [request.sequence for request in requests]
    assert [answer.job_id for answer in answers] == sorted({answer.job_id for answer in answers})
    await until(lambda: {answer.job_id for answer in answers} <= mesh.store.results.keys(), "300 results")
    assert {mesh.infer.calls[f"stream {n}"] for n in range(300)} == {1}


async def test_a_stream_goes_on_after_a_refusal(key: str, client: Client) -> None:
    answers = await stream(
        client,
        pb.SubmitStreamRequest(sequence=1),
        pb.SubmitStreamRequest(sequence=2, submit=submit(model="")),
        pb.SubmitStreamRequest(sequence=3, submit=submit(idempotency_key=key)),
        pb.SubmitStreamRequest(sequence=4, submit=submit(idempotency_key=key)),
        pb.SubmitStreamRequest(sequence=5, submit=submit(idempotency_key=key, data=b"other")),
        pb.SubmitStreamRequest(sequence=6, submit=submit()),
        pb.SubmitStreamRequest(sequence=7, submit=submit(idempotency_key="schedule:nightly:2026-01-02T12:00:00Z")),
    )
    assert [answer.code for answer in answers] == [3, 3, 0, 0, Code.ALREADY_EXISTS, 0, 3]
    assert answers[0].message == "submit: required, and not set"
    assert answers[2].job_id == answers[3].job_id
    assert [answer.existed for answer in answers] == [False, False, False, True, False, False, False]
    assert answers[5].job_id


async def test_messages_of_several_jobs_are_acknowledged_in_messages_of_several(
    key: str, client: Client, mesh: FakeMesh
) -> None:
    def several(first: int, count: int) -> pb.SubmitStreamRequest:
        submits = [submit(request_id=f"{key} {n}") for n in range(first, first + count)]
        submits[count // 2].request.model_name = ""
        return pb.SubmitStreamRequest(sequence=first, submits=submits)

    one = pb.SubmitStreamRequest(sequence=200, submit=submit(request_id=f"{key} 200"))
    answers = await stream(client, several(0, 200), one, several(201, 1_000), several(1_201, 1))
    acks = [ack for answer in answers for ack in answer.acknowledgements or [answer]]
    assert [ack.sequence for ack in acks] == list(range(1_202))
    assert len(answers) < 400
    assert [answer.most_submits for answer in answers] == [1_000] + [0] * (len(answers) - 1)
    refused = {ack.sequence: (ack.code, ack.message) for ack in acks if not ack.job_id}
    assert refused.keys() == {100, 701, 1_201}
    assert set(refused.values()) == {(Code.INVALID_ARGUMENT, "request.model_name: required, and empty")}
    ran = [f"{key} {n}" for n in range(1_202) if n not in refused]
    await until(lambda: all(mesh.infer.calls[name] for name in ran), "all to run")
    assert {mesh.infer.calls[name] for name in ran} == {1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pb.SubmitStreamRequest(submits=[submit()] * 1_001), "submits: at most 1000 in one message, got 1001"),
        (pb.SubmitStreamRequest(submits=[submit()], submit=submit()), "submits: not together with submit"),
        (
            pb.SubmitStreamRequest(sequence=2**63 - 2, submits=[submit()] * 3),
            "sequence: 9223372036854775806 plus the number of jobs",
        ),
    ],
    ids=["too many", "both", "beyond 64 bits"],
)
async def test_a_message_that_is_none_ends_the_stream_after_its_acknowledgements(
    client: Client, bad: pb.SubmitStreamRequest, message: str
) -> None:
    first = pb.SubmitStreamRequest(sequence=1, submits=[submit()] * 10)
    call = client.stub.SubmitStream(iter([first, bad, first]), timeout=60)
    sequences: list[int] = []
    while len(sequences) < 10:
        sequences += [ack.sequence for ack in (await call.read()).acknowledgements if ack.job_id]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert refused(raised)[0] is S.INVALID_ARGUMENT
    assert refused(raised)[1].startswith(message)
    assert sequences == list(range(1, 11))


async def test_a_message_of_more_jobs_than_the_window_has_room_for(
    own_mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    ingest = start_ingest(stream_items=10, stream_bytes=1 << 20)
    await ingest.until_ready()
    client = Client(ingest.address)
    requests = [pb.SubmitStreamRequest(sequence=n, submits=[submit(data=b"x" * 10_000)] * 100) for n in (0, 100, 200)]
    answers = await stream(client, *requests)
    assert [ack.sequence for answer in answers for ack in answer.acknowledgements] == list(range(300))
    assert max(len(answer.acknowledgements) for answer in answers) <= 10
    await client.channel.close()


async def test_a_stream_that_is_not_read_is_not_read_ahead(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    ingest = start_ingest(stream_items=10, stream_bytes=3 << 20)
    await ingest.until_ready()
    client = Client(ingest.address)
    sent = 0

    async def endless() -> AsyncIterator[pb.SubmitStreamRequest]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield pb.SubmitStreamRequest(sequence=sent, submit=submit(data=b"x" * (1 << 20)))

    ingest.freeze()  # Nothing is acknowledged: HTTP/2's windows fill, and the producer is stopped.
    call = client.stub.SubmitStream(endless(), timeout=60)
    previous = -1
    while sent != previous:
        previous = sent
        await asyncio.sleep(0.2)
    assert sent < 50
    ingest.thaw()
    answers = [answer async for answer in call]
    assert [answer.sequence for answer in answers] == list(range(1, 101))
    assert not any(answer.code for answer in answers)
    await client.channel.close()


async def test_a_client_that_leaves_in_the_middle_of_a_stream(client: Client, mesh: FakeMesh) -> None:
    async def endless() -> AsyncIterator[pb.SubmitStreamRequest]:
        while True:
            yield pb.SubmitStreamRequest(submit=submit())

    call = client.stub.SubmitStream(endless())
    acknowledged = [(await call.read()).job_id for _ in range(20)]
    call.cancel()
    for job_id in acknowledged:
        assert (await client.ended(job_id)).state == pb.JOB_STATE_SUCCEEDED


async def test_a_full_backlog_refuses_and_says_when_to_come_back(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    async def nobody(request: object, context: object) -> Any:
        await failing(context, S.UNAVAILABLE, "no healthy upstream")

    own_mesh.infer.model = nobody
    ingest = start_ingest(max_backlog=10)
    await ingest.until_ready()
    client = Client(ingest.address)
    refusal: grpc.aio.AioRpcError | None = None
    for _ in range(200):
        try:
            await client.submit()
        except grpc.aio.AioRpcError as err:
            refusal = err
            break
    assert refusal is not None
    assert refusal.code() is S.RESOURCE_EXHAUSTED
    assert int(dict(refusal.trailing_metadata() or ())["retry-after-ms"]) > 0
    await client.submit(tenant="another")
    in_band = asyncio.create_task(stream(client, pb.SubmitStreamRequest(sequence=1, submit=submit())))

    async def admitted() -> bool:
        try:
            await client.submit()
        except grpc.aio.AioRpcError:
            return False
        return True

    own_mesh.infer.model = echo
    await until(admitted, "room in the backlog")
    [waited] = await in_band  # A stream's items are not refused at once: they wait for room.
    assert waited.job_id
    await client.channel.close()


async def test_a_large_payload_is_kept_apart_and_goes_when_it_is_done_with(
    key: str, client: Client, mesh: FakeMesh, mongo_uri: str, shared_database: str
) -> None:
    data = os.urandom(11 << 20)
    first = await client.submit(data=data, idempotency_key=key)
    again = await client.submit(data=data, idempotency_key=key)
    assert again.existed
    assert (await client.ended(first.job.id)).state == pb.JOB_STATE_SUCCEEDED
    assert mesh.store.results[first.job.id].response.raw_output_contents[0] == data
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        db = mongo[shared_database]

        async def is_dropped() -> bool:
            return not await db["payloads"].count_documents({"_id": first.job.id})

        await until(is_dropped, "payloads dropped")
        document = await db["jobs"].find_one({"_id": first.job.id})
        assert document is not None
        assert "request" not in document


async def raw(client: Client, method: str, body: bytes, streams: bool = False) -> grpc.StatusCode:
    path = f"/shoal.ingest.v1.IngestService/{method}"
    if not streams:
        call: Any = client.channel.unary_unary(path)(body, timeout=20)
    elif method == "SubmitStream":
        call = client.channel.stream_stream(path)(iter([body]), timeout=20)
    else:
        call = client.channel.unary_stream(path)(body, timeout=20)
    if streams:
        async for _ in call:
            pass
    else:
        try:
            await call
        except grpc.aio.AioRpcError as err:
            return err.code()
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize("method", ["Submit", "GetJob", "ListJobs", "CancelJob"])
async def test_bytes_that_are_no_message(client: Client, method: str) -> None:
    assert await raw(client, method, b"\xff\xff\xff\xff") is S.INVALID_ARGUMENT
    assert (await client.submit()).job.id


@pytest.mark.parametrize("method", ["SubmitStream", "WatchJob"])
async def test_bytes_that_are_no_message_on_a_stream(client: Client, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as call:
        await raw(client, method, b"\xff\xff\xff\xff", streams=True)
    assert call.value.code() is S.INVALID_ARGUMENT
    assert (await client.submit()).job.id


async def test_a_message_of_100_mb_is_refused_by_its_size(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as call:
        await client.submit(data=bytes(100_000_000))
    assert refused(call)[0] is S.INVALID_ARGUMENT
    assert "at most 12582912 bytes" in refused(call)[1]


async def test_of_two_with_one_key_on_a_stream_the_first_has_it(key: str, client: Client) -> None:
    """Two writes may be under way at a time: the second must not overtake the first."""
    for n in range(50):
        one, other = f"{key} {n}", b"other"
        answers = await stream(
            client,
            pb.SubmitStreamRequest(sequence=1, submit=submit(model="nobody", idempotency_key=one)),
            pb.SubmitStreamRequest(sequence=2, submit=submit(model="nobody", idempotency_key=one, data=other)),
        )
        assert [answer.code for answer in answers] == [0, Code.ALREADY_EXISTS]
