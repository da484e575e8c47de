"""Broken or silent peers of the lean client: a clear error for the calls concerned, and for no others."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.h2 import frames
from mesh.h2.frames import Reason
from mesh.rpc.client import channel as channel_module
from mesh.rpc.client.channel import Channel
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.framing import framed
from mesh.rpc.interceptors import translate
from shoal.errors import ResourceExhausted, Unavailable
from tests.breakable import until
from tests.free_ports import free_port
from tests.long_form import by_form
from tests.mesh.h2.scripted import HEAD, LAST, OK, Scripted, scripted
from tests.mesh.h2.test_lean_protocol import ask, failure

S = grpc.StatusCode


def data(body: bytes, flags: int = 0):
    return lambda peer: peer.headers(1, HEAD) + frames.frame(frames.DATA, flags, 1, body) + peer.headers(1, OK, LAST)


def trailers(*fields: tuple[str, str]):
    return lambda peer: peer.answer(1, b"answer", end=fields)


def only(*fields: tuple[str, str]):
    return lambda peer: peer.headers(1, fields, LAST)


def page(status: int):
    """A web page instead of an answer."""
    return lambda peer: (
        peer.headers(1, [(":status", str(status)), ("content-type", "text/html")])
        + frames.frame(frames.DATA, frames.END_STREAM, 1, b"<html>")
    )


ANSWERS = {
    "the server's own error": (trailers(("grpc-status", "5"), ("grpc-message", "no such")), S.NOT_FOUND, "no such"),
    "only trailers": (only(*HEAD, ("grpc-status", "5"), ("grpc-message", "a%20b%C3%A4")), S.NOT_FOUND, "a bä"),
    "a message that is badly encoded": (trailers(("grpc-status", "9"), ("grpc-message", "%zz%ff%4")),
                                        S.FAILED_PRECONDITION, "%zz�%4"),
    "a status beyond all": (trailers(("grpc-status", "17")), S.UNKNOWN, ""),
    "a status that is none": (trailers(("grpc-status", "five")), S.UNKNOWN, ""),
    "a status that is huge": (trailers(("grpc-status", "9" * 5_000)), S.UNKNOWN, ""),
    "a status below all": (trailers(("grpc-status", "-1")), S.UNKNOWN, ""),
    "no status": (trailers(("x", "y")), S.UNKNOWN, "without a grpc-status"),
    "an end in the middle": (lambda peer: peer.headers(1, HEAD) + frames.frame(frames.DATA, 1, 1, framed(b"x")),
                             S.UNKNOWN, "without a grpc-status"),
    "no message": (lambda peer: peer.answer(1), S.INTERNAL, "without a message"),
    "two messages": (lambda peer: peer.answer(1, b"a", b"b"), S.INTERNAL, "more than one message"),
    "two messages in a frame": (data(framed(b"a") + framed(b"b")), S.INTERNAL, "more than one message"),
    "half a message": (data(framed(b"abc")[:-1]), S.INTERNAL, "inside a message"),
    "half a prefix": (data(b"\0\0"), S.INTERNAL, "inside a message"),
    "a compressed message": (data(b"\1" + framed(b"abc")[1:]), S.INTERNAL, "compressed"),
    "flags that are none": (data(b"\7" + framed(b"abc")[1:]), S.INTERNAL, "flags 7"),
    "a message that is too large": (data(b"\0\x7f\xff\xff\xff"), S.RESOURCE_EXHAUSTED, "larger than max"),
    "data first": (lambda _: frames.frame(frames.DATA, 0, 1, framed(b"x")), S.INTERNAL, "no headers"),
    "headers in between": (lambda peer: peer.headers(1, HEAD) * 2, S.INTERNAL, "headers inside"),
    "an early header at the end": (only((":status", "103")), S.UNKNOWN, "status: 103"),
    "no http status": (only(("x", "y")), S.UNKNOWN, "status"),
    "an http status that is none": (only((":status", "2e2")), S.UNKNOWN, "status: 2e2"),
    "another content": (lambda peer: peer.headers(1, [(":status", "200"), ("content-type", "text/html")]),
                        S.UNKNOWN, "content-type text/html"),
    "a status for all http": (only((":status", "503"), ("grpc-status", "8")), S.RESOURCE_EXHAUSTED, ""),
    **{f"http {status}": (page(status), code, f"Received http2 header with status: {status}")
       for status, code in {400: S.INTERNAL, 401: S.UNAUTHENTICATED, 403: S.PERMISSION_DENIED, 404: S.UNIMPLEMENTED,
                            429: S.UNAVAILABLE, 502: S.UNAVAILABLE, 503: S.UNAVAILABLE, 504: S.UNAVAILABLE,
                            500: S.UNKNOWN, 204: S.UNKNOWN, 302: S.UNKNOWN}.items()},
    **{f"reset {reason}": (lambda _, reason=reason: frames.rst_stream(1, reason), code, f"error code {reason}")
       for reason, code in {0: S.INTERNAL, 1: S.INTERNAL, 2: S.INTERNAL, 3: S.INTERNAL, 8: S.CANCELLED,
                            11: S.RESOURCE_EXHAUSTED, 12: S.PERMISSION_DENIED, 77: S.INTERNAL}.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_that_is_none_fails_its_call_and_no_other(name: str) -> None:
    said, code, words = ANSWERS[name]
    async with scripted() as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        other = ask(channel)
        await peer.request(3)
        peer.send(said(peer))
        failed = await failure(call)
        assert failed.code() is code
        assert words in failed.details()
        assert not failed.is_unprocessed
        peer.send(peer.answer(3, b"fine"))
        assert await other == b"fine"


async def test_a_failure_has_its_trailing_metadata() -> None:
    async with scripted() as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        end = [("grpc-status", "8"), ("retry-after-ms", "250"), ("x-bin", "AP8"), ("x-a", "b")]
        peer.send(peer.answer(1, end=end))
        failed = await failure(call)
        assert list(failed.trailing_metadata()) == [("retry-after-ms", "250"), ("x-bin", b"\0\xff"), ("x-a", "b")]
        known = translate(failed, "asking")
        assert isinstance(known, ResourceExhausted)
        assert (known.message, known.retry_after_ms) == ("asking: no details", 250)
        again = pickle.loads(pickle.dumps(failed))
        assert isinstance(again, CallFailed)
        assert (again.code(), again.trailing_metadata()) == (failed.code(), failed.trailing_metadata())
        call = ask(channel)
        await peer.request(3)
        peer.send(peer.answer(3, end=[("grpc-status", "8"), ("x-bin", "!"), ("x-a", "b")]))
        assert list((await failure(call)).trailing_metadata()) == [("x-a", "b")]


def goaway(payload: bytes) -> bytes:
    return frames.frame(frames.GOAWAY, 0, 0, payload)


BROKEN = {
    "http/1": (lambda _: b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", Reason.FRAME_SIZE_ERROR),
    "too large a frame": (lambda _: frames.opening(frames.DATA, 0, 1, 16_385), Reason.FRAME_SIZE_ERROR),
    "data on a stream that nobody opened": (lambda _: frames.frame(frames.DATA, 0, 3, b"x"), Reason.PROTOCOL_ERROR),
    "data on an even stream": (lambda _: frames.frame(frames.DATA, 0, 2, b"x"), Reason.PROTOCOL_ERROR),
    "data on stream 0": (lambda _: frames.frame(frames.DATA, 0, 0, b"x"), Reason.PROTOCOL_ERROR),
    "headers on a stream that nobody opened": (lambda p: p.headers(5, HEAD), Reason.PROTOCOL_ERROR),
    "a push": (lambda p: frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(4) + p.block(HEAD)), Reason.PROTOCOL_ERROR),
    "a reset of what nobody opened": (lambda _: frames.rst_stream(3, Reason.CANCEL), Reason.PROTOCOL_ERROR),
    "a short reset": (lambda _: frames.frame(frames.RST_STREAM, 0, 1, b"x"), Reason.FRAME_SIZE_ERROR),
    "a block that is none": (lambda _: frames.frame(frames.HEADERS, 4, 1, b"\xff" * 6), Reason.COMPRESSION_ERROR),
    "a block that is not continued": (
        lambda p: p.headers(1, HEAD, 0) + frames.frame(frames.PING, 0, 0, bytes(8)), Reason.PROTOCOL_ERROR),
    "a continuation of nothing": (lambda _: frames.frame(frames.CONTINUATION, 4, 1, b""), Reason.PROTOCOL_ERROR),
    "continuations for ever": (
        lambda p: p.headers(1, HEAD, 0) + frames.frame(frames.CONTINUATION, 0, 1) * 100, Reason.ENHANCE_YOUR_CALM),
    "headers without end": (
        lambda p: p.headers(1, HEAD, 0) + frames.frame(frames.CONTINUATION, 0, 1, bytes(16_000)) * 10,
        Reason.ENHANCE_YOUR_CALM),
    "more padding than payload": (
        lambda p: p.headers(1, HEAD) + frames.frame(frames.DATA, frames.PADDED, 1, b"\x09abc"), Reason.PROTOCOL_ERROR),
    "a window by nothing": (lambda _: frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(4)), Reason.PROTOCOL_ERROR),
    "too large a window": (lambda _: frames.window_update(0, frames.LARGEST_WINDOW), Reason.FLOW_CONTROL_ERROR),
    "settings of 5 bytes": (lambda _: frames.frame(frames.SETTINGS, 0, 0, bytes(5)), Reason.FRAME_SIZE_ERROR),
    "a frame size that is none": (lambda _: frames.settings({frames.FRAME_SIZE: 1}), Reason.PROTOCOL_ERROR),
    "a window setting that is none": (
        lambda _: frames.settings({frames.WINDOW_SIZE: 1 << 31}), Reason.FLOW_CONTROL_ERROR),
    "a short ping": (lambda _: frames.frame(frames.PING, 0, 0, bytes(7)), Reason.FRAME_SIZE_ERROR),
    "a short goodbye": (lambda _: goaway(bytes(7)), Reason.FRAME_SIZE_ERROR),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_a_protocol_error_ends_the_connection_and_the_next_call_reconnects(name: str) -> None:
    said, reason = BROKEN[name]
    async with scripted(draw=lambda: 0.0) as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        peer.send(said(peer))
        failed = await failure(call)
        assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, False)
        assert reason.name in failed.details()
        assert isinstance(translate(failed), Unavailable)
        assert await peer.until_over() == reason
        assert await _asked_until_answered(channel, listener) == b"again"


async def _asked_until_answered(channel: Channel, listener: Scripted) -> bytes:
    """Right after a loss, calls fail at once for a moment: as never begun."""
    while True:
        call = ask(channel)
        taken = asyncio.create_task(listener.accept())
        await asyncio.wait([call, taken], return_when=asyncio.FIRST_COMPLETED)
        if taken.done():
            peer = taken.result()
            await peer.request(1)
            peer.send(peer.answer(1, b"again"))
            return await call
        taken.cancel()
        failed = await failure(call)
        assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, True)
        await asyncio.sleep(0.01)


async def test_more_of_a_stream_than_its_window_ends_the_connection() -> None:
    async with scripted() as (channel, listener), channel.stream("/t/T", timeout_s=60) as call:
        peer = await listener.accept()
        await peer.until(frames.HEADERS, 1)
        peer.send(peer.headers(1, HEAD), frames.frame(frames.DATA, 0, 1, framed(bytes(16_000))) * 300)
        assert await peer.until_over() == Reason.FLOW_CONTROL_ERROR
        with pytest.raises(grpc.aio.AioRpcError, match="more on stream 1 than its window"):
            async for _ in call:
                pass


async def test_a_stream_whose_window_is_made_too_large_is_reset() -> None:
    async with scripted() as (channel, listener), channel.stream("/t/T", timeout_s=60) as call:
        peer = await listener.accept()
        await peer.until(frames.HEADERS, 1)
        peer.send(frames.window_update(1, frames.LARGEST_WINDOW))
        with pytest.raises(grpc.aio.AioRpcError, match="FLOW_CONTROL_ERROR") as failed:
            await anext(call)
        assert failed.value.code() is S.INTERNAL
        await peer.until(frames.RST_STREAM, 1)
        assert peer.requests[1].reset == Reason.FLOW_CONTROL_ERROR


async def test_a_lost_connection_fails_calls_in_flight() -> None:
    async with scripted() as (channel, listener):
        calls = [ask(channel) for _ in range(3)]
        stream = channel.stream("/t/T", timeout_s=60)
        peer = await listener.accept()
        for number in range(3):
            await peer.request(2 * number + 3)
        peer.send(peer.headers(3, HEAD), frames.frame(frames.DATA, 0, 3, framed(b"whole, but no status")))
        await peer.writer.drain()
        peer.writer.close()
        for call in calls:
            failed = await failure(call)
            assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, False)
            assert failed.details().startswith(f"lost {listener.address}")
        with pytest.raises(grpc.aio.AioRpcError, match="lost "):
            await anext(stream)


async def test_a_silent_peer_is_pinged_and_disconnected() -> None:
    async with scripted(tick_s=0.1) as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        failed = await failure(call)
        assert failed.code() is S.UNAVAILABLE
        assert "does not acknowledge PING" in failed.details()
        await peer.until_over()
        assert [flags for kind, flags, _, _ in peer.seen if kind == frames.PING] == [0]


async def test_a_peer_that_answers_pings_may_take_its_time_and_one_without_calls_is_left_alone() -> None:
    async with scripted(tick_s=0.05) as (channel, listener):
        call = ask(channel)
        peer = await listener.accept()
        await peer.request(1)
        for _ in range(5):
            _, _, _, payload = await peer.until(frames.PING)
            peer.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        peer.send(peer.answer(1, b"at last"))
        assert await call == b"at last"
        await asyncio.sleep(0.5)  # Ten looks.
        again = ask(channel)
        await peer.request(3)
        peer.send(peer.answer(3, b"still here"))
        assert await again == b"still here"


async def test_calls_without_a_server_fail_immediately_and_a_later_server_is_found(tmp_path: Path) -> None:
    port = free_port()
    async with Channel(f"127.0.0.1:{port}") as channel, Channel(f"unix:{tmp_path}/none.sock") as nowhere:
        for one in (channel, nowhere):
            failures = [await failure(ask(one)) for _ in range(20)]
            assert {(failed.code(), failed.is_unprocessed) for failed in failures} == {(S.UNAVAILABLE, True)}
            assert all("cannot reach" in failed.details() for failed in failures)
            stream = one.stream("/t/T", timeout_s=60)
            with pytest.raises(grpc.aio.AioRpcError, match="cannot reach"):
                await anext(stream)
        there = Scripted()
        await there.start(port)
        try:
            assert await _asked_until_answered(channel, there) == b"again"
        finally:
            await there.stop()


async def test_an_invalid_address_fails_calls_immediately() -> None:
    async with Channel("127.0.0.1:http") as channel:
        for _ in range(3):
            failed = await failure(ask(channel))
            assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, True)


async def test_a_peer_that_never_sends_settings_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_CONNECT_S", 0.3)
    async with scripted() as (channel, listener):
        call, short = ask(channel), ask(channel, timeout_s=0.05)
        peer = await listener.accept(greets=False)
        assert (await failure(short)).code() is S.DEADLINE_EXCEEDED
        failed = await failure(call)
        assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, True)
        assert await peer.until_over() is None


@pytest.mark.parametrize(
    "said", [frames.frame(frames.PING, 0, 0, bytes(8)), b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(99), b""],
    ids=["a ping", "http/1", "an end"],
)  # fmt: skip
async def test_a_peer_that_begins_with_another_frame_is_unreachable(said: bytes) -> None:
    async with scripted() as (channel, listener):
        call = ask(channel)
        peer = await listener.accept(greets=False)
        peer.send(said)
        if not said:
            peer.writer.close()
        failed = await failure(call)
        assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, True)


async def test_repeated_immediate_goaways_are_followed_by_backoff() -> None:
    async with scripted() as (channel, listener):
        connections = 0

        async def goodbye() -> None:
            nonlocal connections
            while True:
                peer = await listener.accept()
                connections += 1
                peer.send(frames.goaway(0, Reason.ENHANCE_YOUR_CALM, "not you"))

        task = asyncio.create_task(goodbye())
        for _ in range(200):
            failed = await failure(ask(channel))
            assert (failed.code(), failed.is_unprocessed) == (S.UNAVAILABLE, True)
        assert connections < 20
        task.cancel()
        await until(lambda: not channel._connections, "none of these connections is kept")


@settings(max_examples=by_form(60, 150), deadline=None)
@given(
    spots=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=3)), min_size=1, max_size=6),
    cut=st.floats(0, 1),
)
async def test_whatever_bytes_come_the_call_ends(spots: list[tuple[float, bytes]], cut: float) -> None:
    async with scripted() as (channel, listener):
        call = ask(channel)
        stream = channel.stream("/t/T", timeout_s=60)
        peer = await listener.accept()
        await peer.request(3)
        answer = peer.answer(1, b"a" * 50, b"b" * 50) + peer.answer(3, b"c" * 100) + frames.window_update(1, 7)
        said = bytearray(answer)
        for where, what in spots:
            at = int(where * (len(said) - 1))
            said[at : at + len(what)] = what
        line, at = channel._connection, int(cut * len(said))
        line.data_received(bytes(said[:at]))
        line.data_received(bytes(said[at:]))
        peer.writer.close()
        for ends in (call, asyncio.ensure_future(_all(stream))):
            done, _ = await asyncio.wait([ends], timeout=30)
            assert done
            assert ends.exception() is None or isinstance(ends.exception(), CallFailed)


async def _all(stream: StreamCall) -> list[bytes]:
    return [message async for message in stream]
