"""Plain HTTP on the server core, which knows no gRPC: a small application, an independent client (`h2`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import pytest
import pytest_asyncio

from mesh.h2 import frames
from mesh.h2.frames import Reason
from mesh.h2.headers import response_head
from mesh.h2.listener import Listener
from mesh.h2.peer import CREDIT, STREAM_WINDOW
from mesh.h2.stream import RequestHandler, ServerStream
from tests.mesh.h2.scripted import LAST, Peer

JSON = [(b"content-type", b"application/json")]
TEXT = [(b"content-type", b"text/plain")]
EVENTS = [(b"content-type", b"text/event-stream")]


class Ignored:
    """Ignores the body of a request."""

    def __init__(self, app: App) -> None:
        self._app = app

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        pass

    def disconnected(self) -> None:
        self._app.disconnects += 1


class Echo:
    """Answers with the body, once all of it is there."""

    def __init__(self, stream: ServerStream) -> None:
        self._stream = stream
        self._body = b""

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        self._body += piece
        self._stream.consumed(size)
        if is_end:
            self._stream.respond(response_head(200, TEXT), self._body)

    def disconnected(self) -> None:
        pass


class Held(Ignored):
    """Keeps the pieces of the body; the test gives back their credit."""

    def __init__(self, app: App, stream: ServerStream) -> None:
        super().__init__(app)
        self.stream = stream
        self.sizes: list[int] = []

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        self.sizes.append(size)
        if is_end:
            self.stream.respond(response_head(200), str(sum(self.sizes)).encode())


class App:
    """A few resources."""

    def __init__(self) -> None:
        self.disconnects = 0
        self.sent_events = 0
        self.held: list[Held] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def request(self, stream: ServerStream) -> RequestHandler:
        path, _, query = stream.head.path.partition("?")
        match stream.head.method, path:
            case "GET", "/hello":
                text = {"query": query, "agent": stream.head.by_name[b"user-agent"].decode(), "peer": stream.peer[0]}
                stream.respond(response_head(200, JSON), json.dumps(text).encode())
            case "HEAD", "/hello":
                stream.respond(response_head(204))
            case "POST", "/echo":
                return Echo(stream)
            case "POST", "/held":
                self.held.append(Held(self, stream))
                return self.held[-1]
            case "GET", "/events":
                task = asyncio.create_task(self._events(stream))
                self.tasks.add(task)
            case "GET", "/wait":
                pass
            case "POST", "/broken":
                raise ValueError("a fault of the application")
            case "POST", "/reset":
                stream.reset(Reason.CANCEL)
            case _:
                stream.respond(response_head(404, TEXT), b"no such resource\n")
        return Ignored(self)

    async def _events(self, stream: ServerStream) -> None:
        stream.start(response_head(200, EVENTS))
        for number in range(40):
            sent = asyncio.get_running_loop().create_future()
            stream.send(b"data: %d%s\n\n" % (number, b"." * 9_000), lambda done=sent: done.set_result(None))
            await sent
            self.sent_events += 1
        stream.end()


class Client:
    """One connection. Windows are opened only by `read_all`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    async def request(self, method: str, path: str, body: bytes | None = None, *more: tuple[str, str]) -> int:
        number = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "http"), (":authority", "x"), (":path", path), ("user-agent", "test")]
        head += more
        self.h2.send_headers(number, head, end_stream=body is None)
        while body:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if room > 0:
                self.h2.send_data(number, body[:room])
                body = body[room:]
                await self.flush()
            else:
                await self.read()
        if body is not None:
            self.h2.end_stream(number)
        await self.flush()
        return number

    async def read(self) -> None:
        data = await asyncio.wait_for(self._reader.read(1 << 16), 60)
        assert data, "the connection was closed"
        self.events += self.h2.receive_data(data)
        await self.flush()

    def of(self, number: int, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind) and event.stream_id == number]

    async def read_all(self, number: int) -> tuple[dict[str, str], bytes]:
        """The head and the body of a response that has no trailers."""
        given_back = 0
        while not self.of(number, h2.events.StreamEnded):
            for event in self.of(number, h2.events.DataReceived)[given_back:]:
                given_back += 1
                self.h2.acknowledge_received_data(event.flow_controlled_length, number)
            await self.flush()
            await self.read()
        (head,) = self.of(number, h2.events.ResponseReceived)
        assert not self.of(number, h2.events.TrailersReceived)
        return dict(head.headers), b"".join(event.data for event in self.of(number, h2.events.DataReceived))


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    host, _, port = address.rpartition(":")
    client = Client(*await asyncio.open_connection(host, int(port)))
    try:
        await client.flush()
        yield client
    finally:
        client.writer.close()


@pytest.fixture
def app() -> App:
    return App()


@pytest_asyncio.fixture
async def client(app: App) -> AsyncIterator[Client]:
    listener = Listener("127.0.0.1:0", app)
    async with connected(await listener.start()) as client:
        yield client
    await listener.drain(1.0)


async def test_a_request_without_a_body_is_answered_in_one_write(client: Client) -> None:
    head, body = await client.read_all(await client.request("GET", "/hello?name=x&y=%20"))
    assert (head[":status"], head["content-type"]) == ("200", "application/json")
    assert json.loads(body) == {"query": "name=x&y=%20", "agent": "test", "peer": "127.0.0.1"}


async def test_a_response_may_have_no_body(client: Client) -> None:
    assert await client.read_all(await client.request("HEAD", "/hello")) == ({":status": "204"}, b"")


@pytest.mark.parametrize("size", [0, 1, 16_384, 70_000, STREAM_WINDOW * 2 + 1])
async def test_a_body_of_any_size_arrives_whole(client: Client, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    head, got = await client.read_all(await client.request("POST", "/echo", body[:size]))
    assert (head[":status"], got == body[:size]) == ("200", True)


async def test_a_streamed_response_has_no_trailers_and_waits_for_the_client(client: Client, app: App) -> None:
    number = await client.request("GET", "/events")
    # The default window of 64 KiB takes seven events. A second request is answered meanwhile.
    while sum(event.flow_controlled_length for event in client.of(number, h2.events.DataReceived)) < 65_535:
        await client.read()
    assert (await client.read_all(await client.request("HEAD", "/hello")))[0] == {":status": "204"}
    assert app.sent_events == 7
    head, body = await client.read_all(number)
    assert head["content-type"] == "text/event-stream"
    assert [int(event[6:].rstrip(b".")) for event in body.split(b"\n\n")[:-1]] == list(range(40))


async def test_a_body_that_is_not_consumed_stops_at_the_window(client: Client, app: App) -> None:
    sending = asyncio.create_task(client.request("POST", "/held", bytes(STREAM_WINDOW + 10)))
    while not app.held or sum(app.held[0].sizes) < STREAM_WINDOW:
        await asyncio.sleep(0.01)
    (held,) = app.held
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert (sum(held.sizes), sending.done()) == (STREAM_WINDOW, False)
    held.stream.consumed(CREDIT)
    number = await sending
    assert (await client.read_all(number))[1] == str(STREAM_WINDOW + 10).encode()


async def test_an_error_status_is_the_applications(client: Client) -> None:
    for method, path in (("GET", "/nothing"), ("PUT", "/hello"), ("GET", "/")):
        head, body = await client.read_all(await client.request(method, path))
        assert (head[":status"], body) == ("404", b"no such resource\n")


async def test_a_response_before_the_end_of_the_request_ends_the_request(client: Client) -> None:
    head = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/nothing")]
    client.h2.send_headers(1, head)
    client.h2.send_data(1, b"some of it")
    await client.flush()
    while not client.of(1, h2.events.StreamReset):
        await client.read()
    assert client.of(1, h2.events.StreamReset)[0].error_code == Reason.NO_ERROR
    assert dict(client.of(1, h2.events.ResponseReceived)[0].headers)[":status"] == "404"


@pytest.mark.parametrize(("path", "reason"), [("/broken", Reason.INTERNAL_ERROR), ("/reset", Reason.CANCEL)])
async def test_a_fault_resets_its_stream_and_no_other(client: Client, path: str, reason: Reason) -> None:
    number = client.h2.get_next_available_stream_id()
    head = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", path)]
    client.h2.send_headers(number, head)
    await client.flush()
    while not client.of(number, h2.events.StreamReset):
        await client.read()
    assert client.of(number, h2.events.StreamReset)[0].error_code == reason
    assert (await client.read_all(await client.request("HEAD", "/hello")))[0] == {":status": "204"}


async def test_a_handler_is_notified_once_of_a_disconnected_client(client: Client, app: App) -> None:
    number = await client.request("GET", "/wait")
    client.h2.reset_stream(number)
    await client.request("GET", "/wait")
    await client.read_all(await client.request("HEAD", "/hello"))
    assert app.disconnects == 1
    client.writer.transport.abort()
    while app.disconnects < 2:
        await asyncio.sleep(0.01)


async def test_a_drain_lets_an_open_stream_end(app: App) -> None:
    listener = Listener("127.0.0.1:0", app)
    host, _, port = (await listener.start()).rpartition(":")
    peer = Peer(*await asyncio.open_connection(host, int(port)))
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/events")]
    peer.send(frames.PREFACE, frames.settings({}), peer.headers(1, head, LAST))
    await peer.until(frames.DATA, 1)
    draining = asyncio.create_task(listener.drain(30.0))
    await peer.until(frames.GOAWAY)
    peer.send(frames.frame(frames.PING, frames.ACK, 0, (await peer.until(frames.PING))[3]))
    await peer.until(frames.GOAWAY)
    assert not draining.done()
    peer.send(frames.window_update(0, 1 << 20), frames.window_update(1, 1 << 20))
    assert await peer.until_over() == Reason.NO_ERROR
    data = [(flags, payload) for kind, flags, _, payload in peer.seen if kind == frames.DATA]
    assert b"".join(payload for _, payload in data).count(b"data: ") == 40
    assert data[-1][0] & frames.END_STREAM
    peer.writer.close()
    await asyncio.wait_for(draining, 60)
