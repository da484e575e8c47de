"""RunStream: two answers for each job, in-band refusals, and streams that are taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest

from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, failing, submit

pytestmark = pytest.mark.mongo
UNKNOWN = "01JD8Y3V5M2Q4R6T8W0X2Z4B6D"


def one(sequence: int, stream: str = "", **fields: Any) -> pb.RunStreamRequest:
    """A job of a stream."""
    request = submit(request_id=f"{sequence}", data=f"{sequence}".encode(), **fields)
    return pb.RunStreamRequest(sequence=sequence, stream=stream, submit=request)


async def run(client: Client, requests: Iterable[pb.RunStreamRequest]) -> list[pb.RunStreamResponse]:
    """All answers to a stream of these, which the client ends at once."""
    return [answer async for answer in client.stub.RunStream(iter(requests), timeout=60)]


async def test_each_job_is_answered_when_it_is_durable_and_when_it_has_ended(client: Client) -> None:
    answers = await run(client, [one(n) for n in range(20)])
    assert len(answers) == 40
    for n in range(20):
        durable, ended = (answer for answer in answers if answer.sequence == n)
        assert durable.state == pb.JOB_STATE_QUEUED
        assert durable.job_id == ended.job_id
        assert ended.state == pb.JOB_STATE_SUCCEEDED
        assert ended.response.raw_output_contents[0] == f"{n}".encode()
        assert not durable.HasField("response")


async def test_messages_of_several_are_answered_in_messages_of_several(client: Client) -> None:
    several = pb.RunStreamRequest(requests=[one(n) for n in range(300)])
    several.requests[7].submit.request.model_name = ""
    messages = await run(client, [several, one(300), pb.RunStreamRequest(requests=[one(301)])])
    assert [message.most_requests for message in messages] == [1_000] + [0] * (len(messages) - 1)
    answers = [answer for message in messages for answer in message.answers or [message]]
    assert len(messages) < len(answers) * 3 / 4  # At worst each job ends by itself.
    states: dict[int, list[pb.JobState]] = {}
    for answer in answers:
        states.setdefault(answer.sequence, []).append(answer.state)
    assert states.pop(7) == [pb.JOB_STATE_UNSPECIFIED]
    assert states.keys() == set(range(302)) - {7}
    assert all(each == [pb.JOB_STATE_QUEUED, pb.JOB_STATE_SUCCEEDED] for each in states.values())
    assert [message.sequence for message in messages if not message.answers] == [300, 300]
    outputs = {a.sequence: a.response.raw_output_contents[0] for a in answers if a.HasField("response")}
    assert all(output == f"{n}".encode() for n, output in outputs.items())


async def test_large_answers_share_no_message(client: Client) -> None:
    def large(n: int) -> pb.RunStreamRequest:
        return pb.RunStreamRequest(sequence=n, submit=submit(data=bytes(700_000)))

    messages = await run(client, [pb.RunStreamRequest(requests=[large(n), large(n + 1)]) for n in range(0, 10, 2)])
    ended = [sum(answer.HasField("response") for answer in message.answers) for message in messages]
    assert (sum(ended), max(ended)) == (10, 1)


async def test_a_message_of_too_many_ends_the_stream(client: Client) -> None:
    call = client.stub.RunStream(iter([pb.RunStreamRequest(requests=[one(1)] * 1_001)]), timeout=60)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details() == "requests: at most 1000 in one message, got 1001"


async def test_a_model_that_refuses_is_told_in_band(client: Client, mesh: FakeMesh) -> None:
    async def picky(request: Any, context: Any) -> Any:
        if request.id == "1":
            await failing(context, grpc.StatusCode.INVALID_ARGUMENT, "no such input")
        return await echo(request, context)

    mesh.infer.model = picky
    answers = [each for each in await run(client, [one(n) for n in range(3)]) if each.state != pb.JOB_STATE_QUEUED]
    by_sequence = {each.sequence: each for each in answers}
    assert by_sequence[1].state == pb.JOB_STATE_FAILED
    assert (by_sequence[1].code, by_sequence[1].message) == (Code.INVALID_ARGUMENT, "no such input")
    assert {by_sequence[0].state, by_sequence[2].state} == {pb.JOB_STATE_SUCCEEDED}


async def test_the_state_of_a_job_that_names_its_own_codes_is_that_of_the_job(client: Client, mesh: FakeMesh) -> None:
    async def refuses(request: Any, context: Any) -> Any:
        await failing(context, getattr(grpc.StatusCode, request.raw_input_contents[0].decode()))

    mesh.infer.model = refuses
    own = pb.RetryPolicy(max_attempts=2, retry_codes=[Code.INVALID_ARGUMENT])
    codes = ["INVALID_ARGUMENT", "INTERNAL"]
    requests = [
        pb.RunStreamRequest(sequence=n, submit=submit(data=code.encode(), retry=own)) for n, code in enumerate(codes)
    ]
    answers = await run(client, requests)
    ended = {each.sequence: each for each in answers if each.state != pb.JOB_STATE_QUEUED}
    assert [ended[n].state for n in range(2)] == [pb.JOB_STATE_DEAD, pb.JOB_STATE_FAILED]
    again = await run(client, [pb.RunStreamRequest(sequence=n, job_id=ended[n].job_id) for n in range(2)])
    assert {each.sequence: each.state for each in again} == {n: ended[n].state for n in range(2)}
    for each in ended.values():
        assert (await client.get(each.job_id)).state == each.state


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.RunStreamRequest(sequence=7), "submit or job_id"),
        (pb.RunStreamRequest(sequence=7, submit=pb.SubmitRequest()), "request: required"),
        (pb.RunStreamRequest(sequence=7, job_id="nonsense"), "'nonsense' is no job id"),
        (pb.RunStreamRequest(sequence=7, job_id=""), "is no job id"),
        (one(7, stream="s" * 65), "stream: at most 64 characters, got 65"),
        (one(7, tenant="t" * 65), "tenant: at most 64 characters"),
        (one(7, idempotency_key="schedule:s"), "idempotency_key: 'schedule:s' is reserved"),
        (pb.RunStreamRequest(sequence=7, requests=[one(1)]), "requests: not within requests"),
    ],
    ids=["nothing", "empty", "no-id", "empty-id", "long-name", "long-tenant", "reserved", "within"],
)
async def test_what_is_refused_is_answered_and_the_stream_goes_on(
    client: Client, request_: pb.RunStreamRequest, words: str
) -> None:
    several = await run(client, [pb.RunStreamRequest(requests=[request_, one(8)])])
    (again,) = [answer for message in several for answer in message.answers if answer.sequence == 7]
    assert (again.state, again.code, again.job_id) == (0, Code.INVALID_ARGUMENT, "")
    assert words in again.message
    if request_.requests:
        return  # By itself it is a message of several.
    answers = await run(client, [request_, one(8)])
    (refused,) = [answer for answer in answers if answer.sequence == 7]
    assert (refused.state, refused.code, refused.job_id) == (0, Code.INVALID_ARGUMENT, "")
    assert words in refused.message
    assert [answer.state for answer in answers if answer.sequence == 8] == [
        pb.JOB_STATE_QUEUED,
        pb.JOB_STATE_SUCCEEDED,
    ]


async def test_the_same_sequence_of_a_named_stream_is_the_same_job(client: Client) -> None:
    first = await run(client, [one(1, "mine"), one(2, "mine")])
    again = await run(client, [one(2, "mine"), one(1, "mine"), one(1, "other")])
    ids = {answer.sequence: answer.job_id for answer in first}
    assert {answer.job_id for answer in again if answer.existed} == set(ids.values())
    assert len({answer.job_id for answer in again}) == 3


async def test_a_job_of_an_earlier_stream_is_taken_up_by_its_id(client: Client) -> None:
    first = await run(client, [one(1)])
    (ended,) = await run(client, [pb.RunStreamRequest(sequence=5, job_id=first[0].job_id)])
    assert ended.sequence == 5
    assert ended.state == pb.JOB_STATE_SUCCEEDED
    assert ended.response == first[1].response


async def test_an_answer_that_is_damaged_is_an_error_in_band(client: Client, mesh: FakeMesh) -> None:
    first = await run(client, [one(1), one(2)])
    damaged, whole = ({each.sequence: each.job_id for each in first}[n] for n in (1, 2))
    mesh.store.results[damaged].ClearField("response")
    mesh.store.results[damaged].answer_lost = "blob responses/a0/a0c1: the response that lies there is damaged"
    taken_up = [pb.RunStreamRequest(sequence=n, job_id=job_id) for n, job_id in enumerate((damaged, whole))]
    answers = {each.sequence: each for each in await run(client, taken_up)}
    assert (answers[0].code, answers[0].HasField("response")) == (Code.DATA_LOSS, False)
    assert "damaged in the store: blob responses/a0/a0c1" in answers[0].message
    assert answers[1].state == pb.JOB_STATE_SUCCEEDED


async def test_a_job_that_is_not_there_has_no_result(client: Client) -> None:
    (answer,) = await run(client, [pb.RunStreamRequest(sequence=5, job_id=UNKNOWN)])
    assert (answer.state, answer.code, answer.job_id) == (0, Code.NOT_FOUND, UNKNOWN)
    assert answer.message == f"the store has no result (any more) of job {UNKNOWN}, which has ended or never was"


@pytest.mark.parametrize("beside", [one(1), pb.RunStreamRequest(job_id=UNKNOWN), pb.RunStreamRequest(stream="s")])
async def test_nothing_stands_beside_several_requests_in_a_message(client: Client, beside: pb.RunStreamRequest) -> None:
    message = pb.RunStreamRequest(requests=[one(2)])
    message.MergeFrom(beside)
    with pytest.raises(grpc.aio.AioRpcError, match="requests: not together with submit, job_id or stream") as refused:
        await run(client, [message])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_jobs_go_on_when_the_client_has_gone(client: Client, mesh: FakeMesh) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await go.wait()
        return await echo(request, context)

    mesh.infer.model = waits
    call = client.stub.RunStream(timeout=60)
    await call.write(one(3, "left"))
    durable = await call.read()
    call.cancel()
    go.set()
    assert (await client.ended(durable.job_id)).state == pb.JOB_STATE_SUCCEEDED


async def test_a_full_window_is_not_read_further_and_streams_beyond_the_limit_are_refused(
    start_ingest: StartIngest, own_mesh: FakeMesh
) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await go.wait()
        return await echo(request, context)

    own_mesh.infer.model = waits
    process = start_ingest(run_items=5, run_items_together=8, max_streams=2)
    await process.until_ready()
    client = Client(process.address)
    answers: list[list[pb.RunStreamResponse]] = [[], []]

    async def requests(first: int) -> AsyncIterator[pb.RunStreamRequest]:
        for n in range(first, first + 50):
            yield one(n)

    async def collect(which: int) -> None:
        async for answer in client.stub.RunStream(requests(100 * which), timeout=60):
            answers[which].append(answer)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(collect(0))
        await until(lambda: len(answers[0]) == 5, "a full window")
        tasks.create_task(collect(1))
        await until(lambda: len(answers[1]) == 5, "the other's")
        with pytest.raises(grpc.aio.AioRpcError, match="2 streams are open, which is the limit"):
            await client.stub.RunStream(timeout=60).read()  # (Who sends meanwhile may not hear the reason.)
        assert [len(each) for each in answers] == [5, 5]
        go.set()
    assert [len(each) for each in answers] == [100, 100]
    assert len(own_mesh.store.results) == 100
    await client.channel.close()


async def test_streams_share_a_bound_and_each_may_have_one_beyond_it(
    start_ingest: StartIngest, own_mesh: FakeMesh
) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await go.wait()
        return await echo(request, context)

    own_mesh.infer.model = waits
    process = start_ingest(run_items_together=4)
    await process.until_ready()
    client = Client(process.address)
    durable = [0, 0, 0]

    async def collect(which: int) -> None:
        async for answer in client.stub.RunStream(iter([one(100 * which + n) for n in range(20)]), timeout=60):
            durable[which] += answer.state == pb.JOB_STATE_QUEUED

    async with asyncio.TaskGroup() as tasks:
        for which in range(3):
            tasks.create_task(collect(which))
        await until(lambda: sum(durable) == 7 and all(durable), "four, and one of each")
        go.set()
    assert durable == [20, 20, 20]
    await client.channel.close()
