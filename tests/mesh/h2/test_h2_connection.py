"""The lean HTTP/2 frame by frame, on a real socket: windows, order, limits, and what breaks the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest

from mesh.h2 import frames, listener, server_connection
from mesh.h2.frames import Reason
from mesh.rpc.framing import framed
from mesh.rpc.server import Server
from tests.mesh.h2.scripted import Peer

ECHO = "/test.Test/Echo"
LATER = "/test.Test/Later"
CALL = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Later:
    """Answers when the test says so."""

    def __init__(self):
        self.calls = []
        self.ended = []
        self.came = asyncio.Event()

    def __call__(self, body, call):
        self.calls.append((body, call))
        call.on_end = lambda: self.ended.append(call)
        self.came.set()


def echo(body, call):
    call.reply((body[5:],), len(body) - 5)


@asynccontextmanager
async def serving():
    later = Later()
    async with Server("127.0.0.1:0", [], drain_ms=500, fast_methods={ECHO: echo, LATER: later}) as server:
        await server.serve()
        yield server, later


class Wire:
    """One socket. `frames` reads what comes; `client` is an independent HTTP/2 that says what to send."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.events = []

    async def send(self, data: bytes = b""):
        self.writer.write(self.client.data_to_send() + data)
        await self.writer.drain()

    async def read(self) -> bool:
        data = await asyncio.wait_for(self.reader.read(1 << 16), 60)
        if data:
            self.events += self.client.receive_data(data)
        return bool(data)

    async def until(self, kind, number=None):
        while True:
            for event in self.events:
                if isinstance(event, kind) and number in (None, getattr(event, "stream_id", None)):
                    return event
            assert await self.read(), f"the connection ended before {kind.__name__}"

    async def answer(self, number):
        """(grpc-status, body) of a stream that ends."""
        await self.until(h2.events.StreamEnded, number)
        body = b"".join(e.data for e in self.events if isinstance(e, h2.events.DataReceived) and e.stream_id == number)
        heads = [
            e.headers
            for e in self.events
            if isinstance(e, h2.events.ResponseReceived | h2.events.TrailersReceived) and e.stream_id == number
        ]
        return dict(heads[-1]).get("grpc-status"), body


@asynccontextmanager
async def wire(server, **settings):
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    opened = Wire(reader, writer)
    if settings:
        opened.client.local_settings = h2.settings.Settings(client=True, initial_values=settings)
    opened.client.initiate_connection()
    await opened.send()
    try:
        yield opened
    finally:
        writer.close()


def begin(client, number, path=ECHO, **kw):
    client.send_headers(number, [(":path", path), *CALL], **kw)


async def test_calls_on_one_connection_get_their_own_answers():
    async with serving() as (server, _), wire(server) as w:
        for n in range(50):
            begin(w.client, 2 * n + 1)
            w.client.send_data(2 * n + 1, framed(b"%d" % n), end_stream=True)
        await w.send()
        for n in range(50):
            assert await w.answer(2 * n + 1) == ("0", framed(b"%d" % n))


@pytest.mark.parametrize("size", [0, 1, 16_000, 16_384, 70_000, 3_000_000])
async def test_a_request_in_any_pieces(size):
    message = bytes(range(256)) * (size // 256 + 1)
    body = framed(message[:size])
    async with serving() as (server, _), wire(server) as w:
        begin(w.client, 1)
        at = 0
        while at < len(body):
            room = min(w.client.local_flow_control_window(1) - 8, 9_999)
            if room <= 0:
                await w.send()
                await w.read()
                continue
            w.client.send_data(1, body[at : at + room], pad_length=7 if at % 2 else None)
            at += room
        w.client.end_stream(1)
        await w.send()
        status, got = await read_all(w, 1)
        assert (status, got) == ("0", body)


async def read_all(w, number):
    """As `answer`, opening the windows on the way."""
    body = b""
    seen = 0
    while True:
        while seen < len(w.events):
            event = w.events[seen]
            seen += 1
            if isinstance(event, h2.events.DataReceived) and event.stream_id == number:
                body += event.data
                w.client.acknowledge_received_data(event.flow_controlled_length, number)
                await w.send()
            if isinstance(event, h2.events.StreamEnded) and event.stream_id == number:
                heads = [
                    e.headers
                    for e in w.events
                    if isinstance(e, h2.events.TrailersReceived | h2.events.ResponseReceived)
                ]
                return dict(heads[-1]).get("grpc-status"), body
        assert await w.read()


async def test_an_answer_waits_for_the_windows_of_the_peer():
    async with serving() as (server, _), wire(server) as w:
        w.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
        await w.send()
        await w.until(h2.events.SettingsAcknowledged)
        begin(w.client, 1)
        body = framed(bytes(30_000))
        w.client.send_data(1, body[:16_000])
        w.client.send_data(1, body[16_000:], end_stream=True)
        begin(w.client, 3)
        w.client.send_data(3, framed(b"small"), end_stream=True)
        await w.send()
        assert await w.answer(3) == ("0", framed(b"small")), "a stream that has room does not wait for one that has not"
        got = sum(len(e.data) for e in w.events if isinstance(e, h2.events.DataReceived) and e.stream_id == 1)
        assert got == 1000
        w.client.increment_flow_control_window(40_000, 1)
        await w.send()
        assert await w.answer(1) == ("0", body)


async def test_headers_in_many_frames_and_trailers_of_the_client():
    async with serving() as (server, _), wire(server) as w:
        long = ("x-long", "v" * 40_000)
        w.client.send_headers(1, [(":path", ECHO), *CALL, long])
        w.client.send_data(1, framed(b"a"))
        w.client.send_headers(1, [("x-trailer", "1")], end_stream=True)
        await w.send()
        assert await w.answer(1) == ("0", framed(b"a"))


async def test_ping_is_answered():
    async with serving() as (server, _), wire(server) as w:
        w.client.ping(b"12345678")
        await w.send()
        assert (await w.until(h2.events.PingAckReceived)).ping_data == b"12345678"


async def test_a_cancelled_call_is_abandoned_and_nothing_is_sent_for_it():
    async with serving() as (server, later), wire(server) as w:
        begin(w.client, 1, LATER)
        w.client.send_data(1, framed(b"x"), end_stream=True)
        await w.send()
        await later.came.wait()
        w.client.reset_stream(1, Reason.CANCEL)
        begin(w.client, 3)
        w.client.send_data(3, framed(b"y"), end_stream=True)
        await w.send()
        assert await w.answer(3) == ("0", framed(b"y"))
        ((_, call),) = later.calls
        assert later.ended == [call]
        call.reply((b"too late",), 8)


async def test_the_deadline_of_a_call_is_enforced():
    async with serving() as (server, later), wire(server) as w:
        w.client.send_headers(1, [(":path", LATER), *CALL, ("grpc-timeout", "50m")])
        w.client.send_data(1, framed(b"x"), end_stream=True)
        await w.send()
        status, body = await w.answer(1)
        assert (status, body) == ("4", b"")
        assert len(later.ended) == 1


async def test_a_connection_that_is_lost_abandons_its_calls():
    async with serving() as (server, later):
        async with wire(server) as w:
            begin(w.client, 1, LATER)
            w.client.send_data(1, framed(b"x"), end_stream=True)
            await w.send()
            await later.came.wait()
        while not later.ended:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def stoppable(**short):
    """A client by frames, and what stops its server."""
    server = Server("127.0.0.1:0", [], drain_ms=30_000, fast_methods={ECHO: echo, **short})
    await server.__aenter__()
    host, _, port = server.address.rpartition(":")
    peer = Peer(*await asyncio.open_connection(host, int(port)))
    peer.send(PRE)
    await peer.until(frames.SETTINGS)

    def stop():
        return asyncio.create_task(server.__aexit__(None, None, None))

    yield peer, stop
    peer.writer.close()


def call(peer, number, path, body=b"x"):
    fields = peer.headers(number, [(":path", path), *CALL])
    peer.send(fields, frames.frame(frames.DATA, frames.END_STREAM, number, framed(body)))


async def answered(peer, number):
    """The body of an answer, once all of it is there."""
    while not any(
        kind == frames.HEADERS and flags & frames.END_STREAM and of == number for kind, flags, of, _ in peer.seen
    ):
        assert await peer.frame() is not None, "the connection ended before the answer"
    return b"".join(payload for kind, _, of, payload in peer.seen if kind == frames.DATA and of == number)


async def heard(peer):
    """Reads the first goodbye, and answers the question that comes with it."""
    _, _, _, goodbye = await peer.until(frames.GOAWAY)
    assert struct.unpack(">II", goodbye) == (frames.LARGEST_WINDOW, Reason.NO_ERROR)
    _, _, _, question = await peer.until(frames.PING)
    peer.send(frames.frame(frames.PING, frames.ACK, 0, question))


async def test_a_stop_sends_goaway_and_lets_the_call_in_flight_finish(monkeypatch):
    # It ends because the peer closes it, and not before.
    monkeypatch.setattr(server_connection, "LINGER_S", 60.0)
    later = Later()
    async with stoppable(**{LATER: later}) as (peer, stop):
        call(peer, 1, LATER)
        await later.came.wait()
        stopping = stop()
        await heard(peer)
        _, _, _, last = await peer.until(frames.GOAWAY)
        assert struct.unpack(">II", last) == (1, Reason.NO_ERROR)
        assert not stopping.done()
        later.calls[0][1].reply((b"z",), 1)
        assert await answered(peer, 1) == framed(b"z")
        assert await peer.frame() is None
        # A peer that has not read so far yet may still write, again and again.
        for _ in range(3):
            peer.send(frames.window_update(0, 99))
            await peer.writer.drain()
            await asyncio.sleep(0.05)
        assert not stopping.done()
        peer.writer.close()
        await asyncio.wait_for(stopping, 60)


async def test_streams_opened_before_the_goaway_is_read_are_served(monkeypatch):
    monkeypatch.setattr(listener, "_GOAWAY_READ_S", 60.0)
    async with stoppable() as (peer, stop):
        stopping = stop()
        await asyncio.sleep(0.5)
        call(peer, 1, ECHO, b"late")
        await heard(peer)
        assert await answered(peer, 1) == framed(b"late")
        await peer.until_over()
        goodbyes = [payload for kind, _, _, payload in peer.seen if kind == frames.GOAWAY]
        assert struct.unpack(">II", goodbyes[-1]) == (1, Reason.NO_ERROR)
        peer.writer.close()
        await asyncio.wait_for(stopping, 60)


@pytest.mark.parametrize("speaks", [True, False], ids=["says nothing of the goodbye", "never spoke"])
async def test_a_peer_that_is_mute_delays_no_stop_for_long(speaks):
    server = Server("127.0.0.1:0", [], drain_ms=60_000, fast_methods={})
    await server.__aenter__()
    host, _, port = server.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(PRE if speaks else b"")
    await asyncio.sleep(0.1)
    await asyncio.wait_for(server.__aexit__(None, None, None), 30)
    writer.close()


PRE = frames.PREFACE + frames.settings({})
OPEN = hpack.Encoder().encode([(":path", ECHO), *CALL])

BROKEN = {
    "http/1": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", Reason.PROTOCOL_ERROR),
    "no settings": (frames.PREFACE + frames.frame(frames.PING, 0, 0, bytes(8)), Reason.PROTOCOL_ERROR),
    "too large a frame": (PRE + frames.opening(frames.DATA, 0, 1, 16_385), Reason.FRAME_SIZE_ERROR),
    "data on a stream that is not open": (PRE + frames.frame(frames.DATA, 0, 1, b"x"), Reason.PROTOCOL_ERROR),
    "data on stream 0": (PRE + frames.frame(frames.DATA, 0, 0, b"x"), Reason.PROTOCOL_ERROR),
    "headers on an even stream": (PRE + frames.frame(frames.HEADERS, 4, 2, OPEN), Reason.PROTOCOL_ERROR),
    "headers on stream 0": (PRE + frames.frame(frames.HEADERS, 4, 0, OPEN), Reason.PROTOCOL_ERROR),
    "a block that is none": (
        PRE + frames.frame(frames.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
        Reason.COMPRESSION_ERROR,
    ),
    "a block that is not continued": (
        PRE + frames.frame(frames.HEADERS, 0, 1, OPEN) + frames.frame(frames.PING, 0, 0, bytes(8)),
        Reason.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (PRE + frames.frame(frames.CONTINUATION, 4, 1, b""), Reason.PROTOCOL_ERROR),
    "empty continuations for ever": (
        PRE + frames.frame(frames.HEADERS, 0, 1, OPEN) + frames.frame(frames.CONTINUATION, 0, 1, b"") * 100,
        Reason.ENHANCE_YOUR_CALM,
    ),
    "a block without end": (
        PRE + frames.frame(frames.HEADERS, 0, 1, OPEN) + frames.frame(frames.CONTINUATION, 0, 1, bytes(16_000)) * 10,
        Reason.ENHANCE_YOUR_CALM,
    ),
    "more padding than payload": (
        PRE + frames.frame(frames.HEADERS, 4, 1, OPEN) + frames.frame(frames.DATA, frames.PADDED, 1, b"\x09abc"),
        Reason.PROTOCOL_ERROR,
    ),
    "data after the end": (
        PRE
        + frames.frame(frames.HEADERS, 4, 1, hpack.Encoder().encode([(":path", LATER), *CALL]))
        + frames.frame(frames.DATA, 1, 1, framed(b"x"))
        + frames.frame(frames.DATA, 1, 1, framed(b"x")),
        Reason.STREAM_CLOSED,
    ),
    "a window by nothing": (PRE + frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(4)), Reason.PROTOCOL_ERROR),
    "a window setting that widens a stream too much": (
        PRE
        + frames.frame(frames.HEADERS, 4, 1, hpack.Encoder().encode([(":path", LATER), *CALL]))
        + frames.window_update(1, frames.LARGEST_WINDOW - frames.DEFAULT_WINDOW)
        + frames.settings({frames.WINDOW_SIZE: frames.DEFAULT_WINDOW + 1}),
        Reason.FLOW_CONTROL_ERROR,
    ),
    "headers that are too short for their priority": (
        PRE + frames.frame(frames.HEADERS, frames.END_HEADERS | frames.PRIORITIZED, 1, b"\x82"),
        Reason.FRAME_SIZE_ERROR,
    ),
    "too large a window": (PRE + frames.window_update(0, frames.LARGEST_WINDOW), Reason.FLOW_CONTROL_ERROR),
    "a window of 3 bytes": (PRE + frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)), Reason.FRAME_SIZE_ERROR),
    "settings of 5 bytes": (PRE + frames.frame(frames.SETTINGS, 0, 0, bytes(5)), Reason.FRAME_SIZE_ERROR),
    "a frame size that is none": (PRE + frames.settings({frames.FRAME_SIZE: 1}), Reason.PROTOCOL_ERROR),
    "a window setting that is none": (PRE + frames.settings({frames.WINDOW_SIZE: 1 << 31}), Reason.FLOW_CONTROL_ERROR),
    "a short ping": (PRE + frames.frame(frames.PING, 0, 0, bytes(7)), Reason.FRAME_SIZE_ERROR),
    "a push": (PRE + frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(8)), Reason.PROTOCOL_ERROR),
    "a reset of what is not open": (PRE + frames.rst_stream(1, Reason.CANCEL), Reason.PROTOCOL_ERROR),
    "a short reset": (PRE + frames.frame(frames.RST_STREAM, 0, 1, b"x"), Reason.FRAME_SIZE_ERROR),
    "a short priority": (PRE + frames.frame(frames.PRIORITY, 0, 1, b"x"), Reason.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_connection_gets_a_reason_and_others_continue(name):
    data, reason = BROKEN[name]
    async with serving() as (server, _), wire(server) as good:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        came = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        assert goodbye_in(came) == reason
        begin(good.client, 1)
        good.client.send_data(1, framed(b"still here"), end_stream=True)
        await good.send()
        assert await good.answer(1) == ("0", framed(b"still here"))


def goodbye_in(data: bytes) -> Reason | None:
    at, found = 0, None
    while at < len(data):
        high, low, kind, _, _ = frames.HEADER.unpack_from(data, at)
        size = high << 16 | low
        if kind == frames.GOAWAY:
            found = Reason(struct.unpack_from(">I", data, at + 13)[0])
        at += 9 + size
    return found


@pytest.mark.parametrize(
    "ending",
    [
        lambda number: frames.rst_stream(number, Reason.CANCEL),
        lambda number: frames.window_update(number, (1 << 31) - 1),
    ],
    ids=["by the peer", "by us, after a window that is too large"],
)
async def test_streams_that_are_opened_and_cancelled_without_end_are_too_many(caplog, ending, monkeypatch):
    # On a busy machine, the frames below take so long that most resets are allowed again.
    monkeypatch.setattr(server_connection, "_RESETS_A_S", 0)
    async with serving() as (server, _):
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        block = hpack.Encoder()
        block.header_table_size = 0
        writer.write(PRE)
        opening = block.encode([(":path", LATER), *CALL])
        again = block.encode([(":path", LATER), *CALL])
        # A few calls in between are answered, as an attacker would do it.
        other = block.encode([(":path", ECHO), *CALL])
        for n in range(25_000):
            is_echo = n % 5_000 == 4_999
            writer.write(frames.frame(frames.HEADERS, 4, 2 * n + 1, other if is_echo else again if n else opening))
            writer.write(frames.frame(frames.DATA, 1, 2 * n + 1, framed(b"x")) if is_echo else ending(2 * n + 1))
        with contextlib.suppress(ConnectionResetError):  # It closes while this side still talks.
            while await asyncio.wait_for(reader.read(1 << 16), 60):
                pass
        writer.close()
        assert "ENHANCE_YOUR_CALM: more than 10000 streams were cancelled" in caplog.text


async def test_more_streams_than_allowed_are_refused_not_queued():
    async with serving() as (server, later), wire(server) as w:
        await w.until(h2.events.RemoteSettingsChanged)
        most = w.client.remote_settings.max_concurrent_streams
        block = hpack.Encoder()
        block.header_table_size = 0
        opening = block.encode([(":path", LATER), *CALL])
        again = block.encode([(":path", LATER), *CALL])
        data = b"".join(
            frames.frame(frames.HEADERS, 4, 2 * n + 1, again if n else opening)
            + frames.frame(frames.DATA, 1, 2 * n + 1, framed(b"x"))
            for n in range(most + 3)
        )
        w.writer.write(w.client.data_to_send() + data)
        resets = 0
        rest = b""
        while resets < 3:
            rest += await asyncio.wait_for(w.reader.read(1 << 16), 60)
            resets = rest.count(frames.HEADER.pack(0, 4, frames.RST_STREAM, 0, 2 * most + 1)[:5])
        assert struct.pack(">I", Reason.REFUSED_STREAM) in rest
        assert len(later.calls) == most
