"""What the mesh's and the services' words mean: did a model see the request, and does another attempt help?"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from mesh.rpc.client.channel import Channel
from mesh.rpc.client.failures import CallFailed
from services.ingest.dispatch.remote import (
    AttemptResponse,
    BulkEntry,
    GivenUpJobs,
    RemoteModel,
    RemoteResults,
    failure_of,
)
from services.ingest.job import End, Outcome
from shoal.errors import Code, Internal, Unavailable
from shoal.inference.v2 import inference_pb2
from shoal.store.v1 import store_pb2
from tests.ingest.faults import FakeMesh, echo, failing


def error(code: grpc.StatusCode, details: str | None, **trailing: str) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*((key.replace("_", "-"), value) for key, value in trailing.items()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details)


S = grpc.StatusCode
CONNECT = "upstream connect error or disconnect/reset before headers. reset reason: "


@pytest.mark.parametrize(
    ("failed", "is_reached"),
    [
        (error(S.UNAVAILABLE, "no healthy upstream"), False),
        (error(S.UNAVAILABLE, CONNECT + "remote connection failure, transport failure reason: refused"), False),
        (error(S.UNAVAILABLE, CONNECT + "connection failure"), False),
        (error(S.UNAVAILABLE, CONNECT + "overflow"), False),
        (CallFailed(S.UNAVAILABLE, "GOAWAY", is_unprocessed=True), False),
        (CallFailed(S.UNAVAILABLE, "lost unix:/a: Connection reset by peer"), True),
        (CallFailed(S.DEADLINE_EXCEEDED, "Deadline Exceeded", is_unprocessed=True), True),  # It has had its time.
        (error(S.UNAVAILABLE, ""), False),  # A route to a cluster that Envoy does not know.
        (error(S.UNIMPLEMENTED, ""), False),  # No route at all: Envoy's 404.
        (error(S.UNIMPLEMENTED, "Received http2 header with status: 404"), False),
        (error(S.RESOURCE_EXHAUSTED, "queue full", retry_after_ms="50"), False),
        (error(S.UNAVAILABLE, "loading", retry_after_ms="50"), False),
        # It may have run, and may be what killed the instance:
        (error(S.UNAVAILABLE, CONNECT + "connection termination"), True),
        (error(S.UNAVAILABLE, "upstream connect error or disconnect/reset before headers. retried and the latest "
               "reset reason: connection termination"), True),
        (error(S.UNAVAILABLE, "upstream connect error or disconnect/reset before headers. retried and the latest "
               "reset reason: remote connection failure"), True),
        (error(S.UNAVAILABLE, "Socket closed"), True),
        (error(S.RESOURCE_EXHAUSTED, "Sent message larger than max"), True),
        (error(S.UNIMPLEMENTED, "this model needs shared memory"), True),
        (error(S.INTERNAL, ""), True),
        (error(S.DEADLINE_EXCEEDED, "Deadline Exceeded"), True),
    ],
)  # fmt: skip
def test_whether_a_model_saw_it(failed: grpc.aio.AioRpcError, is_reached: bool) -> None:
    assert failure_of(failed).is_reached is is_reached


def test_retry_after_comes_along() -> None:
    failure = failure_of(error(S.RESOURCE_EXHAUSTED, "queue full", retry_after_ms="50"))
    assert (failure.code, failure.retry_after_ms) == (Code.RESOURCE_EXHAUSTED, 50)
    assert failure_of(error(S.RESOURCE_EXHAUSTED, "queue full", retry_after_ms="soon")).is_reached


@pytest.mark.parametrize(("tenant", "told"), [("ada", "ada"), ("", None), ("ädä", "?"), ("a\nb", "?")])
async def test_infer_is_told_whose_call_it_is(mesh: FakeMesh, tenant: str, told: str | None) -> None:
    request = inference_pb2.ModelInferRequest(model_name="echo", id=f"tenant {tenant!r}")
    async with Channel(mesh.address) as channel:
        answer = await RemoteModel(channel).infer(request.SerializeToString(), 30, tenant)
    assert isinstance(answer, inference_pb2.ModelInferResponse)
    assert mesh.infer.metadata[request.id].get("x-shoal-tenant") == told


async def test_a_job_that_was_given_up_before_its_bulk_began_disturbs_nobody(mesh: FakeMesh) -> None:
    given_up, is_told = GivenUpJobs(), asyncio.Event()
    given_up.add("its deadline had passed, so it is not in the call")
    given_up.add("job 2")

    async def once_it_is_told(request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        if request.id == "g1":
            await is_told.wait()
            return await echo(request, context)
        try:
            await asyncio.Event().wait()
        finally:
            is_told.set()

    mesh.infer.model = once_it_is_told
    entries = [BulkEntry(f"job {n}", inference_pb2.ModelInferRequest(id=f"g{n}").SerializeToString(), 30) for n in "12"]
    async with Channel(mesh.address) as channel:
        answers = [one async for some in RemoteModel(channel).infer_bulk("echo", entries, given_up) for one in some]
    assert isinstance(dict(answers)["job 1"], AttemptResponse)


async def test_the_store_says_what_stands(mesh: FakeMesh) -> None:
    async with Channel(mesh.address) as channel:
        results = RemoteResults(channel)
        first = store_pb2.Result(job_id="a", outcome=store_pb2.Result.OUTCOME_SUCCEEDED)
        second = store_pb2.Result(job_id="a", outcome=store_pb2.Result.OUTCOME_CANCELLED, code=1, message="x")
        other = store_pb2.Result(job_id="b", outcome=store_pb2.Result.OUTCOME_FAILED, code=3, message="y")
        assert await results.put([first], [""]) == [None]
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert await results.put([second, other], ["", parent]) == [
            End(Outcome.SUCCEEDED),
            None,
        ]
        standing = await results.recorded_ends([f"no-{n}" for n in range(150)] + ["a"])
        assert standing == {"a": End(Outcome.SUCCEEDED)}
        assert await results.recorded_ends(["b"]) == {"b": End(Outcome.FAILED, 3, "y")}


async def test_a_store_that_answers_nonsense_or_has_no_route(mesh: FakeMesh) -> None:
    async with Channel(mesh.address) as channel:
        results = RemoteResults(channel)
        assert await results.put([store_pb2.Result(job_id="a")], [""]) == [None]
        with pytest.raises(Internal, match="outcome 0"):
            await results.put([store_pb2.Result(job_id="a")], [""])

        async def no_route(request: object, context: object) -> None:
            await failing(context, S.UNIMPLEMENTED, "")

        mesh.store.before = no_route
        with pytest.raises(Unavailable, match="recording results: the mesh has no route to the store yet"):
            await results.put([store_pb2.Result(job_id="b")], [""])
