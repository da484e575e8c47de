"""One peer of the server's front cannot delay or fail another: memory, progress, fairness and headers."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from mesh.h2 import connections, frames, memory_account, server_connection
from mesh.h2.bursts import Bursts
from mesh.h2.frames import Reason
from mesh.h2.memory_account import MemoryAccount
from mesh.h2.sending import Sender
from mesh.h2.server_connection import Memory, ServerConnection
from mesh.rpc import slow_call
from mesh.rpc.framing import MOST_PIECES, PIECE_BYTES, framed
from mesh.rpc.server import Server
from shoal.errors import Code
from tests.mesh.h2.scripted import PATIENCE_S, Peer
from tests.mesh.h2.test_memory_account import Transport

ECHO, SIZED, SLOW, STREAM = "/t.T/Echo", "/t.T/Sized", "/t.T/Slow", "/t.T/Stream"
KEPT, KEPT_SLOW, KEPT_STREAM = "/t.T/Kept", "/t.T/KeptSlow", "/t.T/KeptStream"
MIB = 1 << 20
WIDE = {frames.WINDOW_SIZE: frames.LARGEST_WINDOW}


def echo(body, call):
    call.reply((body[5:],), len(body) - 5)


async def slow(request, context):
    return request


async def stream(requests, context):
    async for request in requests:
        yield b"%d %s" % (len(request), threading.current_thread().name.encode())


class Front:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.sized = 0
        self.kept = asyncio.Event()
        """Calls of KEPT, KEPT_SLOW and KEPT_STREAM are answered once it is set."""

    def keep(self, body, call):
        task = asyncio.create_task(self.kept.wait())
        task.add_done_callback(lambda _: call.reply((), 0))

    def answer_sized(self, body, call):
        """Answers with as many bytes as the request says."""
        self.sized += 1
        size = int(body[5:])
        call.reply((bytes(size),), size)

    @asynccontextmanager
    async def peer(self, settings: dict[int, int] | None = None) -> AsyncIterator[Client]:
        host, _, port = self.server.address.rpartition(":")
        client = Client(*await asyncio.open_connection(host, int(port)))
        client.send(frames.PREFACE, frames.settings(settings or {}))
        await client.until(frames.SETTINGS)
        client.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        try:
            yield client
        finally:
            client.writer.close()

    async def until_nothing_is_held(self) -> None:
        memory = self.server.memory
        async with asyncio.timeout(PATIENCE_S):
            while memory.bodies.held or memory.unread.held:
                await asyncio.sleep(0.005)


class Client(Peer):
    """One connection to the front."""

    next_number = 1

    def open(self, path: str, *extra: tuple[str, str]) -> int:
        number, self.next_number = self.next_number, self.next_number + 2
        head = [(":method", "POST"), (":path", path), ("content-type", "application/grpc"), *extra]
        self.send(self.headers(number, head))
        return number

    def data(self, number: int, body: bytes, *, is_end: bool = True) -> None:
        for at in range(0, len(body) or 1, 16_384):
            is_last = is_end and at + 16_384 >= len(body)
            self.send(frames.frame(frames.DATA, is_last * frames.END_STREAM, number, body[at : at + 16_384]))

    def call(self, path: str, message: bytes, *extra: tuple[str, str]) -> int:
        number = self.open(path, *extra)
        self.data(number, framed(message))
        return number

    def _note(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == frames.HEADERS:
            self.ends = getattr(self, "ends", {})
            self.ends[number] = dict(self._decoder.decode(payload))
            if flags & frames.END_STREAM:
                self.ended = getattr(self, "ended", set()) | {number}

    async def end_of(self, number: int) -> dict[str, str]:
        """The last headers of a response."""
        while number not in getattr(self, "ended", ()):
            assert await self.frame() is not None, f"the connection ended before response {number}"
        return self.ends[number]

    async def status(self, number: int) -> int:
        return int((await self.end_of(number))["grpc-status"])

    def body(self, number: int) -> bytes:
        return b"".join(payload for kind, _, of, payload in self.seen if kind == frames.DATA and of == number)


@asynccontextmanager
async def serving(**limits: int) -> AsyncIterator[Front]:
    fronts: list[Front] = []

    async def keep_slow(request, context):
        await fronts[0].kept.wait()
        return b""

    async def keep_stream(requests, context):
        async for _ in requests:
            await fronts[0].kept.wait()
            yield b""

    methods = {
        ECHO: grpc.unary_unary_rpc_method_handler(slow, bytes, bytes),
        SIZED: grpc.unary_unary_rpc_method_handler(slow, bytes, bytes),
        SLOW: grpc.unary_unary_rpc_method_handler(slow, bytes, bytes),
        STREAM: grpc.stream_stream_rpc_method_handler(stream, bytes, bytes),
        KEPT_STREAM: grpc.stream_stream_rpc_method_handler(keep_stream, bytes, bytes),
        KEPT_SLOW: grpc.unary_unary_rpc_method_handler(keep_slow, bytes, bytes),
    }
    fast = {
        ECHO: echo,
        SIZED: lambda body, call: fronts[0].answer_sized(body, call),
        KEPT: lambda body, call: fronts[0].keep(body, call),
    }
    async with Server("127.0.0.1:0", [], drain_ms=500, fast_methods=fast, methods=methods, **limits) as server:
        fronts.append(Front(server))
        await server.serve()
        async with fronts[0].peer() as bystander:
            yield fronts[0]
            assert await bystander.status(bystander.call(ECHO, b"bystander")) == 0
        await fronts[0].until_nothing_is_held()


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_connection, "TICK_S", 0.02)


# -- headers


async def test_oversized_headers_end_their_call_only():
    async with serving() as front, front.peer() as peer:
        wide = peer.open(ECHO, *[(f"x-{n}", "v") for n in range(300)])
        end = await peer.end_of(wide)
        assert (end[":status"], end["grpc-status"]) == ("431", str(int(Code.RESOURCE_EXHAUSTED)))
        assert await peer.status(peer.call(ECHO, b"x", ("x-long", "v" * 16_000))) == 0
        assert await peer.status(peer.call(ECHO, b"x")) == 0


@pytest.mark.parametrize("size", [0, 100, 4095, 4096])
async def test_a_lowered_table_size_is_followed_by_an_update(size):
    async with serving() as front, front.peer({frames.TABLE_SIZE: size}) as peer:
        # A strict decoder: a block must say that the table has shrunk.
        peer._decoder.max_allowed_table_size = size
        for path in (ECHO, SLOW, STREAM):
            assert await peer.status(peer.call(path, b"x")) == 0
        peer.send(frames.settings({frames.TABLE_SIZE: 0}))
        await peer.until(frames.SETTINGS)
        assert await peer.status(peer.call(ECHO, b"x")) == 0


async def test_the_reserved_bit_of_a_stream_is_ignored():
    async with serving() as front, front.peer() as peer:
        head = [(":method", "POST"), (":path", ECHO), ("content-type", "application/grpc")]
        peer.send(frames.frame(frames.HEADERS, frames.END_HEADERS, 1 | 1 << 31, peer.block(head)))
        peer.send(frames.frame(frames.DATA, frames.END_STREAM, 1 | 1 << 31, framed(b"x")))
        assert await peer.status(1) == 0


# -- memory of bodies


async def test_unfinished_bodies_are_bounded_and_other_tenants_find_room():
    async with serving(body_bytes=3 * MIB) as front, front.peer(WIDE) as peer:
        peer.send(frames.window_update(0, 100 * MIB))
        numbers = []
        for _ in range(40):
            numbers.append(peer.open(ECHO, ("x-shoal-tenant", "hog")))
            peer.data(numbers[-1], framed(bytes(MIB))[: 100 << 10], is_end=False)
        for number in numbers[25:]:
            end = await peer.end_of(number)
            assert (end["grpc-status"], end["retry-after-ms"]) == (str(int(Code.RESOURCE_EXHAUSTED)), "1000")
        held = front.server.memory.bodies.held
        assert 1.5 * MIB < held <= 2 * MIB
        for path in (ECHO, SLOW):
            assert await peer.status(peer.call(path, bytes(300 << 10), ("x-shoal-tenant", "other"))) == 0
        async with front.peer(WIDE) as another:
            another.send(frames.window_update(0, 100 * MIB))
            assert await another.status(another.call(ECHO, bytes(300 << 10))) == 0
        assert front.server.memory.bodies.held == held
        # Those that were admitted first go on.
        peer.data(numbers[0], framed(bytes(MIB))[100 << 10 :])
        await peer.end_of(numbers[0])


async def test_small_requests_of_a_tenant_find_room_beside_its_unfinished_bodies():
    async with serving(body_bytes=3 * MIB) as front, front.peer(WIDE) as peer:
        peer.send(frames.window_update(0, 100 * MIB))
        for _ in range(40):
            peer.data(peer.open(ECHO), framed(bytes(MIB))[: 100 << 10], is_end=False)
        small = [peer.call(path, bytes(1_000)) for path in (ECHO, SLOW)]
        assert [await peer.status(number) for number in small] == [0, 0]
        assert await peer.status(peer.call(ECHO, bytes(300 << 10))) == Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("path", [ECHO, SLOW, STREAM])
async def test_tiny_pieces_are_counted_with_their_overhead(path):
    async with serving(body_bytes=MIB) as front, front.peer() as peer:
        number = peer.open(path)
        # The message is never whole; the bytes are few.
        peer.send(frames.frame(frames.DATA, 0, number, framed(bytes(100_000))[:6]))
        peer.send(frames.frame(frames.DATA, 0, number, b"x") * 200)
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        # The slow path joins what it has read.
        assert front.server.memory.bodies.held > 200 * (60 if path == ECHO else 1)
        peer.send(frames.rst_stream(number, Reason.CANCEL))
        await front.until_nothing_is_held()


@pytest.mark.parametrize("path", [ECHO, SLOW, STREAM])
async def test_a_message_in_too_many_tiny_pieces_is_refused_and_one_in_many_larger_ones_is_read(path):
    async with serving(body_bytes=16 * MIB) as front, front.peer({frames.WINDOW_SIZE: MIB}) as peer:
        peer.send(frames.window_update(0, MIB))
        whole = framed(bytes(2 * MOST_PIECES * PIECE_BYTES - 5))
        number, good = peer.open(path), peer.open(path)
        peer.send(frames.frame(frames.DATA, 0, number, whole[:6]))
        peer.send(frames.frame(frames.DATA, 0, number, b"x") * (MOST_PIECES + 1))
        end = await peer.end_of(number)
        assert end["grpc-status"] == str(int(Code.RESOURCE_EXHAUSTED))
        assert "pieces of 1 bytes on average" in end["grpc-message"]
        for at in range(0, len(whole), PIECE_BYTES):
            piece = whole[at : at + PIECE_BYTES]
            peer.data(good, piece, is_end=at + PIECE_BYTES >= len(whole))
        assert await peer.status(good) == 0
        await front.until_nothing_is_held()


async def test_messages_of_a_stream_may_be_as_tiny_and_as_many_as_they_like():
    async with serving() as front, front.peer() as peer:
        number = peer.open(STREAM)
        for _ in range(3 * MOST_PIECES):
            peer.data(number, framed(b"x"), is_end=False)
        peer.data(number, framed(b"x"), is_end=True)
        assert await peer.status(number) == 0
        await front.until_nothing_is_held()


def credit(peer: Client, of: int) -> int:
    """Return the credit that the front has given back, of a stream or of the connection, in bytes."""
    updates = [payload for kind, _, number, payload in peer.seen if kind == frames.WINDOW_UPDATE and number == of]
    return sum(struct.unpack(">I", payload)[0] for payload in updates)


async def test_credit_of_the_connection_returns_when_a_body_is_whole():
    async with serving() as front, front.peer() as peer:
        body = framed(bytes(3 * MIB))
        number = peer.open(ECHO)
        peer.data(number, body[:-1], is_end=False)
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        before = credit(peer, 0)
        peer.data(number, body[-1:])
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        assert credit(peer, 0) - before >= 2 * MIB


@pytest.mark.parametrize("path", [KEPT, KEPT_SLOW])
async def test_a_whole_request_counts_until_it_is_answered(path):
    async with serving(body_bytes=3 * MIB) as front, front.peer(WIDE) as peer, front.peer() as other:
        peer.send(frames.window_update(0, 100 * MIB))
        numbers = [peer.call(path, bytes(300 << 10)) for _ in range(12)]
        for number in numbers[7:]:
            assert await peer.status(number) == Code.RESOURCE_EXHAUSTED
        assert front.server.memory.bodies.held > 5 * (300 << 10)
        assert await other.status(other.call(SLOW, b"x")) == 0
        front.kept.set()
        assert await peer.status(numbers[0]) == 0


async def test_a_message_of_a_stream_counts_until_the_handler_asks_for_the_next_one():
    async with serving(body_bytes=3 * MIB) as front, front.peer(WIDE) as peer, front.peer() as other:
        numbers = [peer.open(KEPT_STREAM) for _ in range(12)]
        for number in numbers:
            peer.data(number, framed(bytes(300 << 10)), is_end=False)
        for number in numbers[7:]:
            assert await peer.status(number) == Code.RESOURCE_EXHAUSTED
        assert front.server.memory.bodies.held > 5 * (300 << 10)
        assert await other.status(other.call(STREAM, b"x")) == 0
        front.kept.set()
        async with asyncio.timeout(PATIENCE_S):
            while front.server.memory.bodies.held > 100 << 10:
                await asyncio.sleep(0.001)


async def test_streams_that_send_nothing_are_bounded_with_their_headers():
    async with serving(body_bytes=MIB) as front, front.peer() as peer, front.peer() as other:
        numbers = [peer.open(STREAM, ("x-long", "v" * 4_000)) for _ in range(80)]
        end = await peer.end_of(numbers[-1])
        assert (end["grpc-status"], end["retry-after-ms"]) == (str(int(Code.RESOURCE_EXHAUSTED)), "1000")
        assert front.server.memory.bodies.held <= MIB * 8 // 9
        assert len(front.server._listeners[0]._connections) == 3
        assert await other.status(other.call(ECHO, b"x")) == 0


async def test_many_tenants_on_a_connection_cost_no_more_than_their_number(monkeypatch):
    monkeypatch.setattr(memory_account, "_MAX_IDLE_SHARES", 64)
    async with serving() as front, front.peer() as peer:
        for n in range(300):
            peer.open(STREAM, ("x-shoal-tenant", str(n)))
        peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await peer.until(frames.PING)
        shares = max((c._tenants.by_tenant for c in front.server._listeners[0]._connections), key=len)
        assert len(shares) == 300
        for n in range(300):
            peer.send(frames.rst_stream(1 + 2 * n, Reason.CANCEL))
        for n in range(300, 900):
            assert await peer.status(peer.call(ECHO, b"x", ("x-shoal-tenant", str(n)))) == 0
        shares = max((c._tenants.by_tenant for c in front.server._listeners[0]._connections), key=len)
        assert len(shares) <= 600


# -- progress


@pytest.mark.parametrize("path", [ECHO, SLOW, STREAM])
@pytest.mark.parametrize("begun", [b"", framed(bytes(1_000))[:50]], ids=["nothing", "a part"])
async def test_a_body_without_progress_ends(path, begun, quick_ticks, monkeypatch):
    monkeypatch.setattr(slow_call, "_NEVER_SENT_S", 0.3)
    async with serving() as front, front.peer() as peer:
        number = peer.open(path)
        if begun:
            peer.data(number, begun, is_end=False)
        end = await peer.end_of(number)
        assert end["grpc-status"] == str(int(Code.DEADLINE_EXCEEDED))
        assert "no progress" in end["grpc-message"]
        assert await peer.status(peer.call(path, b"x")) == 0


async def test_a_body_that_trickles_ends(quick_ticks):
    async with serving() as front, front.peer() as peer:
        number = peer.open(ECHO)
        peer.data(number, framed(bytes(100_000))[:5], is_end=False)
        trickle = asyncio.create_task(repeat(lambda: peer.data(number, b"x", is_end=False), 0.005))
        assert await peer.status(number) == Code.DEADLINE_EXCEEDED
        trickle.cancel()


async def repeat(act, every_s: float) -> None:
    while True:
        act()
        await asyncio.sleep(every_s)


async def test_a_stream_between_two_messages_may_be_silent(quick_ticks):
    async with serving() as front, front.peer() as peer:
        number = peer.open(STREAM)
        peer.data(number, framed(b"one"), is_end=False)
        for _ in range(2):
            _, _, _, payload = await peer.until(frames.PING)
            peer.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        peer.data(number, framed(b"two")[:3], is_end=False)
        await asyncio.sleep(0.05)
        peer.data(number, framed(b"two")[3:])
        assert await peer.status(number) == 0


async def test_a_peer_that_has_gone_without_a_word_loses_its_streams_and_a_silent_one_keeps_them(quick_ticks):
    async with serving() as front, front.peer() as gone, front.peer() as silent:
        gone.open(STREAM)
        number = silent.open(STREAM)
        for _ in range(3):
            _, _, _, payload = await silent.until(frames.PING)
            silent.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        # It reads, and answers nothing.
        async with asyncio.timeout(PATIENCE_S):
            while await gone.frame() is not None:
                pass
        silent.data(number, framed(b"x"))
        assert await silent.status(number) == 0


# -- clients that do not read


async def test_a_client_that_does_not_read_is_not_read_and_then_disconnected(quick_ticks, caplog):
    async with serving(unread_bytes=16 * MIB) as front, front.peer(WIDE) as peer:
        # Left alone, Linux lets it grow to 32 MiB, and takes nearly all responses.
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        peer.send(frames.window_update(0, frames.LARGEST_WINDOW - frames.DEFAULT_WINDOW))
        for _ in range(4_000):
            peer.call(SIZED, b"10000")
        last = -1
        while front.sized != last or not last:
            last = front.sized
            await asyncio.sleep(0.05)
        assert front.sized < 4_000
        async with asyncio.timeout(PATIENCE_S):
            while len(front.server._listeners[0]._connections) > 1:
                await asyncio.sleep(0.01)
        assert "its peer reads none of" in caplog.text


async def test_a_peer_that_does_not_read_is_paused_and_closed_after_the_stated_time(monkeypatch):
    # The test ticks by hand.
    monkeypatch.setattr(server_connection, "TICK_S", 3_600.0)
    async with serving(unread_bytes=64 * MIB) as front, front.peer(WIDE) as peer:
        peer.send(frames.window_update(0, frames.LARGEST_WINDOW - frames.DEFAULT_WINDOW))
        connection = next(c for c in front.server._listeners[0]._connections if c.peer[1] == peer_port(peer))
        peer.writer.transport.pause_reading()
        # A connection that waits for its turn is not read, either.
        while connection._is_waiting or not connection._is_write_paused:
            peer.call(SIZED, b"10000")
            await asyncio.sleep(0)
        assert not connection._transport.is_reading()
        # Data that waits in the transport is counted.
        assert front.server.memory.unread.held >= connection._transport.get_write_buffer_size() > 0
        served = front.sized
        for _ in range(100):
            peer.call(SIZED, b"10000")
            await asyncio.sleep(0)
        assert front.sized == served
        for _ in range(server_connection.MAX_TICKS):
            connection._tick()
            connection._tick_timer.cancel()
        assert not connection._transport.is_reading()
        assert not connection._transport.is_closing()
        connection._tick()
        assert connection._transport.is_closing()
        async with asyncio.timeout(PATIENCE_S):
            while front.server.memory.unread.held:
                await asyncio.sleep(0.001)


class Unread(Transport):
    """Its peer reads nothing: `close` waits for it."""

    def close(self) -> None:
        self._is_closing = True

    def abort(self) -> None:
        self._protocol.connection_lost(None)


@pytest.mark.parametrize("is_broken", [False, True], ids=["goaway", "broken"])
async def test_a_connection_that_ends_does_not_wait_longer_for_a_peer_that_does_not_read(is_broken):
    connections: dict[Any, None] = {}
    connection = ServerConnection(SimpleNamespace(), connections, Memory())
    transport: Any = Unread(connection)
    connection.connection_made(transport)
    connection.data_received(frames.PREFACE + frames.settings({}))
    # Too few bytes for the transport to pause.
    transport.buffered = 100
    connection.data_received(frames.frame(frames.PING, 0, 0) if is_broken else frames.goaway(0, Reason.NO_ERROR))
    for _ in range(server_connection.MAX_TICKS):
        connection._tick_timer.cancel()
        connection._tick()
    assert connections
    connection._tick_timer.cancel()
    connection._tick()
    assert not connections


async def test_frames_behind_a_goaway_are_no_fault(caplog):
    async with serving() as front, front.peer() as peer:
        peer.send(frames.goaway(0, Reason.NO_ERROR), frames.frame(frames.PING, 0, 0, bytes(8)))
        assert await peer.until_over() is None
    assert "RuntimeError" not in caplog.text


async def test_connections_that_do_not_read_are_closed_when_the_account_is_full(caplog):
    async with serving(unread_bytes=256 << 10) as front, AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(front.peer(WIDE)) for _ in range(3)]
        for peer in peers:
            peer.send(frames.window_update(0, frames.LARGEST_WINDOW - frames.DEFAULT_WINDOW))
            peer.writer.transport.pause_reading()
        async with asyncio.timeout(PATIENCE_S):
            while "find no room" not in caplog.text:
                for peer in peers:
                    for _ in range(100):
                        peer.call(SIZED, b"16000")
                await asyncio.sleep(0.001)
        async with front.peer() as other:
            assert await other.status(other.call(ECHO, b"x")) == 0


def test_the_stated_time_is_30_seconds():
    assert server_connection.TICK_S * server_connection.MAX_TICKS == 30


async def test_a_response_whose_window_stays_closed_is_reset_and_others_are_answered(quick_ticks):
    async with serving(unread_bytes=3 * MIB) as front, front.peer({frames.WINDOW_SIZE: 0}) as peer:
        numbers = [peer.call(SIZED, b"200000") for _ in range(30)]
        refused = 0
        for number in numbers[12:]:
            refused += await peer.status(number) == Code.RESOURCE_EXHAUSTED
        assert refused == 18
        assert front.server.memory.unread.held <= 2 * MIB
        small = peer.call(ECHO, b"x")
        peer.send(frames.window_update(small, 100))
        assert await peer.status(small) == 0
        resets = set()
        while len(resets) < 10:
            _, _, number, reason = await peer.until(frames.RST_STREAM)
            assert struct.unpack(">I", reason)[0] == Reason.CANCEL
            resets.add(number)
        await front.until_nothing_is_held()


async def test_a_response_that_is_taken_byte_by_byte_is_reset(quick_ticks):
    async with serving() as front, front.peer({frames.WINDOW_SIZE: 0}) as peer:
        number = peer.call(SIZED, b"200000")
        trickle = asyncio.create_task(repeat(lambda: peer.send(frames.window_update(number, 1)), 0.005))
        _, _, of, reason = await peer.until(frames.RST_STREAM)
        trickle.cancel()
        assert (of, struct.unpack(">I", reason)[0]) == (number, Reason.CANCEL)
        assert peer.body(number)
        await front.until_nothing_is_held()


# -- fairness of one connection


class Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))


def sender_of(account: MemoryAccount, bursts: Bursts | None = None) -> tuple[Sender, Transport]:
    share = account.share()
    sender, transport = Sender(lambda number, reason: None, lambda number: share, bursts), Transport()
    sender.attach(transport)
    return sender, transport


def data_frames(transport: Transport) -> list[int]:
    data, at, found = b"".join(transport.written), 0, []
    while at < len(data):
        high, low, kind, _, number = frames.HEADER.unpack_from(data, at)
        if kind == frames.DATA:
            found.append(number)
        at += 9 + (high << 16 | low)
    return found


async def test_a_window_update_wakes_only_its_stream(monkeypatch):
    account = MemoryAccount(1 << 30)
    sender, transport = sender_of(account)
    sender.apply_settings({frames.WINDOW_SIZE: 0})
    sender.add_window(0, MIB)
    for number in range(1, 4_001, 2):
        sender.open(number)
        sender.respond(number, b"", b"body", b"trailers")
    while sender._ready:
        await asyncio.sleep(0)
    looked_at = []
    room = Sender._room
    monkeypatch.setattr(Sender, "_room", lambda self, number: looked_at.append(number) or room(self, number))
    sender.add_window(501, 10)
    sender.add_window(0, 10)
    sender.flush()
    assert set(looked_at) == {501}
    assert data_frames(transport) == [501]
    sender.close()
    assert account.held == 0


async def test_a_small_response_finds_room_beside_large_ones_that_are_not_read():
    account = MemoryAccount(3 * MIB)
    sender, _ = sender_of(account)
    sender.apply_settings({frames.WINDOW_SIZE: 0})
    sender.open(101)
    for number in range(1, 25, 2):
        sender.open(number)
        if not sender.has_room(number, MIB // 4):
            break
        sender.respond(number, b"", bytes(MIB // 4), b"trailers")
    assert not sender.has_room(101, MIB // 4)
    assert sender.has_room(101, 64 << 10)
    # Small ones leave a ninth to others.
    account.share().add(account.limit - account.held - MIB // 4)
    assert not sender.has_room(101, 64 << 10)
    sender.close()


async def test_settings_that_change_many_windows_leave_the_loop_to_others():
    account = MemoryAccount(1 << 30)
    sender, transport = sender_of(account)
    sender.apply_settings({frames.WINDOW_SIZE: 0})
    sender.add_window(0, MIB)
    for number in range(1, 2_001, 2):
        sender.open(number)
        sender.respond(number, b"", b"body", b"trailers")
    while sender._ready:
        await asyncio.sleep(0)
    seen = 0
    # The second change finds no room: nothing is written, and the turns go on nevertheless.
    for window, sent in ((1, 1_000), (0, 1_000), (2, 2_000), (9, 3_000)):
        sender.apply_settings({frames.WINDOW_SIZE: window})
        while sender._ready:
            await asyncio.sleep(0)
            now = len(data_frames(transport))
            assert now - seen <= 64
            seen = now
        await asyncio.sleep(0)
        seen = len(data_frames(transport))
        assert seen == sent
    assert account.held == 0


async def test_many_connections_write_a_bounded_amount_in_an_iteration_of_the_loop():
    account, bursts = MemoryAccount(1 << 30), Bursts()
    senders = [sender_of(account, bursts) for _ in range(20)]

    def written() -> list[int]:
        return [sum(map(len, transport.written)) for _, transport in senders]

    for sender, _ in senders:
        sender.open(1)
        sender.apply_settings({frames.WINDOW_SIZE: 16 * MIB})
        sender.data(1, bytes(8 * MIB), lambda: None)
    # The windows of the connections open at once, as when clients begin to read.
    for sender, _ in senders:
        sender.add_window(0, 16 * MIB)
    counts = [written()]
    while min(counts[-1]) < 8 * MIB:
        await asyncio.sleep(0)
        counts.append(written())
        # Two turns, and a frame of each connection.
        assert sum(counts[-1]) - sum(counts[-2]) <= 5 * MIB
        # Connections take turns: none is far ahead of the others.
        assert max(counts[-1]) - min(counts[-1]) <= 3 * MIB
        assert len(counts) < 1_000
    assert account.held == 0


async def test_a_peer_that_makes_the_transport_pause_gets_little_at_a_time_and_more_when_it_reads():
    account = MemoryAccount(1 << 30)
    sender, transport = sender_of(account)

    async def sent() -> int:
        """Return the bytes that are written until and in the next iteration of the loop."""
        before = sum(map(len, transport.written))
        await asyncio.sleep(0)
        return sum(map(len, transport.written)) - before

    sender.open(1)
    sender.apply_settings({frames.WINDOW_SIZE: 16 * MIB})
    sender.add_window(0, 16 * MIB)
    sender.data(1, bytes(8 * MIB), lambda: None)
    counts = [await sent() for _ in range(8)]
    assert counts[0] <= MIB // 2
    assert MIB <= max(counts) <= 2 * MIB
    for _ in range(3):
        sender.pause()
        # What was pumped before is written.
        await sent()
        assert await sent() == 0
        sender.resume()
        # A burst, and the frame that began in it.
        assert await sent() <= 3 * MIB // 16
    while account.held:
        assert await sent()


async def test_a_fault_of_one_connection_does_not_end_the_turns_of_the_others():
    bursts, faults, resumed = Bursts(), [], []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context["exception"]))

    def fail() -> None:
        raise ValueError("fault")

    bursts.wait(fail)
    bursts.wait(lambda: resumed.append(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [type(fault) for fault in faults] == [ValueError]
    assert resumed == [1]


async def test_streams_take_turns_by_frame():
    account = MemoryAccount(1 << 30)
    sender, transport = sender_of(account)
    sender.apply_settings({frames.WINDOW_SIZE: MIB})
    # The first response takes the whole window.
    for number, size in ((7, frames.DEFAULT_WINDOW), (1, 10 * 16_384), (3, 3 * 16_384), (5, 16_384)):
        sender.open(number)
        sender.respond(number, b"", bytes(size), b"trailers")
    sender.flush()
    transport.written.clear()
    sender.add_window(0, MIB)
    sender.flush()
    order = data_frames(transport)
    assert order == [1, 3, 5, 1, 3, 1, 3] + [1] * 7
    assert account.held == 0


async def test_a_large_response_leaves_the_loop_to_others():
    account = MemoryAccount(1 << 30)
    sender, transport = sender_of(account)
    sender.apply_settings({frames.WINDOW_SIZE: 1 << 30})
    sender.add_window(0, 1 << 30)
    sender.open(1)
    sender.respond(1, b"", bytes(20 * MIB), b"trailers")
    iterations = 0
    while account.held:
        await asyncio.sleep(0)
        iterations += 1
    assert iterations >= 18
    assert max(map(len, transport.written)) < 2 * MIB


async def test_the_parts_of_a_large_response_are_sent_as_they_are_and_counted():
    part = bytearray(b"large" * MIB)
    held = []

    def handler(body, call):
        call.reply((b"small", part, b"", b"end"), len(part) + 8)
        waiting = call._stream._sender._waiting.values()
        held.append([chunk.obj is part for each in waiting for chunk in each.chunks])
        held.append(server.memory.unread.held)

    async with Server("127.0.0.1:0", [], drain_ms=500, fast_methods={ECHO: handler}) as server:
        await server.serve()
        front = Front(server)
        async with front.peer({frames.WINDOW_SIZE: 0}) as peer:
            number = peer.call(ECHO, b"x")
            await peer.until(frames.HEADERS, number)
            # The prefix and the small parts are joined.
            assert held == [[False, True, False], len(part) + 8 + 5]
            peer.send(frames.settings({frames.WINDOW_SIZE: 1 << 30}), frames.window_update(0, 1 << 30))
            assert await peer.status(number) == 0
            assert peer.body(number) == framed(b"small" + part + b"end")
            assert server.memory.unread.held == 0


async def test_many_tiny_frames_are_handled_in_turns():
    async with serving() as front, front.peer() as peer, front.peer() as other:
        connection = next(c for c in front.server._listeners[0]._connections if c.peer[1] == peer_port(peer))
        peer.send(frames.window_update(0, 1) * 200_000, frames.frame(frames.PING, 0, 0, bytes(8)))
        handled = []
        on_window = connection._on_window
        connection._on_window = lambda number, payload: handled.append(None) or on_window(number, payload)
        before = 0
        for _ in range(20):
            await asyncio.sleep(0)
            assert len(handled) - before <= 512
            before = len(handled)
        assert await other.status(other.call(ECHO, b"x")) == 0
        await peer.until(frames.PING)
        assert len(handled) == 200_000


def peer_port(peer: Client) -> int:
    port: int = peer.writer.get_extra_info("sockname")[1]
    return port


async def test_an_idle_connection_gives_way_to_a_new_one(monkeypatch):
    monkeypatch.setattr(connections, "_MAX_CONNECTIONS", 2)
    async with (
        Server("127.0.0.1:0", [], drain_ms=500, fast_methods={ECHO: echo}) as server,
        Front(server).peer() as busy,
    ):
        front = Front(server)
        number = busy.open(ECHO)
        busy.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        await busy.until(frames.PING)
        async with front.peer() as idle, front.peer() as new:
            assert await new.status(new.call(ECHO, b"x")) == 0
            busy.data(number, framed(b"x"))
            assert await busy.status(number) == 0
            assert await idle.until_over() == Reason.NO_ERROR


async def test_a_connection_without_requests_gives_way_before_one_with_some(monkeypatch):
    monkeypatch.setattr(connections, "_MAX_CONNECTIONS", 2)
    async with (
        Server("127.0.0.1:0", [], drain_ms=500, fast_methods={ECHO: echo}) as server,
        Front(server).peer() as caller,
    ):
        front = Front(server)
        assert await caller.status(caller.call(ECHO, b"x")) == 0
        async with front.peer() as unused, front.peer() as new:
            assert await new.status(new.call(ECHO, b"x")) == 0
            assert await unused.until_over() == Reason.NO_ERROR
            assert await caller.status(caller.call(ECHO, b"x")) == 0


async def test_the_streams_of_a_lost_connection_end_in_pieces():
    """Otherwise, the call of another connection would wait for the ends of thousands."""
    order: list[str] = []

    class Stuck:
        def __init__(self, call) -> None:
            call.on_end = lambda: order.append("end")

    async with Server(
        "127.0.0.1:0", [], drain_ms=500, fast_methods={ECHO: echo, SLOW: lambda _, call: Stuck(call)}
    ) as server:
        await server.serve()
        front = Front(server)
        async with front.peer() as caller:
            async with front.peer() as leaver:
                for _ in range(2000):
                    leaver.call(SLOW, b"x")
                leaver.send(frames.frame(frames.PING, 0, 0, bytes(8)))
                await leaver.until(frames.PING)
            async with asyncio.timeout(PATIENCE_S):
                while not order:
                    await asyncio.sleep(0)
            assert len(order) <= 64
            assert await caller.status(caller.call(ECHO, b"x")) == 0
            async with asyncio.timeout(PATIENCE_S):
                while len(order) < 2000:
                    await asyncio.sleep(0.005)


# -- large and compressed messages


@pytest.mark.parametrize("path", [ECHO, SLOW, STREAM])
async def test_a_large_message_is_joined_in_a_thread(path):
    body = bytes(range(256)) * (36 << 10)
    async with serving() as front, front.peer(WIDE) as peer:
        peer.send(frames.window_update(0, 100 * MIB))
        started = []
        threads = front.server._app.threads
        start = threads.start
        threads.start = lambda *given: started.append(given[0]) or start(*given)
        number = peer.open(path, ("x-shoal-tenant", "a"))
        reading = asyncio.create_task(peer.status(number))
        for data in (
            framed(b"first") if path == STREAM else b"",
            framed(body),
            framed(b"x") if path == STREAM else b"",
        ):
            for at in range(0, len(data), MIB):
                # The stream's window is 4 MiB.
                while at - credit(peer, number) > 2 * MIB:
                    await asyncio.sleep(0.001)
                peer.data(number, data[at : at + MIB], is_end=False)
        peer.data(number, b"")
        assert await reading == 0
        assert started == [b"a"]
        if path == STREAM:
            assert b"%d " % len(body) in peer.body(number)
        else:
            assert peer.body(number) == framed(body)


NUMBERS = b"".join(b"%d," % (n * 7919 % 100_003) for n in range(400_000))


@pytest.mark.parametrize("path", [ECHO, SLOW, STREAM])
async def test_a_large_compressed_message_is_served(path):
    async with serving() as front, front.peer(WIDE) as peer:
        peer.send(frames.window_update(0, 100 * MIB))
        number = peer.open(path, ("grpc-encoding", "gzip"))
        packed = gzip.compress(NUMBERS, 1)
        peer.data(number, b"\1" + len(packed).to_bytes(4) + packed)
        assert await peer.status(number) == 0
        body = peer.body(number)[5:]
        assert body == NUMBERS if path != STREAM else body.startswith(b"%d " % len(NUMBERS))


@pytest.mark.parametrize("path", [ECHO, SLOW, STREAM])
async def test_a_bomb_is_refused_and_nobody_waits_for_it(path):
    async with serving() as front, front.peer() as peer, front.peer() as other:
        packed = gzip.compress(bytes(100 * MIB), 9)
        bombs = []
        for _ in range(5):
            bombs.append(peer.open(path, ("grpc-encoding", "gzip"), ("x-shoal-tenant", "bomber")))
            peer.data(bombs[-1], b"\1" + len(packed).to_bytes(4) + packed)
        assert await other.status(other.call(path, b"x")) == 0
        for number in bombs:
            assert await peer.status(number) == Code.RESOURCE_EXHAUSTED


async def test_a_call_that_ends_while_its_message_is_inflated_returns_its_memory():
    async with serving() as front, front.peer() as peer:
        packed = gzip.compress(NUMBERS, 1)
        for path in (ECHO, SLOW, STREAM):
            number = peer.open(path, ("grpc-encoding", "gzip"))
            peer.data(number, b"\1" + len(packed).to_bytes(4) + packed)
            peer.send(frames.rst_stream(number, Reason.CANCEL))
        await front.until_nothing_is_held()
        assert await peer.status(peer.call(ECHO, b"x")) == 0
