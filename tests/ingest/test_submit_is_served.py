"""Submits of gRPC clients to a served instance: unary, refused, streamed, given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.faults import Client, FakeMesh, submit

S = grpc.StatusCode


@pytest.fixture
async def ingest(own_mesh: FakeMesh, start_ingest: StartIngest) -> IngestProcess:
    process = start_ingest()
    await process.until_ready()
    return process


async def test_submits_are_accepted_refused_and_streamed(ingest: IngestProcess, own_mesh: FakeMesh) -> None:
    client = Client(ingest.address)
    first = await client.submit(idempotency_key="one", labels={"a": "b"})
    again = await client.submit(idempotency_key="one", labels={"a": "b"})
    assert (first.existed, again.existed, again.job.id) == (False, True, first.job.id)
    assert dict(first.job.labels) == {"a": "b"}
    for call, code, words in (
        (client.submit(model=""), S.INVALID_ARGUMENT, "request.model_name: required"),
        (
            client.submit(idempotency_key="schedule:s:t"),
            S.INVALID_ARGUMENT,
            "idempotency_key: 'schedule:s:t' is reserved",
        ),
        (
            client.submit(idempotency_key="k", labels={"connector": "c", "source": "log/0/0"}),
            S.INVALID_ARGUMENT,
            "labels: 'connector' and 'source' together are reserved",
        ),
        (client.submit(idempotency_key="one", data=b"other"), S.ALREADY_EXISTS, first.job.id),
        (client.channel.unary_unary("/shoal.ingest.v1.IngestService/Submit")(b"\xff"), S.INVALID_ARGUMENT, "1 bytes"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=words) as refused:
            await call
        assert refused.value.code() is code

    async def each() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n in range(1_200):
            yield pb.SubmitStreamRequest(sequence=n, submit=submit(model="" if n == 7 else "echo"))

    answers = [answer async for answer in client.stub.SubmitStream(each(), timeout=60)]
    assert [answer.sequence for answer in answers] == list(range(1_200))
    assert [answer.sequence for answer in answers if answer.code] == [7]
    assert len({answer.job_id for answer in answers}) == 1_200
    assert (await client.ended(answers[-1].job_id)).state == pb.JOB_STATE_SUCCEEDED
    await client.channel.close()


async def test_a_submit_that_nobody_waits_for_harms_nobody(ingest: IngestProcess) -> None:
    client = Client(ingest.address)
    for timeout in (0.0001, 0.002, 0.01):
        calls = [asyncio.ensure_future(client.stub.Submit(submit(), timeout=timeout)) for _ in range(20)]
        await asyncio.gather(*calls, return_exceptions=True)
    assert (await client.ended((await client.submit()).job.id)).state == pb.JOB_STATE_SUCCEEDED
    assert "services/ingest" not in ingest.log.read_text()
    await client.channel.close()
