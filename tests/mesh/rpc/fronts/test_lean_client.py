"""Lean client against the server: the same calls have the same outcome as with grpc.aio's client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import BytesValue

from mesh.rpc.client.channel import Channel
from tests.breakable import until
from tests.mesh.rpc.fronts.conftest import TRANSPORTS, Client, Front
from tests.mesh.rpc.fronts.service import METHODS, path

S = grpc.StatusCode
KINDS = ("Unary", "Short", "Tasked", "ServerStream", "ClientStream", "Bidi")


@pytest_asyncio.fixture
async def channel(front: Front) -> AsyncIterator[Channel]:
    """Whatever a test does, nothing of its calls is left when it is over."""
    async with Channel(front.address) as channel:
        yield channel
        line = channel._connection
        assert not channel._waiting
        assert line is None or (not line._calls and not line._sender._window_changes and not line._sender._waiting)


@pytest_asyncio.fixture
async def lean(channel: Channel) -> Client:
    return Client(channel)


async def asked(*values: bytes) -> AsyncIterator[bytes]:
    for value in values:
        yield value


def question(method: str, *values: bytes):
    return asked(*values) if METHODS[method][0] else values[0]


async def answers(client: Client, method: str, *values: bytes, **options) -> list[bytes]:
    call = client.call(method, question(method, *values), timeout=60, **options)
    return [value async for value in call] if METHODS[method][1] else [await call]


@pytest.mark.parametrize("started", TRANSPORTS, indirect=True)
@pytest.mark.parametrize("method", KINDS)
async def test_answers_are_the_same(lean: Client, client: Client, method: str) -> None:
    for values in ((b"",), (b"a", b"", b"c" * 40_000), (b"x" * 16_379,), (b"y" * 70_000, b"z")):
        if not METHODS[method][0]:
            values = values[:1]
        order = {"do": "echo"}
        assert await answers(lean, method, *values, order=order) == await answers(client, method, *values, order=order)


ORDERS = {
    "code 5": {"do": "fail", "code": 5, "message": "no such thing"},
    "any text": {"do": "fail", "code": 9, "message": "100% ✓ \n\t\\ äöü 漢字"},
    "come back": {"do": "fail", "code": 8, "message": "full", "after": 250},
    "no text": {"do": "fail", "code": 14, "message": ""},
    "long text": {"do": "fail", "code": 3, "message": "é" * 2_000},
    "a fault": {"do": "raise", "kind": "ValueError"},
}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("name", ORDERS)
async def test_failures_are_the_same(lean: Client, client: Client, method: str, name: str) -> None:
    ours, theirs = [await one.fails(method, question(method, b"x"), ORDERS[name], timeout=60) for one in (lean, client)]
    assert (ours.code(), ours.details()) == (theirs.code(), theirs.details())
    after = [
        [pair for pair in error.trailing_metadata() or () if pair[0] == "retry-after-ms"] for error in (ours, theirs)
    ]
    assert after[0] == after[1]
    assert not ours.is_unprocessed


async def test_an_unknown_method_is_unimplemented(channel: Channel, client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as theirs:
        await client.channel.unary_unary("/shoal.test.Fronts/Nonesuch")(b"", timeout=60)
    with pytest.raises(grpc.aio.AioRpcError) as ours:
        await channel.unary("/shoal.test.Fronts/Nonesuch", b"", timeout_s=60)
    assert (ours.value.code(), ours.value.details()) == (theirs.value.code(), theirs.value.details())


async def test_bytes_that_are_no_message(channel: Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary(path("Unary"), b"\xff\xff", timeout_s=60)
    assert refused.value.code() is S.INVALID_ARGUMENT


@pytest.mark.parametrize("method", KINDS)
async def test_a_deadline_ends_the_call_here_and_there(lean: Client, client: Client, method: str) -> None:
    mark = f"lean-deadline-{method}"
    order = {"do": "wait", "mark": mark}
    # The deadline begins before the connection: this call makes it.
    assert await answers(lean, "Unary", b"", order={"do": "echo"}) == [b""]
    failed = await lean.fails(method, question(method, b"x"), order, timeout=0.5)
    assert failed.code() is S.DEADLINE_EXCEEDED
    await client.until_seen(f"cancelled {mark}")


async def test_the_server_receives_the_timeout(lean: Client) -> None:
    (left,) = await answers(lean, "Unary", b"", order={"do": "left"})
    # A front may round it up, by one percent at most.
    assert 30 < float(left) < 61


async def test_a_caller_that_is_cancelled_ends_its_call(lean: Client, client: Client) -> None:
    order = {"do": "wait", "mark": "lean-cancel"}
    call = asyncio.create_task(lean.call("Unary", b"x", order, timeout=60))
    await client.until_seen("started lean-cancel")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await client.until_seen("cancelled lean-cancel")


async def test_leaving_a_stream_ends_its_call(lean: Client, client: Client, channel: Channel) -> None:
    async def left() -> None:
        order = {"do": "echo", "count": 10**9}
        async with contextlib.aclosing(lean.call("ServerStream", b"x", order, timeout=60)) as call:
            async for _ in call:
                return

    await left()
    order = '{"do": "wait", "mark": "lean-gone"}'
    async with channel.stream(path("Bidi"), timeout_s=60, metadata=[("x-do", order)]) as call:
        call.write(BytesValue(value=b"x").SerializeToString())
        await call.drain()
        await client.until_seen("started lean-gone")
    await client.until_seen("cancelled lean-gone")


async def test_questions_and_answers_take_turns_until_it_is_half_closed(channel: Channel, client: Client) -> None:
    order = '{"do": "echo", "mark": "lean-turns"}'
    async with channel.stream(path("Bidi"), timeout_s=60, metadata=[("x-do", order)]) as call:
        for n in range(20):
            message = BytesValue(value=b"%d" % n * n).SerializeToString()
            call.write(message)
            assert await anext(call) == message
        call.half_close()
        assert [message async for message in call] == []
    await client.until_seen("half-closed lean-turns")
    with pytest.raises(RuntimeError, match="half-closed"):
        call.write(b"")


async def test_many_streams_that_are_answered_before_their_end_keep_the_connection(channel: Channel) -> None:
    """Envoy takes a thousand resets for an attack, whatever was answered before."""
    header = [("x-do", '{"do": "fail", "code": 5, "message": "early"}')]

    async def one() -> None:
        for _ in range(60):
            async with channel.stream(path("Bidi"), timeout_s=60, metadata=header) as call:
                call.write(b"")
                with pytest.raises(grpc.aio.AioRpcError, match="early"):
                    await anext(call)

    await one()
    line = channel._connection
    await asyncio.gather(*(one() for _ in range(20)))
    assert channel._connection is line


async def test_many_cancelled_calls_fail_no_other_call(lean: Client, client: Client) -> None:
    stays = asyncio.create_task(lean.call("Unary", b"stays", {"do": "sleep", "ms": 2_000}, timeout=60))
    for number in range(4):
        order = {"do": "wait", "mark": f"lean-crowd {number}"}
        crowd = [asyncio.create_task(lean.call("Unary", b"goes", order, timeout=60)) for _ in range(400)]
        await client.until_seen(f"started lean-crowd {number}")
        for call in crowd:
            call.cancel()
        await asyncio.wait(crowd)
        assert await answers(lean, "Unary", b"beside", order={"do": "echo"}) == [b"beside"]
    assert await stays == b"stays"


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("method", ["Unary", "Short", "Bidi"])
async def test_16_mib_both_ways(lean: Client, method: str) -> None:
    value = bytes(range(256)) * (16 << 12)
    for _ in range(2):
        assert await answers(lean, method, value, order={"do": "echo"}) == [value]


async def test_a_thousand_concurrent_calls(lean: Client) -> None:
    async def one(n: int) -> bool:
        method = KINDS[n % len(KINDS)]
        if method == "ClientStream":
            return await answers(lean, method, b"a", b"bc") == [b"[1, 2]"]
        return set(await answers(lean, method, b"%d" % n * (n % 50), order={"do": "echo"})) == {b"%d" % n * (n % 50)}

    assert all(await asyncio.gather(*(one(n) for n in range(1000))))


async def test_a_slow_reader_slows_only_its_sender(lean: Client, client: Client) -> None:
    order = {"do": "size", "bytes": 1 << 19, "count": 200, "mark": "lean-slow"}
    call = lean.call("ServerStream", b"", order, timeout=100)
    sizes = [len(await anext(call))]
    await client.until_seen("sent lean-slow 3")
    for _ in range(30):  # Each of them goes there and back, beside what the stream has under way.
        assert await answers(lean, "Unary", b"beside", order={"do": "echo"}) == [b"beside"]
    assert "sent lean-slow 150" not in await client.seen()
    sizes += [len(value) async for value in call]
    assert sizes == [1 << 19] * 200


async def test_a_server_that_reads_slowly_slows_the_writer(channel: Channel, client: Client, lean: Client) -> None:
    order = '{"do": "echo", "mark": "lean-stuck"}'
    written = 0

    async with channel.stream(path("ClientStream"), timeout_s=100, metadata=[("x-do", order)]) as call:

        async def write() -> None:
            nonlocal written
            for _ in range(200):
                call.write(BytesValue(value=bytes(1 << 20)).SerializeToString())
                await call.drain()
                written += 1

        writing = asyncio.create_task(write())
        await client.until_seen("started lean-stuck")
        for _ in range(30):
            assert await answers(lean, "Unary", b"beside", order={"do": "echo"}) == [b"beside"]
        assert written < 150
    with contextlib.suppress(grpc.aio.AioRpcError):
        await writing
    assert written < 150


async def test_it_connects_again_after_a_loss(channel: Channel, lean: Client) -> None:
    assert await answers(lean, "Unary", b"1", order={"do": "echo"}) == [b"1"]
    assert channel._connection is not None
    channel._connection._transport.abort()

    async def is_back() -> bool:
        try:
            return await answers(lean, "Unary", b"2", order={"do": "echo"}) == [b"2"]
        except grpc.aio.AioRpcError as err:
            if err.code() is not S.UNAVAILABLE:
                raise
            return False

    await until(is_back, "a call goes over a new connection")
