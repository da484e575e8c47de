"""A malformed request costs its own call, and not those beside it on its connection (RFC 9113, section 8.1.1)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from mesh.h2 import frames, server_connection
from mesh.h2.frames import Reason
from mesh.rpc.framing import framed
from tests.http2 import Answer, Connection
from tests.mesh.h2.test_h2_connection import ECHO, LATER, serving
from tests.mesh.h2.test_starts import Envoy

Fields = Sequence[tuple[bytes, bytes]]
MALFORMED: dict[str, Fields] = {
    "capitals": [(b"X-Name", b"a")],
    "a line break in a value": [(b"x-name", b"a\r\nx-shoal-tenant: acme")],
    "a zero in a value": [(b"x-name", b"a\0b")],
    "a space in a name": [(b"x name", b"a")],
    "a colon in a name": [(b"x:name", b"a")],
    "an empty name": [(b"", b"a")],
    "a second path": [(b":path", b"/test.Test/Other")],
    "an unknown pseudo-header": [(b":name", b"a")],
    "a header of HTTP/1": [(b"transfer-encoding", b"chunked")],
    "two lengths": [(b"content-length", b"10"), (b"content-length", b"11")],
    "a list of lengths": [(b"content-length", b"10, 10")],
    "a length that is no number": [(b"content-length", b"ten")],
    "a negative length": [(b"content-length", b"-10")],
    "an empty length": [(b"content-length", b"")],
    "an endless length": [(b"content-length", b"1" * 5_000)],
}


def ask_beside(address: str, more: Fields, path: str = ECHO, body: bytes = b"whole") -> tuple[Answer, Answer]:
    """Begin a call, make one with the fields `more`, and end the first. Return the answers of the second and first."""
    with Connection(address) as connection:
        bystander = connection.open(path)
        malformed = connection.answer(connection.open(path, more=more))
        connection.send(bystander, framed(body), end=True)
        return malformed, connection.answer(bystander)


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_is_reset_and_the_call_beside_it_goes_on(name: str) -> None:
    async with serving() as (server, later):
        malformed, bystander = await asyncio.to_thread(ask_beside, server.address, MALFORMED[name])
        assert (malformed.reset, bystander.messages) == (Reason.PROTOCOL_ERROR, [b"whole"])
        assert not later.calls


def ask_with_length(address: str, pieces: Sequence[bytes], end: str, lengths: Sequence[int]) -> tuple[Answer, Answer]:
    """Begin a call, make one with `lengths` whose body is `pieces`, and end the first. Return the answers of both."""
    with Connection(address) as connection:
        bystander = connection.open(ECHO)
        stream = connection.open(ECHO, more=[(b"content-length", b"%d" % length) for length in lengths])
        for piece in pieces:
            # Padding is no part of the body.
            connection.h2.send_data(stream, piece, pad_length=3)
        if end == "trailers":
            connection.h2.send_headers(stream, [(b"x", b"y")], end_stream=True)
        else:
            connection.h2.end_stream(stream)
        connection.flush()
        answer = connection.answer(stream)
        connection.send(bystander, framed(b"whole"), end=True)
        return answer, connection.answer(bystander)


WHOLE = framed(b"abc")


@pytest.mark.parametrize("lengths", [[7], [9], [0], [1 << 60]], ids=str)
@pytest.mark.parametrize(
    ("pieces", "end"), [([WHOLE], "data"), ([WHOLE[:3], WHOLE[3:]], "data"), ([WHOLE], "trailers")], ids=str
)
async def test_a_body_of_another_length_than_it_announces_resets_its_stream(
    pieces: list[bytes], end: str, lengths: list[int]
) -> None:
    async with serving() as (server, _):
        answer, bystander = await asyncio.to_thread(ask_with_length, server.address, pieces, end, lengths)
        assert (answer.reset, answer.messages) == (Reason.PROTOCOL_ERROR, [])
        assert bystander.messages == [b"whole"]


async def test_a_request_that_ends_with_its_headers_has_no_length() -> None:
    def ask(address: str) -> Answer:
        with Connection(address) as connection:
            stream = connection.h2.get_next_available_stream_id()
            fields = [(":method", "GET"), (":scheme", "http"), (":path", ECHO), ("content-length", "5")]
            connection.answers[stream] = Answer()
            connection.h2.send_headers(stream, fields, end_stream=True)
            connection.flush()
            return connection.answer(stream)

    async with serving() as (server, _):
        assert (await asyncio.to_thread(ask, server.address)).reset == Reason.PROTOCOL_ERROR


@pytest.mark.parametrize("lengths", [[], [len(WHOLE)], [len(WHOLE)] * 2], ids=str)
@pytest.mark.parametrize(
    ("pieces", "end"), [([WHOLE], "data"), ([WHOLE[:3], WHOLE[3:]], "data"), ([WHOLE], "trailers")], ids=str
)
async def test_a_body_of_the_length_that_it_announces_is_served(
    pieces: list[bytes], end: str, lengths: list[int]
) -> None:
    async with serving() as (server, _):
        answer, _ = await asyncio.to_thread(ask_with_length, server.address, pieces, end, lengths)
        assert (answer.reset, answer.messages) == (None, [b"abc"])


def ask_with_trailers(address: str, trailers: Fields, flags: int) -> tuple[int | None, bytes]:
    """Begin two calls, and end one with trailers, the other as usual. Return the first's reset, the second's answer."""
    with Connection(address) as connection:
        bystander, malformed = connection.open(ECHO), connection.open(LATER)
        block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in trailers)
        connection.socket.sendall(frames.frame(frames.HEADERS, frames.END_HEADERS | flags, malformed, block))
        reset = connection.answer(malformed).reset
        connection.send(bystander, framed(b"whole"), end=True)
        return reset, connection.answer(bystander).messages[0]


@pytest.mark.parametrize(
    ("trailers", "flags"),
    [([(b":path", b"/x")], frames.END_STREAM), ([(b"X", b"a")], frames.END_STREAM), ([(b"x", b"a")], 0)],
    ids=["pseudo-header", "capitals", "no end"],
)
async def test_malformed_trailers_reset_their_stream_only(trailers: Fields, flags: int) -> None:
    async with serving() as (server, later):
        reset, answer = await asyncio.to_thread(ask_with_trailers, server.address, trailers, flags)
        assert (reset, answer) == (Reason.PROTOCOL_ERROR, b"whole")
        assert not later.calls


async def test_streams_that_are_reset_for_their_trailers_take_tokens_of_the_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_connection, "_RESETS", 20)
    monkeypatch.setattr(server_connection, "_RESETS_A_S", 0)
    peer = Envoy(is_shared=False)
    for n in range(40):
        # Without END_STREAM, trailers are malformed.
        peer.connection.data_received(peer.call("a", "", f"call-{n}", 0.0, trailers=0))
    assert peer.transport.is_closing()
    assert frames.goaway(41, Reason.ENHANCE_YOUR_CALM)[9:] in bytes(peer.transport.written)
    peer.close()
