"""Calls on the real wire against servers that fail on purpose: retries, deadlines, and what the errors say."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from mesh.h2 import frames
from mesh.rpc.server import Server
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.retry import RetryPolicy
from shoal.client.transport.transport import MESSAGE_BYTES
from shoal.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ShoalError,
    Unavailable,
    Unimplemented,
)
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store
from tests.client.served import Served
from tests.mesh.h2.scripted import LAST, Scripted

pytestmark = pytest.mark.usefixtures("transport")

GET = ingest.GetJobRequest(id="a")


class World:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def caller(self, address: str, **options: Any) -> Caller:
        return Caller(address, clock=self.clock, sleep=self.sleep, draw=lambda: 0.5, **options)


def failing(times: int, code: grpc.StatusCode, trailing: tuple[tuple[str, str], ...] = ()) -> Any:
    left = [times]

    async def behaviour(request: Any, context: Any) -> Any:
        if left[0]:
            left[0] -= 1
            await context.abort(code, "not now", trailing)
        return ingest.GetJobResponse(job=ingest.Job(id=request.id))

    return behaviour


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_transient_failure_is_retried(served: Served, code: grpc.StatusCode) -> None:
    world = World()
    served.on(methods.GET_JOB, failing(2, code))
    answer = await world.caller(served.address).call(methods.GET_JOB, GET, timeout_s=10)
    assert answer.job.id == "a"
    assert world.slept == [0.05, 0.1]
    assert served.count(methods.GET_JOB) == 3


async def test_retry_after_is_honoured(served: Served) -> None:
    world = World()
    served.on(methods.GET_JOB, failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, (("retry-after-ms", "1500"),)))
    await world.caller(served.address).call(methods.GET_JOB, GET, timeout_s=10)
    assert world.slept == [1.55]


async def test_a_retry_that_would_end_after_the_deadline_is_not_made(served: Served) -> None:
    world = World()
    served.on(methods.GET_JOB, failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, (("retry-after-ms", "1500"),)))
    with pytest.raises(ResourceExhausted, match="not now") as caught:
        await world.caller(served.address).call(methods.GET_JOB, GET, timeout_s=1)
    assert caught.value.retry_after_ms == 1500
    assert world.slept == []


async def test_retries_end(served: Served) -> None:
    served.on(methods.GET_JOB, failing(99, grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(Unavailable, match="GetJob: not now"):
        await World().caller(served.address, retry=RetryPolicy(attempts=3)).call(methods.GET_JOB, GET, timeout_s=10)
    assert served.count(methods.GET_JOB) == 3


async def test_a_call_that_is_not_idempotent_is_tried_once(served: Served) -> None:
    served.on(methods.REMOVE_MODEL, failing(99, grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(Unavailable):
        await World().caller(served.address).call(methods.REMOVE_MODEL, store.RemoveModelRequest(), timeout_s=10)
    assert served.count(methods.REMOVE_MODEL) == 1


@pytest.mark.parametrize("code", ["NOT_FOUND", "INVALID_ARGUMENT", "ABORTED", "DATA_LOSS", "INTERNAL", "UNKNOWN"])
async def test_every_status_is_raised_as_its_class_without_retry(served: Served, code: str) -> None:
    served.on(methods.GET_JOB, failing(99, grpc.StatusCode[code]))
    with pytest.raises(ShoalError, match="not now") as caught:
        await World().caller(served.address).call(methods.GET_JOB, GET, timeout_s=10)
    assert caught.value.code.name == code
    assert served.count(methods.GET_JOB) == 1


async def test_the_deadline_ends_a_call_that_hangs(served: Served) -> None:
    async def never(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    served.on(methods.GET_JOB, never)
    with pytest.raises(DeadlineExceeded, match=r"job a: no response within 0\.2 s: allow more time"):
        await Caller(served.address).call(methods.GET_JOB, GET, timeout_s=0.2, doing="job a")


async def test_the_deadline_ends_streams_whose_requests_end_at_that_moment(served: Served) -> None:
    async def never(requests: Any, context: Any) -> Any:
        await asyncio.Event().wait()
        yield

    served.on(methods.RUN_STREAM, never, "stream_stream")
    caller, clock = Caller(served.address), asyncio.get_running_loop().time

    async def until(end: float) -> AsyncIterator[ingest.RunStreamRequest]:
        while clock() < end:
            await asyncio.sleep(0.001)
        return
        yield

    async def run(index: int) -> None:
        requests = until(clock() + 0.1 + index * 0.00005)
        with (
            pytest.raises(DeadlineExceeded, match=r"RunStream: no response within 0\.1 s"),
            caller.bidi(methods.RUN_STREAM, requests, timeout_s=0.1) as call,
        ):
            await call.read()

    for _ in range(10):
        await asyncio.gather(*(run(index) for index in range(100)))


@pytest.mark.parametrize("ends", ["with the deadline", "refused"])
async def test_streams_that_end_while_they_send_keep_their_status(served: Served, ends: str) -> None:
    async def refuse(requests: Any, context: Any) -> Any:
        await asyncio.sleep(0.05 if ends == "refused" else 20)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no grant")
        yield

    served.on(methods.RUN_STREAM, refuse, "stream_stream")
    caller = Caller(served.address)
    expected, timeout_s = (PermissionDenied, 20.0) if ends == "refused" else (DeadlineExceeded, 0.1)

    async def requests() -> AsyncIterator[ingest.RunStreamRequest]:
        while True:
            yield ingest.RunStreamRequest(job_id="a" * 100)
            await asyncio.sleep(0.0005)

    async def run() -> None:
        with (
            pytest.raises(expected, match=r"no grant|RunStream: no response within 0\.1 s"),
            caller.bidi(methods.RUN_STREAM, requests(), timeout_s=timeout_s) as call,
        ):
            await call.read()

    for _ in range(10):
        await asyncio.gather(*(run() for _ in range(30)))


async def test_an_upload_that_is_answered_before_its_end_has_its_response(served: Served) -> None:
    async def known(requests: Any, context: Any) -> Any:
        await anext(aiter(requests))
        return store.PutArtifactResponse(existed=True)

    async def chunks() -> AsyncIterator[store.PutArtifactRequest]:
        while True:
            yield store.PutArtifactRequest(chunk=bytes(10_000))
            await asyncio.sleep(0)

    served.on(methods.PUT_ARTIFACT, known, "stream_unary")
    caller = Caller(served.address)
    for _ in range(10):
        uploads = (caller.upload(methods.PUT_ARTIFACT, chunks(), timeout_s=20) for _ in range(10))
        for response in await asyncio.gather(*uploads):
            assert response.existed


async def test_requests_that_fail_cancel_the_call_and_not_its_task(served: Served) -> None:
    async def respond(requests: Any, context: Any) -> Any:
        async for _ in requests:
            yield ingest.RunStreamResponse()

    async def failing_requests() -> AsyncIterator[ingest.RunStreamRequest]:
        yield ingest.RunStreamRequest()
        raise ValueError("no more")

    served.on(methods.RUN_STREAM, respond, "stream_stream")
    with Caller(served.address).bidi(methods.RUN_STREAM, failing_requests(), timeout_s=20) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [response async for response in call]
    assert caught.value.code() == grpc.StatusCode.CANCELLED


async def test_closing_cancels_calls_in_flight_and_rejects_later_ones(served: Served) -> None:
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def never(request: Any, context: Any) -> Any:
        loop.call_soon_threadsafe(arrived.set)
        await asyncio.Event().wait()

    served.on(methods.GET_JOB, never)
    caller = Caller(served.address)
    call = asyncio.create_task(caller.call(methods.GET_JOB, GET, timeout_s=20))
    await arrived.wait()
    await caller.close()
    with pytest.raises(Cancelled, match="closed while the call was in flight"):
        await call
    with pytest.raises(FailedPrecondition, match="this client is closed"):
        await caller.call(methods.GET_JOB, GET, timeout_s=20)


async def test_a_cancelled_task_is_cancelled(served: Served) -> None:
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def never(request: Any, context: Any) -> Any:
        loop.call_soon_threadsafe(arrived.set)
        await asyncio.Event().wait()

    served.on(methods.GET_JOB, never)
    call = asyncio.create_task(Caller(served.address).call(methods.GET_JOB, GET, timeout_s=20))
    await arrived.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


ONCE = RetryPolicy(attempts=1)


async def test_an_unreachable_node_is_unavailable(run_dir: Any) -> None:
    for address in ("127.0.0.1:1", f"unix:{run_dir}/nothing.sock"):
        with pytest.raises(Unavailable, match=f"no node responds at {address}: start one with `shoal up`, or give"):
            await Caller(address, retry=ONCE).call(methods.GET_JOB, GET, timeout_s=5)


@pytest.mark.parametrize(
    "words",
    ["cannot open data.bin: No such file or directory", "the database: Connection refused", "it is unreachable"],
)
async def test_a_servers_own_error_is_not_that_of_an_unreachable_node(served: Served, words: str) -> None:
    async def fails(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAVAILABLE, words)

    served.on(methods.GET_JOB, fails)
    with pytest.raises(Unavailable, match=f"^GetJob: {words}$"):
        await Caller(served.address, retry=ONCE).call(methods.GET_JOB, GET, timeout_s=5)


async def test_a_server_that_does_not_speak_grpc_is_named() -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(web, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(FailedPrecondition, match="does not speak gRPC"):
            await Caller(f"127.0.0.1:{port}", retry=ONCE).call(methods.GET_JOB, GET, timeout_s=5)


@pytest.mark.parametrize("status", ["404", "200"])
async def test_a_web_server_is_named(status: str, transport: str) -> None:
    """One that speaks HTTP/2, as Envoy's admin port does."""
    listener = Scripted()
    await listener.start()
    call = asyncio.create_task(Caller(listener.address, retry=ONCE).call(methods.GET_JOB, GET, timeout_s=20))
    peer = await listener.accept()
    number = (await peer.until(frames.HEADERS))[2]
    peer.send(peer.headers(number, [(":status", status), ("content-type", "text/html")], LAST))
    if (status, transport) == ("200", "grpc"):  # grpc says only that a status is missing.
        with pytest.raises(ShoalError):
            await call
    else:
        with pytest.raises(FailedPrecondition, match=r"is not a Shoal gateway .*: check the address"):
            await call
    await listener.stop()


async def test_a_server_that_does_not_know_the_call(served: Served) -> None:
    with pytest.raises(Unimplemented, match="does not know this call"):
        await Caller(served.address).call(methods.GET_JOB, GET, timeout_s=5)


async def test_shoals_own_servers_report_an_unknown_method() -> None:
    async with Server("127.0.0.1:0", [], drain_ms=100) as server:
        with pytest.raises(Unimplemented, match=r"does not know this call.*`shoal serve`.*`shoal up`"):
            await Caller(server.address).call(methods.GET_JOB, GET, timeout_s=5)


async def test_envoy_without_an_instance(served: Served) -> None:
    async def none(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no healthy upstream")

    served.on(methods.GET_JOB, none)
    with pytest.raises(Unavailable, match="GetJob: no instance is available at present: see `shoal status`"):
        await Caller(served.address, retry=ONCE).call(methods.GET_JOB, GET, timeout_s=5)


@pytest.mark.parametrize("words", ["Stream removed (RST_STREAM (Received RST_STREAM with error code 2))", "RST_STREAM"])
async def test_a_reset_is_reported_as_a_broken_connection(served: Served, words: str) -> None:
    async def reset(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.INTERNAL, words)

    served.on(methods.GET_JOB, reset)
    with pytest.raises(Unavailable, match="GetJob: the connection broke"):
        await Caller(served.address, retry=ONCE).call(methods.GET_JOB, GET, timeout_s=5)


async def test_not_found_keeps_the_services_message(served: Served) -> None:
    async def missing(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no job a")

    served.on(methods.GET_JOB, missing)
    with pytest.raises(NotFound, match=r"^no job a$"):
        await Caller(served.address).call(methods.GET_JOB, GET, timeout_s=5)


async def test_headers_are_sent_and_invalid_ones_are_named(served: Served) -> None:
    served.on(methods.GET_JOB, failing(0, grpc.StatusCode.OK))
    caller = Caller(served.address, headers={"x-team": "blue"})
    await caller.call(methods.GET_JOB, GET, timeout_s=5, headers={"x-user": "ada"})
    assert {"x-team": "blue", "x-user": "ada"}.items() <= served.metadata[-1].items()
    for bad in ({"X-User": "a"}, {"grpc-timeout": "1"}, {"": "a"}, {"x y": "a"}, {"x": "a\nb"}, {"x": "é"}):
        with pytest.raises(InvalidArgument, match="header"):
            await caller.call(methods.GET_JOB, GET, timeout_s=5, headers=bad)


@pytest.mark.parametrize("timeout", [-1.0, float("nan")])
async def test_an_invalid_timeout_is_rejected(served: Served, timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        await Caller(served.address).call(methods.GET_JOB, GET, timeout_s=timeout)


async def test_an_infinite_timeout_is_limited(served: Served) -> None:
    served.on(methods.GET_JOB, failing(0, grpc.StatusCode.OK))
    await Caller(served.address).call(methods.GET_JOB, GET, timeout_s=float("inf"))


async def test_each_call_has_a_span_and_sends_its_trace_context(served: Served) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    served.on(methods.GET_JOB, failing(1, grpc.StatusCode.UNAVAILABLE))
    caller = World().caller(served.address)
    caller._tracer = provider.get_tracer("test")
    with trace.use_span(provider.get_tracer("test").start_span("outer"), end_on_exit=True) as outer:
        await caller.call(methods.GET_JOB, GET, timeout_s=5)
    inner = exporter.get_finished_spans()[0]
    assert inner.name == "shoal.ingest.v1.IngestService/GetJob"
    assert inner.kind is trace.SpanKind.CLIENT
    assert inner.parent is not None
    assert inner.parent.span_id == outer.get_span_context().span_id
    assert [event.name for event in inner.events] == ["retry"]
    assert inner.context is not None
    carried = served.metadata[-1]["traceparent"]
    assert carried.split("-")[1:3] == [f"{inner.context.trace_id:032x}", f"{inner.context.span_id:016x}"]


async def test_a_broken_stream_is_reopened(served: Served) -> None:
    opened = [0]

    async def watch(request: Any, context: Any) -> Any:
        opened[0] += 1
        yield ingest.WatchJobResponse(job=ingest.Job(id="a", attempts=opened[0]))
        if opened[0] == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        if opened[0] == 2:
            return  # A server that ends a stream early, without a word.
        yield ingest.WatchJobResponse(job=ingest.Job(id="end"))

    served.on(methods.WATCH_JOB, watch, "unary_stream")
    world = World()
    answers = world.caller(served.address).follow(
        methods.WATCH_JOB, ingest.WatchJobRequest, timeout_s=100, ended=lambda answer: answer.job.id == "end"
    )
    assert [answer.job.attempts async for answer in answers] == [1, 2, 3, 0]
    assert len(world.slept) == 2


async def test_reopening_a_stream_ends_after_its_attempts(served: Served) -> None:
    served.on(methods.WATCH_JOB, failing(99, grpc.StatusCode.UNAVAILABLE))
    caller = World().caller(served.address)
    with pytest.raises(Unavailable, match="not now"):
        async for _ in caller.follow(
            methods.WATCH_JOB, ingest.WatchJobRequest, timeout_s=100, ended=lambda answer: False
        ):
            pass
    assert served.count(methods.WATCH_JOB) == 8


async def test_a_lost_connection_is_unavailable(served: Served) -> None:
    arrived, loop = asyncio.Event(), asyncio.get_running_loop()

    async def never(request: Any, context: Any) -> Any:
        loop.call_soon_threadsafe(arrived.set)
        await asyncio.Event().wait()

    served.on(methods.GET_JOB, never)
    async with passing(served.address) as (address, cut):
        call = asyncio.create_task(Caller(address, retry=ONCE).call(methods.GET_JOB, GET, timeout_s=20))
        await arrived.wait()
        cut()
        with pytest.raises(Unavailable, match=r"^GetJob: "):
            await call


async def test_a_lost_connection_is_reopened(served: Served) -> None:
    served.on(methods.GET_JOB, failing(0, grpc.StatusCode.OK))
    async with passing(served.address) as (address, cut):
        caller = Caller(address)
        for _ in range(3):
            assert (await caller.call(methods.GET_JOB, GET, timeout_s=20)).job.id == "a"
            cut()
        await caller.close()


@asynccontextmanager
async def passing(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A way to `address` that can be cut: at once, as when a process dies."""
    writers: list[asyncio.StreamWriter] = []
    tasks = asyncio.TaskGroup()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, up_writer))
        tasks.create_task(pump(reader, up_writer))
        tasks.create_task(pump(up_reader, writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()
        writers.clear()

    async with tasks, await asyncio.start_server(accepted, "127.0.0.1", 0) as server:
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
        finally:
            cut()


async def test_a_stream_without_a_deadline_goes_both_ways_until_it_is_half_closed(served: Served) -> None:
    left: list[float | None] = []

    async def echo(requests: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        async for request in requests:
            yield ingest.SubmitStreamResponse(sequence=request.sequence)

    async def asked() -> AsyncIterator[ingest.SubmitStreamRequest]:
        for number in (1, 2, 3):
            yield ingest.SubmitStreamRequest(sequence=number)

    served.on(methods.SUBMIT_STREAM, echo, "stream_stream")
    with Caller(served.address).bidi(methods.SUBMIT_STREAM, asked(), timeout_s=None) as call:
        answers = [(await call.read()) for _ in range(4)]
    assert [answer and answer.sequence for answer in answers] == [1, 2, 3, None]
    assert left == [None]


async def test_leaving_a_stream_early_cancels_it_at_the_service(served: Served) -> None:
    gone, loop = asyncio.Event(), asyncio.get_running_loop()

    async def endless(request: Any, context: Any) -> Any:
        try:
            while True:
                yield ingest.WatchJobResponse(job=ingest.Job(id="a"))
                await asyncio.sleep(0.001)
        finally:
            loop.call_soon_threadsafe(gone.set)

    served.on(methods.WATCH_JOB, endless, "unary_stream")
    caller = Caller(served.address)
    async with aclosing(caller.stream(methods.WATCH_JOB, ingest.WatchJobRequest(), timeout_s=20)) as answers:
        assert (await anext(answers)).job.id == "a"
    await gone.wait()
    await caller.close()


async def test_closing_ends_a_stream_that_is_read(served: Served) -> None:
    async def one(request: Any, context: Any) -> Any:
        yield ingest.WatchJobResponse(job=ingest.Job(id="a"))
        await asyncio.Event().wait()

    served.on(methods.WATCH_JOB, one, "unary_stream")
    caller = Caller(served.address)
    answers = caller.stream(methods.WATCH_JOB, ingest.WatchJobRequest(), timeout_s=20)
    await anext(answers)
    reading = asyncio.create_task(anext(answers))
    await asyncio.sleep(0)
    await caller.close()
    with pytest.raises(Cancelled, match="closed while the call was in flight"):
        await reading


async def test_large_messages_go_both_ways(served: Served) -> None:
    async def echo(request: Any, context: Any) -> Any:
        return ingest.GetJobResponse(job=ingest.Job(id=request.id))

    served.on(methods.GET_JOB, echo)
    caller = Caller(served.address)
    large = "a" * (100 << 20)
    answer = await caller.call(methods.GET_JOB, ingest.GetJobRequest(id=large), timeout_s=60)
    assert answer.job.id == large
    with pytest.raises(ResourceExhausted, match="larger than max"):
        await caller.call(methods.GET_JOB, ingest.GetJobRequest(id="a" * (MESSAGE_BYTES + 1)), timeout_s=60)
    await caller.close()


async def test_many_calls_at_once(served: Served) -> None:
    served.on(methods.GET_JOB, failing(0, grpc.StatusCode.OK))
    caller = Caller(served.address)
    asked = (caller.call(methods.GET_JOB, ingest.GetJobRequest(id=f"{n}"), timeout_s=60) for n in range(500))
    assert [answer.job.id for answer in await asyncio.gather(*asked)] == [f"{n}" for n in range(500)]
    await caller.close()


async def test_an_unclosed_client_leaves_no_connection() -> None:
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0\0\0\4\0\0\0\0\0")  # Settings, none: an HTTP/2 server that answers no call.
        while await reader.read(1 << 16):
            pass
        writer.close()
        ended.set()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        caller = Caller(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", retry=ONCE)
        with pytest.raises(DeadlineExceeded):
            await caller.call(methods.GET_JOB, GET, timeout_s=0.5)
        await asyncio.sleep(0)  # Until here the loop is in the step that raised, and holds the error with its frames.
        del caller
        gc.collect()
        await asyncio.wait_for(ended.wait(), 30)
