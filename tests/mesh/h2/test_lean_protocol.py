"""The lean client keeps to HTTP/2, and accepts everything that HTTP/2 allows a peer to do."""

from __future__ import annotations

import asyncio
import struct
from base64 import b64encode

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from mesh.h2 import frames
from mesh.h2.frames import Reason
from mesh.rpc.client import request
from mesh.rpc.client.channel import Channel
from mesh.rpc.framing import framed
from tests.breakable import until
from tests.mesh.h2.scripted import HEAD, LAST, OK, scripted

S = grpc.StatusCode
PATH = "/test.Test/Do"


def ask(channel: Channel, message: bytes = b"question", timeout_s: float = 60.0, **options) -> asyncio.Task[bytes]:
    return asyncio.create_task(channel.unary(PATH, message, timeout_s=timeout_s, **options))


async def failure(call: asyncio.Task[bytes]):
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await asyncio.wait_for(call, 60)
    return failed.value


async def test_the_headers_of_a_call() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel, metadata=[("x-a", "b c"), ("x-b-bin", b"\0\xff")], timeout_s=7)
        peer = await listener.accept()
        came = await peer.request(1)
        assert came.headers == {
            ":method": "POST",
            ":scheme": "http",
            ":path": PATH,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            "user-agent": "shoal",
            "x-a": "b c",
            "x-b-bin": b64encode(b"\0\xff").decode().rstrip("="),
            "grpc-timeout": came.headers["grpc-timeout"],
        }
        assert 0 < int(came.headers["grpc-timeout"].removesuffix("u")) <= 7_000_000
        assert came.body == framed(b"question")
        assert [kind for kind, _, number, _ in peer.seen if number] == [frames.HEADERS, frames.DATA]
        peer.send(peer.answer(1, b"answer"))
        assert await call == b"answer"
        again = ask(channel, b"")
        assert (await peer.request(3)).headers["grpc-timeout"] == "60000000u"
        peer.send(peer.answer(3, b""))
        assert await again == b""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1e-9, b"1u"), (0.25, b"250000u"), (99.0, b"99000000u"), (100.0, b"100000m"), (99_999.9995, b"100000S"),
     (1e6, b"1000000S"), (1e12, b"99999999S")],
)  # fmt: skip
def test_a_timeout_has_eight_digits_and_is_never_less(seconds: float, text: bytes) -> None:
    assert request.timeout(seconds).endswith(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [("X-Upper", "a"), ("", "a"), (":path", "a"), ("grpc-timeout", "1S"), ("x y", "a"), ("x", "a\nb"), ("x", "ä"),
     ("x", "\x7f"), ("x", b"bytes")],
)  # fmt: skip
async def test_metadata_that_no_header_can_carry_is_refused_before_anything_is_sent(key: str, value: str) -> None:
    async with scripted() as (channel, listener):
        for call in (ask(channel, metadata=[(key, value)]), ask(channel, metadata=[("x", "fine"), (key, value)])):
            with pytest.raises(ValueError, match="metadata"):
                await call
        assert not listener.has_another()


async def test_long_metadata_goes_in_several_frames() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel, metadata=[(f"x-{n}", "v" * 5_000) for n in range(10)])
        peer = await listener.accept()
        came = await peer.request(1)
        assert all(came.headers[f"x-{n}"] == "v" * 5_000 for n in range(10))
        kinds = [kind for kind, _, number, _ in peer.seen if number]
        assert kinds == [frames.HEADERS, *[frames.CONTINUATION] * 3, frames.DATA]
        peer.send(peer.answer(1, b""))
        await call


async def test_the_trace_travels_along() -> None:
    span = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, False, TraceFlags(1))
    async with scripted() as (channel, listener):
        token = context.attach(trace.set_span_in_context(NonRecordingSpan(span)))
        call = ask(channel)
        context.detach(token)
        peer = await listener.accept()
        told = (await peer.request(1)).headers["traceparent"]
        assert told == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        peer.send(peer.answer(1, b""))
        await call


async def test_more_calls_than_the_peer_takes_stand_in_line() -> None:
    async with scripted() as (channel, listener):
        calls = [ask(channel, b"%d" % n) for n in range(5)]
        peer = await listener.accept({frames.MAX_STREAMS: 2})
        gone, late = ask(channel, b"gone"), ask(channel, b"late", timeout_s=0.2)
        for n in range(5):
            assert (await peer.request(2 * n + 1)).body == framed(b"%d" % n)
            assert len(peer.requests) <= n + 2
            if n == 2:
                gone.cancel()
                assert (await failure(late)).code() is S.DEADLINE_EXCEEDED
                assert late.exception().is_unprocessed
            peer.send(peer.answer(2 * n + 1, b"%d" % n))
            assert await calls[n] == b"%d" % n
        assert gone.cancelled()
        last = ask(channel, b"last")
        assert (await peer.request(11)).body == framed(b"last")
        waiting = ask(channel, b"a")
        more = ask(channel, b"b")
        await peer.request(13)
        peer.send(frames.settings({frames.MAX_STREAMS: 3}))
        await peer.request(15)
        peer.send(*(peer.answer(number, b"") for number in (11, 13, 15)))
        await asyncio.gather(last, waiting, more)


async def test_sent_data_keeps_to_the_peers_windows() -> None:
    body = bytes(range(256)) * 400
    async with scripted() as (channel, listener):
        call = ask(channel, body)
        peer = await listener.accept({frames.WINDOW_SIZE: 100})
        while len(peer.requests.get(1).body if 1 in peer.requests else b"") < 100:
            await peer.frame()
        small = ask(channel, b"small")
        await peer.request(3)
        peer.send(peer.answer(3, b"first"))
        assert await small == b"first"
        assert len(peer.requests[1].body) == 100
        peer.send(frames.settings({frames.WINDOW_SIZE: 50}))  # That stream may now send 50 bytes less than nothing.
        peer.send(frames.window_update(1, 60))
        while len(peer.requests[1].body) < 110:
            await peer.frame()
        peer.send(frames.settings({frames.WINDOW_SIZE: 1 << 20}))
        while len(peer.requests[1].body) < 65_535 - len(framed(b"small")):  # The connection's window.
            await peer.frame()
        peer.send(frames.frame(frames.PING, 0, 0, b"01234567"))
        await peer.until(frames.PING)
        assert len(peer.requests[1].body) == 65_535 - len(framed(b"small"))
        peer.send(frames.window_update(0, 1 << 20))
        assert (await peer.request(1)).body == framed(body)
        assert max(len(payload) for kind, _, _, payload in peer.seen if kind == frames.DATA) <= 16_384
        peer.send(peer.answer(1, b"ok"))
        assert await call == b"ok"


async def test_frames_are_as_large_as_the_peer_allows() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel, bytes(100_000))
        peer = await listener.accept({frames.FRAME_SIZE: 1 << 20, frames.WINDOW_SIZE: 1 << 20})
        peer.send(frames.window_update(0, 1 << 20))
        await peer.request(1)
        assert max(len(payload) for kind, _, _, payload in peer.seen if kind == frames.DATA) > 16_384
        peer.send(peer.answer(1, b""))
        await call


async def test_pings_and_settings_are_acknowledged() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        peer.send(frames.frame(frames.PING, 0, 0, b"01234567"))
        _, flags, _, payload = await peer.until(frames.PING)
        assert (flags, payload) == (frames.ACK, b"01234567")
        assert (frames.SETTINGS, frames.ACK, 0, b"") in peer.seen
        await peer.request(1)
        peer.send(peer.answer(1, b""))
        await call


async def test_windows_open_as_messages_are_consumed() -> None:
    async with scripted() as (channel, listener), channel.stream(PATH, timeout_s=60) as call:
        call.write(b"go")
        peer = await listener.accept()
        await peer.until(frames.DATA, 1)
        peer.send(peer.headers(1, HEAD))
        piece = frames.frame(frames.DATA, 0, 1, framed(bytes(16_000)))
        most = (4 << 20) // 16_005
        peer.send(piece * most)  # As much as the window lets in.
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        opened = [number for kind, _, number, _ in peer.seen if kind == frames.WINDOW_UPDATE]
        assert opened.count(0) > 1
        assert 1 not in opened, "nobody has taken anything"
        for _ in range(most):
            assert len(await anext(call)) == 16_000
        while (room := _opened(peer, 1)) < 3 << 20:
            await peer.frame()
        assert room <= most * 16_005
        large = frames.frame(frames.DATA, 0, 1, framed(bytes(20 << 20))[:16_384])
        peer.send(large)  # A message that is larger than the window comes in all the same.
        left = 20 * (1 << 20) + 5 - 16_384
        window = (4 << 20) - most * 16_005 + room - 16_384
        while left:
            while window < 16_384 and window < left:
                seen = _opened(peer, 1)
                await peer.frame()
                window += _opened(peer, 1) - seen
            size = min(16_384, left)
            peer.send(frames.frame(frames.DATA, 0, 1, bytes(size)))
            left, window = left - size, window - size
        assert len(await anext(call)) == 20 << 20
        peer.send(peer.headers(1, OK, LAST))
        assert [message async for message in call] == []


def _opened(peer, number: int) -> int:
    sizes = [payload for kind, _, stream, payload in peer.seen if (kind, stream) == (frames.WINDOW_UPDATE, number)]
    return sum(struct.unpack(">I", size)[0] for size in sizes)


def whole(peer, number: int, messages: list[bytes], pad: int, sizes: list[int]) -> bytes:
    """An answer with everything in it that a peer may do."""
    early = peer.headers(number, [(":status", "103"), ("link", "x")])
    head = peer.block([*HEAD, ("x-long", "v" * 300)])
    headers = frames.frame(
        frames.HEADERS, frames.PADDED | 0x20, number, bytes([pad, 0, 0, 0, 0, 9]) + head[:50] + bytes(pad)
    )
    headers += frames.frame(frames.CONTINUATION, 0, number, head[50:60])
    headers += frames.frame(frames.CONTINUATION, frames.END_HEADERS, number, head[60:])
    body, data, at = b"".join(framed(message) for message in messages), b"", 0
    for size in [*sizes, len(body)]:
        piece, at = body[at : at + size], at + size
        data += frames.frame(frames.DATA, frames.PADDED, number, bytes([pad]) + piece + bytes(pad))
        data += frames.frame(frames.PRIORITY, 0, number, bytes(5)) + frames.frame(0x77, 0xFF, 0, b"unknown")
    return early + headers + data + peer.headers(number, OK, LAST)


@settings(max_examples=40, deadline=None)
@given(
    messages=st.lists(st.binary(max_size=200), min_size=1, max_size=5),
    pad=st.integers(0, 200),
    sizes=st.lists(st.integers(0, 60), max_size=8),
    cuts=st.lists(st.integers(1, 40), max_size=30),
)
async def test_an_answer_in_any_pieces(messages: list[bytes], pad: int, sizes: list[int], cuts: list[int]) -> None:
    async with scripted() as (channel, listener):
        stream = channel.stream(PATH, timeout_s=60)
        stream.half_close()
        unary = ask(channel)
        peer = await listener.accept()
        await peer.request(3)
        data = whole(peer, 1, messages, pad, sizes) + whole(peer, 3, messages[:1], pad, sizes)
        line, at = channel._connection, 0
        for cut in [*cuts, len(data)]:  # As the transport would, in pieces of these sizes.
            line.data_received(data[at : at + cut])
            at += cut
        assert [message async for message in stream] == messages
        assert await unary == messages[0]


async def test_a_cancelled_call_is_reset_and_its_late_data_is_dropped() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        call.cancel()
        await peer.until(frames.RST_STREAM, 1)
        assert peer.requests[1].reset == Reason.CANCEL
        other = ask(channel)
        await peer.request(3)
        peer.send(peer.answer(1, b"late"), peer.answer(3, b"other"), frames.rst_stream(1, Reason.CANCEL))
        peer.send(frames.window_update(1, 5))
        assert await other == b"other"


async def test_many_cancelled_callers_do_not_affect_others() -> None:
    async with scripted() as (channel, listener):
        stays = ask(channel, b"stays")
        await asyncio.sleep(0)
        crowd = [ask(channel, b"goes") for _ in range(1_500)]
        peer = await listener.accept()
        await peer.request(3_001)
        for call in crowd:
            call.cancel()
        await asyncio.wait(crowd)
        more = ask(channel, b"more")
        other = await listener.accept()
        assert (await other.request(1)).body == framed(b"more")
        other.send(other.answer(1, b"1"))
        assert await more == b"1"
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        resets = sum(request.reset is not None for request in peer.requests.values())
        assert 900 <= resets < 1_000, "Envoy bears a thousand"
        peer.send(peer.answer(1, b"2"))
        assert await stays == b"2"
        assert await peer.until_over() is None, "what it was not told of ends with the connection"


async def test_an_answer_before_the_end_of_the_request_ends_the_stream() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel, bytes(200_000))
        peer = await listener.accept()
        await peer.until(frames.DATA, 1)
        peer.send(peer.headers(1, [*HEAD, ("grpc-status", "8"), ("grpc-message", "enough")], LAST))
        failed = await failure(call)
        assert (failed.code(), failed.details()) == (S.RESOURCE_EXHAUSTED, "enough")
        await peer.until(frames.RST_STREAM, 1)
        assert peer.requests[1].reset == Reason.NO_ERROR


async def test_a_request_that_is_answered_before_its_end_is_ended_without_a_reset() -> None:
    async with scripted() as (channel, listener):
        streams = [channel.stream(PATH, timeout_s=60) for _ in range(2)]
        peer = await listener.accept()
        while 3 not in peer.requests:
            await peer.frame()
        peer.send(peer.answer(1, b"a"), peer.answer(3, b"b") + frames.rst_stream(3, Reason.NO_ERROR))
        assert [[message async for message in stream] for stream in streams] == [[b"a"], [b"b"]]
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        assert peer.requests[1].is_ended, "it is half-closed"
        assert not peer.requests[3].is_ended, "the peer has ended it: nothing more is said"
        assert [request.reset for request in peer.requests.values()] == [None, None]


async def test_a_deadline_resets_the_stream() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel, timeout_s=1.5)  # With the connection.
        peer = await listener.accept()
        await peer.request(1)
        failed = await failure(call)
        assert (failed.code(), failed.details(), failed.is_unprocessed) == (
            S.DEADLINE_EXCEEDED, "Deadline Exceeded", False,
        )  # fmt: skip
        await peer.until(frames.RST_STREAM, 1)
        assert peer.requests[1].reset == Reason.CANCEL
        for timeout_s in (0.0, -5.0):
            failed = await failure(ask(channel, timeout_s=timeout_s))
            assert (failed.code(), failed.is_unprocessed) == (S.DEADLINE_EXCEEDED, True)
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        assert list(peer.requests) == [1], "what is too late already is not sent"


async def test_a_goaway_lets_calls_finish_and_repeats_others_on_a_new_connection() -> None:
    async with scripted() as (channel, listener):
        calls = [ask(channel, b"%d" % n) for n in range(3)]
        await asyncio.sleep(0)  # They come first.
        stream = channel.stream(PATH, timeout_s=60)
        peer = await listener.accept()
        for n in range(3):
            await peer.request(2 * n + 1)
        while 7 not in peer.requests:
            await peer.frame()
        peer.send(peer.answer(1, b"0"))
        assert await calls[0] == b"0"
        peer.send(frames.goaway(frames.LARGEST_WINDOW, Reason.NO_ERROR))  # Soon; then:
        peer.send(frames.goaway(3, Reason.NO_ERROR))
        second = await listener.accept()
        assert (await second.request(1)).body == framed(b"2"), "the peer never began it: it begins again"
        second.send(second.answer(1, b"two"))
        assert await calls[2] == b"two"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await anext(stream)
        assert (failed.value.code(), failed.value.is_unprocessed) == (S.UNAVAILABLE, True)
        later = ask(channel, b"later")
        assert (await second.request(3)).body == framed(b"later")
        second.send(second.answer(3, b""))
        await later
        peer.send(peer.answer(3, b"one"))
        assert await calls[1] == b"one"
        assert await peer.until_over() is None
        await until(lambda: len(channel._connections) == 1, "only the new connection is left")


async def test_a_refused_stream_begins_once_more_and_then_fails_as_never_begun() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        peer.send(frames.rst_stream(1, Reason.REFUSED_STREAM))
        await peer.request(3)
        peer.send(frames.rst_stream(3, Reason.REFUSED_STREAM))
        failed = await failure(call)
        assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, True)


async def test_when_the_ids_of_streams_run_out_another_connection_is_made() -> None:
    async with scripted() as (channel, listener):
        first = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        peer.send(peer.answer(1, b""))
        await first
        channel._connection._next = (1 << 31) - 1
        last = ask(channel, b"last")
        assert (await peer.request((1 << 31) - 1)).body == framed(b"last")
        more = ask(channel, b"more")
        second = await listener.accept()
        assert (await second.request(1)).body == framed(b"more")
        second.send(second.answer(1, b"2"))
        peer.send(peer.answer((1 << 31) - 1, b"1"))
        assert (await last, await more) == (b"1", b"2")
        assert await peer.until_over() is None


async def test_messages_of_a_stream_that_has_not_begun_are_sent_when_it_does() -> None:
    async with scripted() as (channel, listener):
        hold = ask(channel)
        peer = await listener.accept({frames.MAX_STREAMS: 1})
        await peer.request(1)
        async with channel.stream(PATH, timeout_s=60) as call:
            call.write(b"a")
            call.write(b"b")
            call.half_close()
            draining = asyncio.create_task(call.drain())
            peer.send(peer.answer(1, b""))
            await hold
            assert (await peer.request(3)).body == framed(b"a") + framed(b"b")
            await draining
            peer.send(peer.answer(3, b"c", b"d"))
            assert [message async for message in call] == [b"c", b"d"]


async def test_responses_before_a_failure_are_delivered_first() -> None:
    async with scripted() as (channel, listener), channel.stream(PATH, timeout_s=60) as call:
        peer = await listener.accept()
        await peer.until(frames.HEADERS, 1)
        peer.send(peer.answer(1, b"a", b"b", end=[("grpc-status", "14"), ("grpc-message", "gone")]))
        assert [await anext(call), await anext(call)] == [b"a", b"b"]
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="gone"):
                await anext(call)
        with pytest.raises(grpc.aio.AioRpcError, match="gone"):
            await call.drain()
        call.write(b"nobody wants it")


async def test_a_message_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("channel", "calls", "streams"):
        monkeypatch.setattr(f"mesh.rpc.client.{module}.MESSAGE_BYTES", 1_000)
    async with scripted() as (channel, listener):
        failed = await failure(ask(channel, bytes(1_001)))
        assert failed.code() is S.RESOURCE_EXHAUSTED
        call = channel.stream(PATH, timeout_s=60)
        call.write(bytes(1_001))
        with pytest.raises(grpc.aio.AioRpcError, match="Sent message larger than max"):
            await call.drain()
        good = ask(channel, bytes(1_000))
        peer = await listener.accept()
        await peer.request(1)
        peer.send(peer.answer(1, bytes(1_000)))
        assert await good == bytes(1_000)


async def test_closing_the_channel_ends_calls_in_flight_and_waiting_calls() -> None:
    async with scripted() as (channel, listener):
        going = ask(channel)
        peer = await listener.accept({frames.MAX_STREAMS: 1})
        await peer.request(1)
        waiting = ask(channel)
        await asyncio.sleep(0)
        await channel.close()
        assert [(await failure(call)).code() for call in (going, waiting)] == [S.UNAVAILABLE] * 2
        assert [call.exception().is_unprocessed for call in (going, waiting)] == [False, True]
        assert (await failure(ask(channel))).is_unprocessed
        assert await peer.until_over() is None


async def test_a_call_without_a_deadline_has_no_timeout_header() -> None:
    async with scripted() as (channel, listener):
        unary = asyncio.create_task(channel.unary(PATH, b"q", timeout_s=None))
        peer = await listener.accept()
        request = await peer.request(1)
        async with channel.stream(PATH, timeout_s=None) as stream:
            stream.write(b"q")
            stream.half_close()
            second = await peer.request(3)
            assert "grpc-timeout" not in request.headers | second.headers
            peer.send(peer.answer(1, b"a"), peer.answer(3, b"b"))
            assert await unary == b"a"
            assert [message async for message in stream] == [b"b"]
