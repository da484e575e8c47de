"""HTTP/1.1 on the server core: framing, order, limits, and everything that is refused."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, cast

import pytest
import pytest_asyncio

from mesh.h2 import frames
from mesh.h2.headers import LIST_BYTES, LIST_FIELDS
from mesh.h2.listener import Listener
from mesh.h2.peer import READ_BYTES
from mesh.h2.server_connection import Memory
from mesh.h2.stream import RequestHandler, ServerStream
from mesh.http1 import connection as http1
from mesh.http1 import requests
from mesh.http1.connection import Http1Connection
from mesh.http1.requests import RequestReader
from tests.breakable import until
from tests.mesh.h2.test_memory_account import Transport
from tests.mesh.http1.raw import RawClient

TEXT = [(b"content-type", b"text/plain")]


def whole(body: bytes) -> list[tuple[bytes, bytes]]:
    return [*TEXT, (b"content-length", b"%d" % len(body))]


class Echo:
    """Answers with the body, once all of it is there."""

    is_task = False

    def __init__(self, app: App, stream: ServerStream) -> None:
        self.app = app
        self.stream = stream
        self.body = b""

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        self.stream.hold(size)
        self.body += piece
        if is_end:
            self.stream.respond(self.stream.encode_head(200, whole(self.body)), self.body)

    def stalled(self, idle_s: float) -> None:
        self.stream.respond(self.stream.encode_head(408, whole(b"")))

    def disconnected(self) -> None:
        self.app.disconnects += 1


class Waiting(Echo):
    """Answers when the test says so."""

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        if is_end:
            self.app.waiting.append(self.stream)


class App:
    """A few resources."""

    def __init__(self) -> None:
        self.disconnects = 0
        self.paths: list[str] = []
        self.methods: list[str] = []
        self.waiting: list[ServerStream] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def request(self, stream: ServerStream) -> RequestHandler:
        self.paths.append(stream.head.path)
        self.methods.append(stream.head.method)
        match stream.head.path:
            case "/wait":
                return Waiting(self, stream)
            case "/events":
                self.tasks.add(asyncio.create_task(self._events(stream)))
            case "/early":
                stream.respond(stream.encode_head(404, whole(b"no")), b"no")
            case "/large":
                body = bytes(8 << 20)
                stream.respond(stream.encode_head(200, whole(body)), body)
            case "/broken":
                raise ValueError("a fault of the application")
            case _:
                return Echo(self, stream)
        return Waiting(self, stream)

    def reject(self, stream: ServerStream) -> None:
        stream.respond(stream.encode_head(429, whole(b"")))

    async def _events(self, stream: ServerStream) -> None:
        stream.start(stream.encode_head(200, TEXT))
        for number in range(3):
            sent = asyncio.get_running_loop().create_future()
            stream.send(b"event %d\n" % number, partial(sent.set_result, None))
            await sent
        stream.end()


class Served:
    def __init__(self, address: str, app: App, memory: Memory, listener: Listener) -> None:
        self.address = address
        self.app = app
        self.memory = memory
        self.listener = listener

    def client(self) -> Any:
        return _Client(self.address)


class _Client:
    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> RawClient:
        self._client = await RawClient.connect(self._address)
        return self._client

    async def __aexit__(self, *exc: object) -> None:
        await self._client.__aexit__()


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    app, memory = App(), Memory(64 << 20, 64 << 20)
    listener = Listener("127.0.0.1:0", app, memory=memory, connect=partial(Http1Connection, app))
    yield Served(await listener.start(), app, memory, listener)
    await listener.drain(1.0)


async def test_a_connection_serves_one_request_after_the_other(served: Served) -> None:
    async with served.client() as client:
        for body in (b"", b"a", bytes(range(256)) * 1000):
            answer = await client.request("POST", "/echo", body)
            assert (answer.status, answer.body == body) == (200, True)
        assert (await client.request("GET", "/x?y=%20")).status == 200
    assert served.app.paths == ["/echo", "/echo", "/echo", "/x?y=%20"]
    await until(lambda: served.memory.bodies.held == 0)


async def test_a_chunked_body_arrives_whole_and_its_trailers_are_dropped(served: Served) -> None:
    async with served.client() as client:
        head = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
        client.send(head + b"5;x=y\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nX-Shoal-Tenant: b\r\n\r\n")
        assert (await client.response()).body == b"hello world"
        assert (await client.request("POST", "/echo", b"next")).body == b"next"


async def test_a_head_that_repeats_is_read_once_and_frames_each_body_as_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []
    whole_head = RequestReader._head

    def counted(reader: RequestReader) -> Any:
        read.append(reader._url)
        return whole_head(reader)

    monkeypatch.setattr(RequestReader, "_head", counted)
    monkeypatch.setattr(requests, "_known", {})
    counted_head = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n"
    chunked = b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfour\r\n0\r\n\r\n"
    async with served.client() as client:
        for number in range(10):
            for request, body in [
                (counted_head + b"%03d" % number, b"%03d" % number),
                (chunked, b"four"),
                (b"GET /c HTTP/1.1\r\nHost: a\r\n\r\n", b""),
            ]:
                client.send(request)
                assert (await client.response()).body == body
    assert read.count(b"/a") == read.count(b"/c") == 1
    assert read.count(b"/b") == 10
    assert served.app.paths == ["/a", "/b", "/c"] * 10


async def test_few_heads_are_kept_and_no_long_ones(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[bytes, Any] = {}
    monkeypatch.setattr(requests, "_known", kept)
    monkeypatch.setattr(requests, "_MAX_KNOWN", 4)
    async with served.client() as client:
        for number in range(10):
            assert (await client.request("GET", f"/{number}")).status == 200
            assert 1 <= len(kept) <= 4
        kept.clear()
        await client.request("GET", "/long", None, "a: " + "b" * 1024)
        await client.request("GET", "/many", None, *(f"a{number}: b" for number in range(40)))
        assert not kept


async def test_a_request_may_arrive_byte_by_byte(served: Served) -> None:
    async with served.client() as client:
        for byte in b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /x HTTP/1.1\r\nHost: a\r\n\r\n":
            client.send(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.response()).body == b"abc"
        assert (await client.response()).status == 200


async def test_pipelined_requests_are_answered_in_their_order_and_one_at_a_time(served: Served) -> None:
    async with served.client() as client:
        client.send(
            b"".join(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n%03d" % n for n in range(500))
        )
        client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
        assert [int((await client.response()).body) for _ in range(500)] == [*range(500)]
        await until(lambda: bool(served.app.waiting))
        for number in range(3):
            await until(lambda count=number: len(served.app.waiting) == count + 1)
            assert served.app.paths.count("/wait") == number + 1
            stream = served.app.waiting[-1]
            stream.respond(stream.encode_head(200, whole(b"w")), b"w")
            assert (await client.response()).body == b"w"


async def test_a_flood_of_pipelined_requests_is_not_read_while_one_is_open(served: Served) -> None:
    async with served.client() as client, served.client() as bystander:
        client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: bool(served.app.waiting))
        flood = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 400_000
        client.send(flood)
        (connection,) = [c for c in served.listener._connections if c._stream is not None]
        await until(lambda: connection._is_read_paused)
        for _ in range(50):
            assert (await bystander.request("POST", "/echo", b"b")).body == b"b"
        assert len(connection._unparsed) < 1 << 20
        assert served.memory.bodies.held < 2 << 20
    (stream,) = served.app.waiting
    stream.respond(stream.encode_head(200, whole(b"")))
    await until(lambda: served.memory.bodies.held == 0)


async def test_http_2_is_served_at_the_same_address(served: Served) -> None:
    async with served.client() as client:
        client.send(frames.PREFACE[:2])
        await client.writer.drain()
        await asyncio.sleep(0.05)
        client.send(frames.PREFACE[2:] + frames.settings({}))
        header = await client.reader.readexactly(frames.HEADER_BYTES)
        assert header[3] == frames.SETTINGS
    await until(lambda: not served.listener._connections)


async def test_a_streamed_response_is_chunked_and_keeps_the_connection(served: Served) -> None:
    async with served.client() as client:
        answer = await client.request("GET", "/events")
        assert answer.chunks == [b"event 0\n", b"event 1\n", b"event 2\n"]
        assert (await client.request("GET", "/x")).status == 200


async def test_http_1_0_ends_with_the_connection(served: Served) -> None:
    async with served.client() as client:
        client.send(b"GET /events HTTP/1.0\r\n\r\n")
        answer = await client.response()
        assert (answer.body, answer.headers["connection"]) == (b"event 0\nevent 1\nevent 2\n", "close")
    async with served.client() as client:
        client.send(b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
        assert [(await client.response()).headers["connection"] for _ in range(2)] == ["keep-alive"] * 2


async def test_a_response_to_head_has_no_body(served: Served) -> None:
    async with served.client() as client:
        answer = await client.request("HEAD", "/early")
        assert (answer.status, answer.headers["content-length"]) == (404, "2")
        assert (await client.request("POST", "/echo", b"x")).body == b"x"


async def test_a_client_may_wait_for_100_continue(served: Served) -> None:
    async with served.client() as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.response()).status == 100
        client.send(b"ab")
        assert (await client.response()).body == b"ab"
        client.send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        answer = await client.response()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert await client.until_closed() == b""


async def test_an_upgrade_is_not_made(served: Served) -> None:
    async with served.client() as client:
        more = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
        for _ in range(2):
            assert (await client.request("POST", "/echo", b"ab", *more)).body == b"ab"


async def test_connection_close_is_obeyed(served: Served) -> None:
    async with served.client() as client:
        client.send(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /y HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response()).headers["connection"] == "close"
        assert await client.until_closed() == b""
    assert served.app.paths == ["/x"]


HOST = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HOST + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = {
    "both framings": (400, HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "both framings, in the other order": (
        400,
        HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    "two equal lengths": (400, HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    "two lengths": (400, HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "a list of lengths": (400, HOST + b"Content-Length: 5, 5\r\n\r\nhello"),
    "a length with a sign": (400, HOST + b"Content-Length: +5\r\n\r\nhello"),
    "a negative length": (400, HOST + b"Content-Length: -5\r\n\r\nhello"),
    "a hexadecimal length": (400, HOST + b"Content-Length: 0x5\r\n\r\nhello"),
    "two numbers as a length": (400, HOST + b"Content-Length: 5 5\r\n\r\nhello"),
    "an empty length": (400, HOST + b"Content-Length:\r\n\r\n"),
    "a length of 80 bits": (400, HOST + b"Content-Length: 604462909807314587353088\r\n\r\n"),
    "an unknown transfer encoding": (400, HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "chunked, then identity": (400, HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    "chunked twice": (400, HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "gzip, then chunked": (501, HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "gzip, and chunked in a header of its own": (
        501,
        HOST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "identity": (400, HOST + b"Transfer-Encoding: identity\r\n\r\n"),
    "a space before the colon": (400, HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    "a vertical tab": (400, HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "chunked in HTTP/1.0": (501, b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "obs-fold": (400, HOST + b"X: a\r\n b\r\n\r\n"),
    "a folded first header": (400, b"POST /echo HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n"),
    "NUL in a name": (400, HOST + b"X\0: a\r\n\r\n"),
    "NUL in a value": (400, HOST + b"X: a\0b\r\n\r\n"),
    "NUL in the path": (400, b"GET /a\0b HTTP/1.1\r\nHost: a\r\n\r\n"),
    "CR in a value": (400, HOST + b"X: a\rb\r\n\r\n"),
    "lines that end with LF": (400, b"GET /x HTTP/1.1\nHost: a\n\n\r\n\r\n"),
    "a head whose lines end with LF, and nothing behind it": (400, b"GET /x HTTP/1.1\nHost: a\n\n"),
    "one line that ends with LF": (400, b"GET /x HTTP/1.1\r\nHost: a\nX: y"),
    "a head that ends with LF, and a request behind it": (
        400,
        b"GET /x HTTP/1.1\r\nHost: a\r\n\nGET /hidden HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    "a chunk's size is no number": (400, CHUNKED + b"zz\r\n"),
    "a negative chunk": (400, CHUNKED + b"-1\r\n"),
    "a chunk's size with 0x": (400, CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n"),
    "a chunk of 68 bits": (400, CHUNKED + b"fffffffffffffffff\r\n"),
    "a space after a chunk's size": (400, CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n"),
    "chunks that end with LF": (400, CHUNKED + b"5\nhello\n0\n\n"),
    "a chunk longer than its size": (400, CHUNKED + b"5\r\nhelloXX\r\n0\r\n\r\n"),
    "LF in a chunk's extension": (400, CHUNKED + b"5;a=\nb\r\nhello\r\n0\r\n\r\n"),
    "a length among the trailers": (400, CHUNKED + b"0\r\nContent-Length: 1\r\n\r\n"),
    "a request behind the size of the last chunk": (400, CHUNKED + b"0\r\nGET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a request behind an LF": (400, CHUNKED + b"0\r\n\nGET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a request within a chunk that is too short": (
        400,
        CHUNKED + b"4\r\n\r\n\r\nGET /hidden HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    "extensions without end": (400, CHUNKED + b"1;" + b"a" * 200_000 + b"\r\n"),
    "no Host": (400, b"GET /x HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "HTTP/0.9": (505, b"GET /x\r\n\r\n"),
    "HTTP/2 without its preface": (505, b"GET /x HTTP/2.0\r\nHost: a\r\n\r\n"),
    "HTTP/1.2": (400, b"GET /x HTTP/1.2\r\nHost: a\r\n\r\n"),
    "a proxy's request": (501, b"CONNECT h:1 HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a fragment": (400, b"GET /x#y HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a byte above ASCII": (400, b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a method that is no token": (400, b"F(O /x HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a method above ASCII": (400, b"F\xff /x HTTP/1.1\r\nHost: a\r\n\r\n"),
    "no method": (400, b"NONSENSE\r\n\r\n"),
    "a method without end": (400, b"F" * 100 + b" /x HTTP/1.1\r\nHost: a\r\n\r\n"),
    "an unknown expectation": (417, HOST + b"Content-Length: 1\r\nExpect: a miracle\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "too many headers": (431, HOST + b"X: y\r\n" * (LIST_FIELDS + 1) + b"\r\n"),
    "too large headers": (431, HOST + b"X: " + b"y" * LIST_BYTES + b"\r\n\r\n"),
    "a path without end": (431, b"GET /" + b"a" * (LIST_BYTES + 10)),
    "a header without end": (431, HOST + b"X: " + b"y" * (LIST_BYTES + 10)),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_two_servers_could_read_differently_is_refused_and_nothing_behind_it_is_served(
    served: Served, case: str
) -> None:
    status, request = REFUSED[case]
    async with served.client() as bystander, served.client() as client:
        assert (await bystander.request("POST", "/echo", b"b")).body == b"b"
        client.send(request)
        answer = await client.response()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        client.send(b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await client.until_closed() == b""
        assert (await bystander.request("POST", "/echo", b"b")).body == b"b"
    assert "/hidden" not in served.app.paths
    await until(lambda: served.memory.bodies.held == 0)


def test_a_head_of_too_many_lines_is_refused_before_they_are_read() -> None:
    reader = RequestReader()
    with pytest.raises(requests.BadRequest) as refused:
        reader.feed_head(HOST + b"X:\r\n" * 15_000 + b"\r\n")
    assert (refused.value.status, reader._fields) == (431, [])


async def test_chunks_of_a_byte_cost_few_calls(served: Served) -> None:
    size = 100_000
    async with served.client() as client:
        client.send(CHUNKED + b"1\r\na\r\n" * size + b"0\r\n\r\n")
        assert (await client.response()).body == b"a" * size


def connected(memory: Memory, app: App) -> tuple[Http1Connection, Transport]:
    """Return a connection without sockets."""
    connection = Http1Connection(app, app, {}, memory)
    transport = Transport(connection)
    connection.connection_made(cast("asyncio.Transport", transport))
    return connection, transport


async def test_connections_that_send_much_are_read_one_after_the_other() -> None:
    """libuv reads 8 MiB of a connection in one iteration of the event loop, unless the connection is paused."""
    memory, app, transports = Memory(), App(), []
    for _ in range(4):
        connection, transport = connected(memory, app)
        transports.append(transport)
        connection.data_received(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n" + bytes(1000))
        assert transport.is_reading
        connection.data_received(bytes(READ_BYTES + 1))
        assert not transport.is_reading
    for reading in range(1, 5):
        await asyncio.sleep(0)
        assert [transport.is_reading for transport in transports] == [n < reading for n in range(4)]
    for transport in transports:
        transport.abort()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not memory.bodies.held


async def test_many_chunks_are_read_in_turns() -> None:
    memory, app = Memory(), App()
    connection, transport = connected(memory, app)
    size = 40_000
    connection.data_received(CHUNKED + b"1\r\na\r\n" * size + b"0\r\n\r\n")
    turns = 0
    while not transport.written:
        assert not transport.is_reading
        await asyncio.sleep(0)
        turns += 1
    assert turns > 5
    assert transport.written.endswith(b"\r\n" + b"a" * size)
    assert transport.is_reading
    transport.abort()
    await asyncio.sleep(0)
    assert not memory.bodies.held


PIPELINED = (
    CHUNKED + b"5;x=y\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nX: y\r\nZ:\r\n\r\n",
    CHUNKED + b"0\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    CHUNKED + b"b\r\n\r\n\r\n0\r\n\r\n\r\n\r\n2\r\n\r\n\r\n00;a\r\n\r\n",
    HOST + b"Content-Length: 4\r\n\r\n\r\n\r\n",
    b"\r\n" + CHUNKED + b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n",
)
PIPELINED_BODIES = [b"hello world", b"", b"", b"\r\n\r\n0\r\n\r\n\r\n\r\n", b"\r\n\r\n", b"\r\n\r\n\r\n"]


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """Return the data as it may arrive: in one piece, cut at each byte, and byte by byte."""
    yield [data]
    yield from ([data[:at], data[at:]] for at in range(1, len(data)))
    yield [bytes([byte]) for byte in data]


async def test_requests_of_all_kinds_may_be_pipelined_and_arrive_in_any_pieces() -> None:
    for pieces in cuts(b"".join(PIPELINED)):
        app = App()
        connection, transport = connected(Memory(), app)
        for piece in pieces:
            connection.data_received(piece)
        await until(lambda app=app, connection=connection: len(app.paths) == 6 and connection.is_idle, every_s=0)
        expected = [b"".join((http1.encode_head(200, whole(body)), b"\r\n", body)) for body in PIPELINED_BODIES]
        assert bytes(transport.written) == b"".join(expected), pieces
        transport.abort()


async def test_malformed_chunks_are_refused_however_they_arrive() -> None:
    malformed = {case: request for case, (_, request) in REFUSED.items() if request.startswith(CHUNKED)}
    for case, request in malformed.items():
        if len(request) > 1_000:
            continue
        for pieces in cuts(CHUNKED + b"1\r\na\r\n0\r\n\r\n" + request):
            app = App()
            connection, transport = connected(Memory(), app)
            for piece in pieces:
                connection.data_received(piece)
            await until(lambda transport=transport: b"HTTP/1.1 400 " in transport.written, every_s=0)
            assert app.paths == ["/echo"] * 2, (case, pieces)
            assert transport.written.count(b"HTTP/1.1 200 ") == 1, (case, pieces)
            transport.abort()


async def test_lines_that_end_with_lf_are_refused_however_they_arrive() -> None:
    for pieces in cuts(b"GET /x HTTP/1.1\r\nHost: a\nX: y\n\n"):
        app = App()
        connection, transport = connected(Memory(), app)
        for piece in pieces:
            connection.data_received(piece)
        assert transport.written.startswith(b"HTTP/1.1 400 "), pieces
        assert not app.paths
        transport.abort()


async def test_a_chunk_of_empty_lines_is_read_in_turns() -> None:
    memory, app = Memory(), App()
    connection, transport = connected(memory, app)
    body = b"\r\n\r\n" * 20_000
    connection.data_received(
        CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n" + b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    turns = 0
    while transport.written.count(b"HTTP/1.1 200 ") < 2:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 5
    assert body in transport.written
    transport.abort()


async def test_the_application_refuses_methods(served: Served) -> None:
    async with served.client() as client:
        for method in ("FOO", "get", "DESCRIBE", "M-SEARCH"):
            assert (await client.request(method, "/x", b"body")).body == b"body"
    assert served.app.methods == ["FOO", "get", "DESCRIBE", "M-SEARCH"]


async def test_a_fault_of_the_application_closes_its_connection_alone(served: Served) -> None:
    async with served.client() as client, served.client() as bystander:
        client.send(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await client.until_closed() == b""
        assert (await bystander.request("GET", "/x")).status == 200


async def test_a_handler_is_notified_once_of_a_disconnected_client(served: Served) -> None:
    async with served.client() as client:
        client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: bool(served.app.waiting))
    await until(lambda: served.app.disconnects == 1)
    stream = served.app.waiting[0]
    stream.respond(stream.encode_head(200, whole(b"")))
    assert (served.app.disconnects, served.memory.bodies.held) == (1, 0)


async def test_a_response_before_the_end_of_its_request_arrives_although_the_client_goes_on(served: Served) -> None:
    async with served.client() as client:
        client.send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + bytes(500_000))
        answer = await client.response()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert await client.until_closed() == b""


async def test_slow_heads_and_bodies_and_idle_connections_end_while_others_are_served(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "TICK_S", 0.05)
    async with (
        served.client() as bystander,
        served.client() as silent,
        served.client() as head,
        served.client() as body,
        served.client() as idle,
    ):
        for client in (idle, bystander):
            assert (await client.request("GET", "/x")).status == 200
        head.send(b"GET /x HTTP/1.1\r\nHos")
        body.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\na")

        async def trickle(client: RawClient) -> None:
            while not client.writer.is_closing():
                client.send(b"a")
                await asyncio.sleep(0.02)

        trickling = [asyncio.create_task(trickle(client)) for client in (head, body)]
        try:
            for client, status in ((head, 408), (body, 408), (silent, 408)):
                assert (await client.response()).status == status
                assert (await bystander.request("POST", "/echo", b"b")).body == b"b"
            # Nothing is owed to a connection between two requests.
            calling = asyncio.create_task(idle.until_closed())
            while not calling.done():
                assert (await bystander.request("POST", "/echo", b"b")).body == b"b"
            assert calling.result() == b""
        finally:
            for task in trickling:
                task.cancel()
    await until(lambda: served.memory.bodies.held == 0)


async def test_a_response_that_nobody_reads_is_counted_and_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "TICK_S", 0.05)
    monkeypatch.setattr("mesh.h2.unread.MAX_TICKS", 3)
    host, _, port = served.address.rpartition(":")
    loop = asyncio.get_running_loop()
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.setblocking(False)
        await loop.sock_connect(stuck, (host, int(port)))
        await loop.sock_sendall(stuck, b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
        await until(lambda: served.memory.unread.held > 1 << 20)
        async with served.client() as bystander:
            while served.memory.unread.held:
                assert (await bystander.request("POST", "/echo", b"b")).body == b"b"
    assert served.app.paths.count("/large") == 1


async def test_a_request_without_room_is_rejected(served: Served) -> None:
    share = served.memory.bodies.share()
    share.add(served.memory.bodies.limit)
    async with served.client() as client:
        assert (await client.request("GET", "/x")).status == 429
        share.remove(share.held)
        assert (await client.request("GET", "/x")).status == 200


async def test_a_drain_lets_the_open_request_end_and_closes_idle_connections(served: Served) -> None:
    async with served.client() as client, served.client() as idle:
        assert (await idle.request("GET", "/x")).status == 200
        client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: bool(served.app.waiting))
        draining = asyncio.create_task(served.listener.drain(30.0))
        assert await idle.until_closed() == b""
        assert not draining.done()
        stream = served.app.waiting[0]
        stream.respond(stream.encode_head(200, whole(b"last")), b"last")
        answer = await client.response()
        assert (answer.body, answer.headers["connection"]) == (b"last", "close")
        assert await client.until_closed() == b""
    await asyncio.wait_for(draining, 30)


async def test_an_idle_connection_gives_way_to_a_new_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.h2.connections._MAX_CONNECTIONS", 2)
    async with served.client() as busy, served.client() as idle:
        busy.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: bool(served.app.waiting))
        assert (await idle.request("GET", "/x")).status == 200
        async with served.client() as new:
            assert (await new.request("GET", "/x")).status == 200
            assert await idle.until_closed() == b""
            stream = served.app.waiting[0]
            stream.respond(stream.encode_head(200, whole(b"")))
            assert (await busy.response()).status == 200
