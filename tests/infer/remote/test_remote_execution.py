"""Calls of a remote model: together on their way there, apart when they come back, and each with its own fault."""

from __future__ import annotations

import asyncio
import math
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from shoal.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ShoalError,
    Unavailable,
    Unimplemented,
)
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conftest import Serving, floats, output, request
from tests.infer.remote import configs
from tests.infer.remote.scripted import Infer, Scripted, double, given, response

PATIENCE_S = 60


def row(value: float, rows: int = 1) -> np.ndarray:
    return np.full((rows, 4), value, np.float32)


class Gate:
    """Holds calls at the remote server until it is opened."""

    def __init__(self, then: Infer = double) -> None:
        self.is_open = asyncio.Event()
        self._then = then

    async def __call__(self, asked: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> pb.ModelInferResponse:
        await self.is_open.wait()
        return await self._then(asked, context)


def ask(near: Serving, value: float, rows: int = 1, deadline: float = math.inf) -> asyncio.Task[pb.ModelInferResponse]:
    return asyncio.create_task(near.core.infer(request("m", x=row(value, rows)), deadline))


async def held(near: Serving, remote: Scripted, *values: float, then: Infer = double) -> list:
    """Calls that the remote server gets as one batch, because it is busy with another one when they come."""
    gate = remote.infer = Gate()
    first = ask(near, 0)
    await remote.until(lambda: len(remote.seen) == 1)
    calls = [ask(near, value) for value in values]
    await waiting(near, len(values))
    remote.infer = then
    gate.is_open.set()
    await first
    return calls


async def waiting(near: Serving, calls: int) -> None:
    """Until so many are in the queue."""
    scheduler = near.models.find("m", "").scheduler
    while len(scheduler._queue) < calls:
        await asyncio.sleep(0)


async def test_rows_that_wait_together_travel_as_one_request(near: Serving, scripted: Scripted):
    calls = await held(near, scripted, 1, 2, 3)
    got = [output(await call, "y").tolist() for call in calls]
    assert got == [[[2 * value] * 4] for value in (1, 2, 3)]
    assert scripted.seen == [1, 3]


async def test_batches_end_where_the_remote_model_says(near: Serving, scripted: Scripted):
    assert near.models.find("m", "").loaded.model.config.max_batch_size == 8
    calls = await held(near, scripted, *range(10))
    await asyncio.gather(*calls)
    assert scripted.seen == [1, 8, 2]


async def refuses_negatives(asked: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> pb.ModelInferResponse:
    if (given(asked) < 0).any():
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x is below zero")
    return await double(asked, context)


async def test_only_the_bad_request_of_a_batch_gets_the_error(near: Serving, scripted: Scripted):
    calls = await held(near, scripted, 1, 2, -3, 4, then=refuses_negatives)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(outcomes[2], InvalidArgument)
    assert outcomes[2].message == "model 'm': the remote server says: x is below zero"
    assert [output(outcomes[n], "y")[0, 0] for n in (0, 1, 3)] == [2, 4, 8]
    assert near.models.find("m", "").statistics.bisections == 2


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED"])
async def test_a_remote_model_that_fails_is_internal(near: Serving, scripted: Scripted, code):
    async def fails(asked, context):
        await context.abort(grpc.StatusCode[code], "the model has a fault")

    scripted.infer = fails
    with pytest.raises(Internal, match=r"^Failed to process the request\(s\) for model 'm': the model has a fault$"):
        await ask(near, 1)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("UNAVAILABLE", Unavailable),
        ("RESOURCE_EXHAUSTED", ResourceExhausted),
        ("NOT_FOUND", Unavailable),
        ("CANCELLED", Unavailable),
        ("UNIMPLEMENTED", Unimplemented),
    ],
)
async def test_what_is_no_calls_fault_reaches_all_and_is_asked_once(near: Serving, scripted: Scripted, code, error):
    async def refuses(asked, context):
        context.set_trailing_metadata((("retry-after-ms", "750"),))
        await context.abort(grpc.StatusCode[code], "come back")

    calls = await held(near, scripted, 1, 2, 3, then=refuses)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [error] * 3
    assert all("come back" in outcome.message for outcome in outcomes)
    assert scripted.seen == [1, 3]
    if code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
        assert {outcome.retry_after_ms for outcome in outcomes} == {750}
    scripted.infer = double
    assert output(await ask(near, 5), "y")[0, 0] == 10


async def test_a_remote_server_that_does_not_say_when_to_come_back(near: Serving, scripted: Scripted):
    async def refuses(asked, context):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    scripted.infer = refuses
    with pytest.raises(ResourceExhausted) as caught:
        await ask(near, 1)
    assert caught.value.retry_after_ms == 1000


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (np.zeros((2, 4), np.float32), r"output 'y' has shape \[2,4\] for 1 rows"),
        (np.zeros((1, 3), np.float32), r"output 'y': expected \[-1,4\], got \[1,3\]"),
        (np.zeros((1, 4), np.int32), "output 'y': expected FP32, got 'INT32'"),
    ],
)
async def test_a_response_that_is_not_what_was_promised(near: Serving, scripted: Scripted, y, says):
    async def wrong(asked, context):
        return response(asked, y, "INT32" if y.dtype == np.int32 else "FP32")

    scripted.infer = wrong
    with pytest.raises(Internal, match=says):
        await ask(near, 1)
    scripted.infer = double
    assert output(await ask(near, 1), "y")[0, 0] == 2


async def test_a_response_that_is_short_of_bytes_or_of_its_output(near: Serving, scripted: Scripted):
    async def short(asked, context):
        made = response(asked, row(1))
        made.raw_output_contents[0] = b"abc"
        return made

    async def without(asked, context):
        return pb.ModelInferResponse()

    scripted.infer = short
    with pytest.raises(Internal, match="byte size mismatch"):
        await ask(near, 1)
    scripted.infer = without
    with pytest.raises(Internal, match="response has no output 'y': it has none"):
        await ask(near, 1)


async def test_typed_contents_are_read_too(near: Serving, scripted: Scripted):
    async def typed(asked, context):
        made = pb.ModelInferResponse()
        made.outputs.add(name="y", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1, 2, 3, 4])
        return made

    scripted.infer = typed
    assert output(await ask(near, 1), "y").tolist() == [[1, 2, 3, 4]]


async def test_the_latest_deadline_of_a_batch_travels(near: Serving, scripted: Scripted):
    left: list[float] = []

    async def noted(asked, context):
        left.append(context.time_remaining())
        return await double(asked, context)

    scripted.infer = noted
    now = asyncio.get_running_loop().time()
    await asyncio.gather(ask(near, 1, deadline=now + 20), ask(near, 2, deadline=now + 40))
    assert scripted.seen == [2]
    assert 20 < left[0] < 41  # gRPC rounds up.
    await ask(near, 1)
    assert 41 < left[1] < 61  # timeout_ms, when nobody says less.


async def test_timeout_ms_ends_a_call_that_takes_too_long(front, scripted: Scripted, tmp_path: Path):
    # Long enough for a busy machine to reach the remote server.
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}", timeout_ms="1000")
    near = await front(tmp_path / "models")
    scripted.infer = Gate()
    with pytest.raises(DeadlineExceeded, match="model 'm': the remote server did not respond in time"):
        await ask(near, 1)
    await scripted.until(lambda: scripted.ended == ["1"])


async def test_the_remote_call_ends_when_nobody_waits_any_more(near: Serving, scripted: Scripted):
    gate = Gate()
    calls = await held(near, scripted, 1, 2, then=gate)
    await scripted.until(lambda: scripted.seen == [1, 2])
    calls[0].cancel()
    await asyncio.gather(calls[0], return_exceptions=True)
    assert scripted.ended == []
    calls[1].cancel()
    await scripted.until(lambda: scripted.ended == ["1"])
    scripted.infer = double
    assert output(await ask(near, 5), "y")[0, 0] == 10


async def test_a_call_that_is_cancelled_at_once_frees_its_instance(near: Serving, scripted: Scripted):
    for _ in range(20):
        call = ask(near, 1)
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert output(await ask(near, 5), "y")[0, 0] == 10


async def test_a_call_whose_deadline_passes_ends_and_its_mate_goes_on(near: Serving, scripted: Scripted):
    gate = Gate()
    scripted.infer = gate
    hasty = near.stub.ModelInfer(request("m", x=row(1)), timeout=1)
    patient = near.stub.ModelInfer(request("m", x=row(2)), timeout=PATIENCE_S)
    with pytest.raises(grpc.RpcError) as caught:
        await hasty
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gate.is_open.set()
    assert output(await patient, "y")[0, 0] == 4


async def test_many_executions_take_no_thread_each(front, scripted: Scripted, tmp_path: Path):
    configs.put(
        tmp_path / "models", "m", "instance_group { count: 48 }\nmax_batch_size: 1", url=f"grpc://{scripted.address}"
    )
    near = await front(tmp_path / "models")
    await ask(near, 1)
    gate, before = Gate(), threading.active_count()
    scripted.infer = gate
    calls = [ask(near, n) for n in range(48)]
    await scripted.until(lambda: len(scripted.seen) == 49)
    assert threading.active_count() <= before + 2
    gate.is_open.set()
    assert [output(got, "y")[0, 0] for got in await asyncio.gather(*calls)] == [2 * n for n in range(48)]


async def test_a_request_that_is_too_large_is_refused_alone(front, scripted: Scripted, tmp_path: Path):
    url = f"grpc://{scripted.address}"
    more = "instance_group { count: 1 }\nmax_batch_size: 0"
    scripted.rows = 0
    scripted.inputs = scripted.outputs = [("x", "FP32", [-1, 4])]
    scripted.outputs = [("y", "FP32", [-1, 4])]
    configs.put(tmp_path / "models", "m", more, url=url, max_message_bytes="1024")
    near = await front(tmp_path / "models")
    with pytest.raises(
        InvalidArgument, match=r"has \d+ bytes for the remote server, and parameter max_message_bytes is 1024"
    ):
        await ask(near, 1, rows=100)
    assert scripted.seen == []
    assert output(await ask(near, 1, rows=2), "y").tolist() == row(2, 2).tolist()


async def test_a_batch_that_is_too_large_goes_in_parts(front, scripted: Scripted, tmp_path: Path):
    more = "instance_group { count: 1 }"
    configs.put(tmp_path / "models", "m", more, url=f"grpc://{scripted.address}", max_message_bytes="1024")
    scripted.inputs, scripted.outputs = [("x", "FP32", [-1, -1])], [("y", "FP32", [-1, -1])]
    near = await front(tmp_path / "models")
    gate = scripted.infer = Gate()
    first = asyncio.create_task(near.core.infer(request("m", x=np.zeros((1, 100), np.float32))))
    await scripted.until(lambda: len(scripted.seen) == 1)
    wide = [np.full((1, 100), n, np.float32) for n in range(4)]
    calls = [asyncio.create_task(near.core.infer(request("m", x=x))) for x in wide]
    await waiting(near, 4)
    gate.is_open.set()
    await first
    assert [output(await call, "y")[0, 0] for call in calls] == [0, 2, 4, 6]
    assert scripted.seen == [1, 2, 2]


async def test_a_response_that_is_too_large_is_the_requests_fault(front, scripted: Scripted, tmp_path: Path):
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}", max_message_bytes="1024")
    scripted.outputs = [("y", "FP32", [-1, -1])]
    near = await front(tmp_path / "models")

    async def large(asked, context):
        return response(asked, np.zeros((1, 1000), np.float32))

    scripted.infer = large
    with pytest.raises(ResourceExhausted, match="larger than max") as caught:
        await ask(near, 1)
    assert caught.value.retry_after_ms is None


async def test_large_tensors_there_and_back(front, scripted: Scripted, tmp_path: Path):
    configs.put(tmp_path / "models", "m", url=f"grpc://{scripted.address}")
    scripted.inputs, scripted.outputs = [("x", "FP32", [-1, -1])], [("y", "FP32", [-1, -1])]
    near = await front(tmp_path / "models")

    async def same(asked, context):
        return response(asked, given(asked))

    scripted.infer = same
    x = np.arange(4 << 20, dtype=np.float32).reshape(1, -1)
    np.testing.assert_array_equal(output(await near.core.infer(request("m", x=x)), "y"), x)


async def test_requests_that_do_not_fit_never_leave(near: Serving, scripted: Scripted):
    with pytest.raises(InvalidArgument, match="unexpected shape"):
        await near.core.infer(request("m", x=floats([1, 2, 3])))
    assert scripted.seen == []


async def test_the_response_cache_stands_in_front(front, scripted: Scripted, tmp_path: Path):
    configs.put(tmp_path / "models", "m", "response_cache { enable: true }", url=f"grpc://{scripted.address}")
    near = await front(tmp_path / "models")
    for _ in range(3):
        assert output(await ask(near, 3), "y")[0, 0] == 6
    assert scripted.seen == [1]


async def test_unloading_waits_for_the_calls_under_way(near: Serving, scripted: Scripted):
    gate = scripted.infer = Gate()
    call = ask(near, 1)
    await scripted.until(lambda: len(scripted.seen) == 1)
    unloading = asyncio.create_task(near.core.unload_model(pb.RepositoryModelUnloadRequest(model_name="m")))
    gate.is_open.set()
    assert output(await call, "y")[0, 0] == 2
    await unloading
    with pytest.raises(ShoalError):
        await ask(near, 1)
