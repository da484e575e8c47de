"""The limits of Envoy with a real Envoy: each is crossed while another client calls."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from mesh.xds import routes
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc
from shoal.node.envoy_overload import CONNECTIONS
from tests.breakable import until
from tests.http2 import INFER, STREAM, Answer, Connection, framed
from tests.mesh.xds.test_xds_envoy import Mesh, request, told

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

HEAP = 192 << 20
BROKEN = "the request is not a message of the expected type: it has a field of an unknown kind"
TOO_MANY = (
    "the request has more than 1024 parameters, 4194304 bytes in them and the model's name, or 100000 fields: "
    "send less at a time"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    """A mesh whose Envoy has a small heap and a short idle timeout; only `infer-1` has `steps`, which has sequences."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_MESSAGE_IDLE", "0.5s")
        _forget()
        async with AsyncExitStack() as stack:
            made = Mesh(folder, stack, None, heap=HEAP)
            await made.start()
            await made.envoy.until_ready()
            await made.replica(0)
            await made.replica(1)
            await made.show(made.instance(0, "a", "b"), made.instance(1, "a", "steps", steps="steps"))
            yield made
    _forget()
    shutil.rmtree(folder, ignore_errors=True)


def _forget() -> None:
    """Forget built routes: they have the timeout of the time when they were built."""
    routes.route_configuration.cache_clear()
    routes._service.cache_clear()


def headers_only(mesh: Mesh, path: str, method: str) -> Answer:
    """Make a call that ends with its headers."""
    with Connection(mesh.envoy.gateway) as connection:
        stream = connection.h2.get_next_available_stream_id()
        connection.answers[stream] = Answer()
        sent = {":method": method, ":scheme": "http", ":path": path, ":authority": "localhost", "te": "trailers"}
        sent["content-type"] = "application/grpc"
        connection.h2.send_headers(stream, list(sent.items()), end_stream=True)
        connection.flush()
        return connection.answer(stream)


async def test_a_call_that_ends_with_its_headers_is_answered_while_a_model_has_sequences(mesh: Mesh):
    answer = await asyncio.to_thread(headers_only, mesh, INFER, "POST")
    assert (answer.http_status, answer.status) == (200, 3), answer
    answer = await asyncio.to_thread(headers_only, mesh, STREAM, "POST")
    assert (answer.http_status, answer.status, answer.data) == (200, 0, b""), answer
    for method in ("GET", "DELETE"):
        answer = await asyncio.to_thread(headers_only, mesh, INFER, method)
        assert not answer.is_cut
        assert answer.http_status is not None
    assert told(await mesh.infer("steps"), "replica") == "infer-1"


async def test_a_stream_without_a_message_is_ok_while_a_model_has_sequences(mesh: Mesh):
    call = mesh.stub.ModelStreamInfer(timeout=30)
    await call.done_writing()
    assert await call.read() == grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    call = mesh.stub.ModelStreamInfer(timeout=30)
    await call.write(request("steps"))
    assert told((await call.read()).infer_response, "replica") == "infer-1"
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_half_a_message_ends_and_a_slow_call_and_an_idle_stream_do_not(mesh: Mesh):
    def send_half() -> Answer:
        with Connection(mesh.envoy.gateway) as connection:
            stream = connection.open()
            connection.send(stream, framed(b"x" * 50, size=100))
            return connection.answer(stream)

    idle = mesh.stub.ModelStreamInfer(timeout=20)
    slow = asyncio.create_task(mesh.infer("a", sleep_ms=1_500))
    answer = await asyncio.to_thread(send_half)
    assert answer.status not in (None, 0), answer
    assert told(await slow, "replica") in ("infer-0", "infer-1")
    await idle.write(request("a"))
    assert told((await idle.read()).infer_response, "header") == "a"
    idle.cancel()


# Fields of a ModelInferRequest: the model, a parameter without a name or value, and others of each form.
MODEL, PARAMETER = b"\x0a\x05steps", b"\x22\x00"
OTHERS = b"".join(
    (
        b"\x1a\x03abc",  # The id.
        b"\x3a\xac\x02" + b"\x22" * 300,  # A tensor whose bytes look like parameters.
        b"\xf8\x7f\xac\x02",  # Unknown: a number, 8 bytes, 4 bytes, bytes, a group with a number.
        b"\xf9\x7f" + b"\x22" * 8,
        b"\xfd\x7f" + b"\x22" * 4,
        b"\xfa\x7f\x02\x22\x22",
        b"\xfb\x7f\x08\x01\xfc\x7f",
    )
)


@pytest.mark.parametrize("path", [INFER, STREAM])
@pytest.mark.parametrize("size", [1, 3, 1_000, 1 << 20])
async def test_a_message_has_limits_of_parameters_and_fields_however_it_arrives(mesh: Mesh, path: str, size: int):
    def call(message: bytes) -> Answer:
        body = framed(message)
        with Connection(mesh.envoy.gateway) as connection:
            return connection.call((body[at : at + size] for at in range(0, len(body), size)), path)

    for more in (b"", OTHERS * 3):
        answer = await asyncio.to_thread(call, MODEL + more + PARAMETER * 1_023 + more + PARAMETER + OTHERS)
        assert (answer.status, b"infer-1" in answer.data) == (0, True), answer.message
        answer = await asyncio.to_thread(call, MODEL + more + PARAMETER * 1_023 + more + PARAMETER * 2 + OTHERS)
        assert (answer.status, answer.message) == (3, TOO_MANY)
    if size >= 1_000:
        answer = await asyncio.to_thread(call, MODEL + b"\x1a\x00" * 99_999)
        assert (answer.status, b"infer-1" in answer.data) == (0, True), answer.message
        answer = await asyncio.to_thread(call, MODEL + b"\x1a\x00" * 100_000)
        assert (answer.status, answer.message) == (3, TOO_MANY)


async def test_what_is_extracted_of_a_message_has_a_limit(mesh: Mesh):
    limit = 4 << 20
    # The model takes 7 bytes of it, and the rest of the parameter 21.
    told(await mesh.infer("steps", more="x" * (limit - 28)), "replica")
    calls = [mesh.infer("steps", more="x" * (limit - 27)), mesh.infer("x" * limit)]
    calls.append(mesh.infer("steps", a="x" * (limit // 2), b="x" * (limit // 2)))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError, match=TOO_MANY):
            await call
    # Of each tensor, Envoy only passes the bytes on.
    assert told(await mesh.infer("steps", size=limit + 1), "replica") == "infer-1"


async def test_the_messages_of_a_stream_arrive_whole_wherever_they_are_cut(mesh: Mesh):
    """Envoy's extraction lost the begin of a message that came in one piece with the end of the first one."""
    sizes = (1, 60, 2, 40_000)
    messages = [framed(request("a", size).SerializeToString()) for size in sizes]
    body, first, second = b"".join(messages), len(messages[0]), len(messages[0] + messages[1])
    third = second + len(messages[2])

    def call(*cuts: int) -> list[int]:
        pieces = [body[begin:end] for begin, end in pairwise((0, *cuts, len(body)))]
        with Connection(mesh.envoy.gateway) as connection:
            answer = connection.call(pieces, STREAM)
        assert answer.status == 0, (cuts, answer.message)
        found = [pb.ModelStreamInferResponse.FromString(each).infer_response for each in answer.messages]
        return [response.parameters["bytes"].int64_param for response in found]

    cuts = [(at,) for at in (*range(1, third + 6), 16_384, 20_000, len(body) - 1)]
    cuts += [(), (3, first + 2, first + 4), (first - 1, second + 3, third + 1), (5, third + 5), tuple(range(1, third))]
    for each in cuts:
        assert await asyncio.to_thread(call, *each) == list(sizes), each


async def test_what_follows_the_message_of_a_unary_call_is_refused(mesh: Mesh):
    """Less than a message was dropped."""
    message = framed(request("a").SerializeToString())

    def call(rest: bytes) -> Answer:
        with Connection(mesh.envoy.gateway) as connection:
            return connection.call([message + rest])

    for rest in (b"\0", b"\0\0\0\0", message[:-1], message):
        answer = await asyncio.to_thread(call, rest)
        assert (answer.status, answer.data) == (3, b""), answer


async def test_an_idle_stream_keeps_no_long_name_of_a_model(mesh: Mesh):
    """Envoy keeps the message for a retry, which it counts; the name took as much again, which no limit counted."""
    size, streams = 4_000_000, 8

    async def allocated() -> int:
        return int(json.loads(await mesh.envoy.admin_get("/memory"))["allocated"])

    def begin(connection: Connection) -> None:
        stream = connection.open(STREAM)
        connection.send(stream, framed(request("a" * size).SerializeToString()))
        while not connection.answers[stream].data:
            connection._take()

    before = await allocated()
    with Connection(mesh.envoy.gateway) as connection:
        for _ in range(streams):
            await asyncio.to_thread(begin, connection)
        held = await allocated() - before
    assert held < 1.5 * streams * size


@pytest.mark.parametrize(
    "bad",
    [
        b"\x00",
        b"\x0b\x00",  # A group with it.
        b"\x0e",
        b"\x0f",
        b"\x82\x80\x80\x80\x10\x00",  # A tag, a length and a number of too many bits or bytes.
        b"\xa2\x80\x80\x80\x90\x00\x00",
        b"\x1a\x80\x80\x80\x80\x10",
        b"\x1a\x80\x80\x80\x80\x08",
        b"\x18" + b"\xff" * 11,
        b"\xff" * 11,
    ],
    ids=bytes.hex,
)
async def test_what_is_no_field_hides_no_fields(mesh: Mesh, bad: bytes):
    """The extraction reads on after it, or takes other bytes for it."""

    def call() -> Answer:
        with Connection(mesh.envoy.gateway) as connection:
            return connection.call(framed(MODEL + bad + PARAMETER * 2_000))

    answer = await asyncio.to_thread(call)
    assert (answer.status, answer.message) == (3, BROKEN)


async def test_a_message_with_millions_of_parameters_takes_nothing_from_other_callers(mesh: Mesh):
    """It took the whole heap, and each call was refused."""

    def flood() -> Answer:
        with Connection(mesh.envoy.gateway) as connection:
            return connection.call(framed(MODEL + PARAMETER * (2 << 20)))

    answer = await asyncio.to_thread(flood)
    assert (answer.status, answer.message) == (3, TOO_MANY)
    assert told(await mesh.infer("steps"), "replica") == "infer-1"


async def test_headers_beyond_the_limits_cost_their_own_call_only(mesh: Mesh):
    message = framed(request("a").SerializeToString())

    def cross() -> tuple[list[Answer], list[Answer]]:
        with Connection(mesh.envoy.gateway) as connection:
            few = [(f"x-{n}".encode(), b"v") for n in range(200)]
            many = [(f"x-{n}".encode(), b"v") for n in range(300)]
            taken = [connection.call(message), connection.call(message, more=few)]
            taken.append(connection.call(message, more=[(b"x-long", b"v" * 15_000)]))
            refused = [connection.call(message, more=many)]
            refused.append(connection.call(message, more=[(b"x-long", b"v" * 17_000)]))
            refused.append(connection.call(message, more=[(b"x-long", b"v" * 70_000)]))
            taken.append(connection.call(message))
            return taken, refused

    taken, refused = await asyncio.to_thread(cross)
    assert [answer.status for answer in taken] == [0, 0, 0, 0]
    assert all(answer.status != 0 and not answer.is_cut for answer in refused), refused


async def test_a_connection_has_a_limit_of_streams_and_others_go_on(mesh: Mesh):
    def fill(connection: Connection) -> int:
        connection.call(framed(request("a").SerializeToString()))
        limit = connection.h2.remote_settings.max_concurrent_streams
        for _ in range(limit):
            connection.open(STREAM)
        return limit

    with Connection(mesh.envoy.gateway) as connection:
        assert await asyncio.to_thread(fill, connection) == 1024
        assert told(await mesh.infer("a"), "header") == "a"


async def test_a_client_that_leaves_with_all_its_calls_ends_no_other_call(mesh: Mesh):
    """Envoy resets them at once, and the instance, which is busy, does not read that yet."""
    gate, name = mesh.folder / "gate", "cluster.model/b.upstream_rq_active"
    slow = framed(request("b", sleep_ms=60_000).SerializeToString())
    replica = await mesh.replica(0)

    def call(connection: Connection, count: int, message: bytes) -> None:
        for _ in range(count):
            connection.send(connection.open(), message, end=True)

    async def is_running(calls: int) -> bool:
        return (await mesh.envoy.stats(f"{name}$"))[name] == calls

    other = asyncio.create_task(mesh.infer("b", gate=str(gate)))
    await until(lambda: is_running(1), "the other call runs")
    with Connection(mesh.envoy.gateway) as connection:
        await asyncio.to_thread(call, connection, 1_003, slow)
        await until(lambda: is_running(1 + 1_003), "the first calls run")
        replica.freeze()
        try:
            # More than fits the instance's socket.
            large = framed(request("b", size=100_000).SerializeToString())
            await asyncio.to_thread(call, connection, 20, large)
            await until(lambda: is_running(1 + 1_023), "all calls wait")
            connection.socket.close()
            await until(lambda: is_running(1), "all calls of the client have ended")
        finally:
            replica.thaw()
    gate.touch()
    assert told(await other, "attempt") == "1", "it is not repeated"


async def test_connections_beyond_the_limit_are_closed_and_others_go_on(mesh: Mesh):
    await mesh.infer("a")
    host, _, port = mesh.envoy.gateway.rpartition(":")

    async def has_closed_some() -> bool:
        stats = await mesh.envoy.stats("downstream_cx_overflow")
        return sum(count for name, count in stats.items() if "admin" not in name) > 0

    with ExitStack() as stack:
        for _ in range(CONNECTIONS + 8):
            stack.enter_context(socket.create_connection((host, int(port)), 10))
        await until(has_closed_some, "Envoy closes connections beyond the limit")
        assert told(await mesh.infer("a"), "header") == "a"
    async with grpc.aio.insecure_channel(mesh.envoy.gateway) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert told(await stub.ModelInfer(request("a"), timeout=20, wait_for_ready=True), "header") == "a"
