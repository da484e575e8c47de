"""The account of held memory returns to zero however requests end: a connection driven frame by frame."""

from __future__ import annotations

import asyncio
import gzip
import struct
from contextlib import suppress
from itertools import count
from typing import Any

import grpc
import hpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.h2 import frames, memory_account, server_connection
from mesh.h2.frames import Reason
from mesh.h2.memory_account import BODY_BYTES, QUICK_FACTOR, UNREAD_BYTES, MemoryAccount, TenantShares
from mesh.h2.peer import CREDIT
from mesh.h2.server_connection import Memory, ServerConnection
from mesh.h2.starts import Starts
from mesh.h2.stream import STREAM_BYTES
from mesh.process.config import ServiceConfig
from mesh.rpc.framing import PIECE_OVERHEAD, framed
from mesh.rpc.grpc_app import GrpcApp
from mesh.rpc.limits import MESSAGE_BYTES
from services.infer.config import InferConfig
from shoal.errors import ResourceExhausted
from shoal.tenant_header import CONNECTION_HEADER

FAST, SLOW, STREAM = "/t.T/Fast", "/t.T/Slow", "/t.T/Stream"
LIMIT = 1 << 20


def test_one_share_leaves_room_for_others():
    account = MemoryAccount(300)
    hog, newcomer = account.share(), account.share()
    while hog.has_room(1):
        hog.add(1)
    assert hog.held == 200
    assert newcomer.has_room(60)
    assert not newcomer.has_room(80)
    hog.remove(200)
    assert account.held == 0


def test_nothing_fits_a_full_account():
    account = MemoryAccount(100)
    share = account.share()
    account.share().add(90)
    share.add(30)
    assert not share.has_room(1)
    assert not share.fits(1)
    assert share.has_room(0)
    assert share.fits(0)


def test_the_defaults_of_the_configuration_are_those_of_the_server():
    fields = ServiceConfig.model_fields
    assert (fields["body_bytes"].default, fields["unread_bytes"].default) == (BODY_BYTES, UNREAD_BYTES)


def test_one_message_of_the_maximal_size_fits_the_defaults():
    pieces = MESSAGE_BYTES + PIECE_OVERHEAD * (MESSAGE_BYTES // frames.DEFAULT_FRAME) + STREAM_BYTES
    infer_bytes = InferConfig.model_fields["body_bytes"].default
    for share in (
        MemoryAccount.share,
        lambda account: TenantShares(account, have_clients=True).of(b"").of_client(b"1"),
    ):
        assert share(MemoryAccount(BODY_BYTES)).has_room(pieces + MESSAGE_BYTES)
        # In infer: body, message, and a response of the same size, twice.
        assert share(MemoryAccount(infer_bytes)).has_room(4 * MESSAGE_BYTES + STREAM_BYTES)
        assert share(MemoryAccount(UNREAD_BYTES)).has_room(MESSAGE_BYTES)
    assert infer_bytes + UNREAD_BYTES < 1 << 30


class Transport:
    """Takes everything that is written, or pauses its protocol."""

    def __init__(self, protocol: ServerConnection, peer: tuple[str, int] | None = None) -> None:
        self._protocol = protocol
        self._peer = peer
        self.written = bytearray()
        self._is_closing = False
        self.is_reading = True
        self.buffered = 0

    def get_extra_info(self, name: str) -> tuple[str, int] | None:
        return self._peer if name == "peername" else None

    def write(self, data: bytes) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close


def ticking(memory: Memory) -> Memory:
    """Return `memory`, with a clock for which each start takes long."""
    memory.starts = Starts(map(float, count()).__next__)
    return memory


def shares_hold(*fronts: Front) -> tuple[int, int]:
    """Return what the shares hold, of requests and of unread responses; none of them less than nothing.

    Args:
        fronts: all connections with one Memory.
    """
    memory, connections = fronts[0].memory, [front.connection for front in fronts]
    bodies, unread = [memory.later], [connection._unread.share for connection in connections]
    for tenants in (memory.tenants, *(connection._tenants for connection in connections)):
        bodies += tenants.by_tenant.values()
    unread += memory.unread_of_tenants.by_tenant.values()
    streams = [stream for connection in connections for stream in connection._streams.values()]
    assert all(stream.held >= stream.least_held + (stream.kept or (b"", 0, 0))[2] for stream in streams)
    for tenant in memory.tenants.by_tenant.values():
        by_client: dict[bytes, int] = {}
        for stream in streams:
            if stream.share is tenant:
                client = stream.client or b""
                by_client[client] = by_client.get(client, 0) + stream.held
        assert tenant.by_client == by_client
        assert tenant.unfinished == sum(stream.is_unfinished for stream in streams if stream.share is tenant)
    assert not any(stream.is_unfinished and stream.is_request_ended for stream in streams)
    for tenant in memory.unread_of_tenants.by_tenant.values():
        assert tenant.by_client is not None
        assert sum(tenant.by_client.values()) == tenant.held
        assert all(size > 0 for size in tenant.by_client.values())
    assert min(share.held for share in (*bodies, *unread)) >= 0
    return sum(share.held for share in bodies), sum(share.held for share in unread)


class Front:
    """One connection to a GrpcApp, without sockets. Its calls are answered when the test says so.

    With `is_shared`, it is that of an Envoy, and each call waits for its start. Several may share `memory`.
    With `is_direct`, it is that of a client at a TCP port.
    """

    def __init__(
        self, limit: int = LIMIT, *, is_shared: bool = False, is_direct: bool = False, memory: Memory | None = None
    ) -> None:
        self.calls: list[Any] = []
        self.memory = ticking(Memory(limit, limit)) if memory is None else memory
        self._is_shared = is_shared
        slow = grpc.unary_unary_rpc_method_handler(self._slow, bytes, bytes)
        stream = grpc.stream_stream_rpc_method_handler(self._stream, bytes, bytes)
        self.app = GrpcApp({FAST: slow, SLOW: slow, STREAM: stream}, {FAST: self._fast}, message_bytes=LIMIT // 2)
        self.connection = ServerConnection(self.app, {}, self.memory)
        self.transport: Any = Transport(self.connection, ("127.0.0.1", 1) if is_direct else None)
        self.connection.connection_made(self.transport)
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0
        self.next = 1
        self.sent = 0
        """Bytes of DATA."""
        self.feed(frames.PREFACE + frames.settings({}) + frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _fast(self, body: bytes, call: Any) -> None:
        self.calls.append(call)

    async def _slow(self, request: bytes, context: Any) -> bytes:
        return request

    async def _stream(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            yield request

    def feed(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.connection.data_received(data)

    def open(self, path: str, tenant: str = "", encoding: str = "identity", client: int | None = None) -> int:
        number = self.next
        self.feed(self.opening(path, tenant, encoding, client))
        return number

    def opening(self, path: str, tenant: str, encoding: str = "identity", client: int | None = None) -> bytes:
        """Return the frame that opens the next stream, of one client of Envoy, or of any."""
        number, self.next = self.next, self.next + 2
        head = [(":method", "POST"), (":path", path), ("content-type", "application/grpc"), ("grpc-encoding", encoding)]
        head += [("grpc-timeout", "20S")] if number % 4 == 1 else []
        head += [("x-shoal-tenant", tenant)] if tenant else []
        if client is not None:
            head += [(CONNECTION_HEADER, str(client))]
        elif self._is_shared and number % 5 != 2:
            # The others are calls of services.
            head += [(CONNECTION_HEADER, str(number % 3))]
        return frames.frame(frames.HEADERS, frames.END_HEADERS, number, self._encoder.encode(head))

    def data(self, number: int, payload: bytes, *, is_end: bool) -> None:
        for at in range(0, len(payload) or 1, 16_384):
            piece = payload[at : at + 16_384]
            is_last = is_end and at + 16_384 >= len(payload)
            self.sent += len(piece)
            self.feed(frames.frame(frames.DATA, frames.END_STREAM if is_last else 0, number, piece))

    def credit(self) -> int:
        """Return the credit that the connection has given back by WINDOW_UPDATE, in bytes."""
        data, at, total = bytes(self.transport.written), 0, 0
        while at + 9 <= len(data):
            high, low, kind, _, number = frames.HEADER.unpack_from(data, at)
            if kind == frames.WINDOW_UPDATE and not number:
                total += struct.unpack_from(">I", data, at + 9)[0]
            at += 9 + (high << 16 | low)
        return total

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)
        while self.app.threads._waiting:
            await asyncio.sleep(0.001)
        for _ in range(5):
            await asyncio.sleep(0)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("open"),
            st.sampled_from([FAST, SLOW, STREAM, "/t.T/Unknown"]),
            st.sampled_from(["", "a", "b"]),
            st.sampled_from(["identity", "gzip", "br"]),
        ),
        st.tuples(st.just("data"), st.integers(0, 9), st.integers(0, 200_000), st.booleans(), st.booleans()),
        st.tuples(st.just("message"), st.integers(0, 9), st.integers(0, 400_000), st.booleans(), st.booleans()),
        st.tuples(st.just("reset"), st.integers(0, 9)),
        st.tuples(st.just("window"), st.integers(0, 10), st.integers(1, 300_000)),
        st.tuples(st.just("reply"), st.integers(0, 9), st.integers(0, 400_000)),
        st.tuples(st.just("fail"), st.integers(0, 9)),
        st.tuples(st.just("expire"), st.integers(0, 9)),
        st.tuples(st.just("hold"), st.integers(0, 9), st.integers(0, 300_000), st.booleans()),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("pause"), st.integers(0, 600_000)),
        st.tuples(st.just("resume")),
        st.tuples(st.just("ticks"), st.integers(1, 80)),
        st.tuples(st.just("settle")),
    ),
    max_size=40,
)


async def play(steps: list[Any], *, is_shared: bool) -> None:
    front = Front(is_shared=is_shared)
    connection = front.connection
    open_: list[int] = []
    held_by_calls: dict[Any, list[int]] = {}
    for kind, *given_ in steps:
        match kind, given_:
            case "open", (path, tenant, encoding):
                open_.append(front.open(path, tenant, encoding))
            case (("data" | "message"), (index, size, is_end, is_compressed)):
                number = open_[index % len(open_)] if open_ else 0
                stream = connection._streams.get(number)
                if stream is None or stream.is_request_ended:
                    continue
                payload = bytes(size)
                if kind == "message":
                    noise = gzip.compress(bytes(n * n % 251 for n in range(size // 4)) * 4, 1) if is_compressed else b""
                    payload = bytes([1]) + len(noise).to_bytes(4) + noise if is_compressed else framed(payload)
                if stream.received + len(payload) > frames.DEFAULT_WINDOW * 60:
                    continue
                front.data(number, payload, is_end=is_end)
            case "reset", (index,):
                if open_:
                    front.feed(frames.rst_stream(open_[index % len(open_)], Reason.CANCEL))
            case "window", (index, size):
                number = 0 if index == 10 or not open_ else open_[index % len(open_)]
                front.feed(frames.window_update(number, size))
            case "reply", (index, size):
                if front.calls:
                    front.calls[index % len(front.calls)].reply((bytes(size),), size)
            case "fail", (index,):
                if front.calls:
                    front.calls[index % len(front.calls)].refuse(ValueError("a fault"))
            case "expire", (index,):
                if front.calls:
                    front.calls[index % len(front.calls)].expire()
            case "hold", (index, size, is_response):
                if front.calls:
                    call = front.calls[index % len(front.calls)]
                    with suppress(ResourceExhausted):
                        (call.hold_response if is_response else call.hold)(size)
                        held_by_calls.setdefault(call, []).append(size)
            case "release", (index,):
                if front.calls and (sizes := held_by_calls.get(front.calls[index % len(front.calls)])):
                    front.calls[index % len(front.calls)].release(sizes.pop())
            case "pause", (size,):
                front.transport.buffered = size
                connection.pause_writing()
            case "resume", _:
                connection.resume_writing()
            case "ticks", (count,):
                for _ in range(count):
                    connection._tick_timer.cancel()
                    connection._tick()
            case _:
                await front.settle()
        memory = front.memory
        held = sum(stream.held for stream in connection._streams.values())
        assert memory.bodies.held == held
        assert shares_hold(front) == (held, memory.unread.held)
        assert 0 <= held <= memory.bodies.limit
        waiting = sum(outgoing.size for outgoing in connection._sender._waiting.values())
        assert memory.unread.held == waiting + connection._unread._counted >= 0
        # Everything else has been given back: the window never closes, so no body waits for another one.
        connection._sender.flush()
        if not front.transport.is_closing():
            window = front.credit() + frames.DEFAULT_WINDOW - front.sent
            assert window >= LIMIT + (64 << 20) - held - CREDIT
    await front.settle()
    if front.transport.is_closing():
        await asyncio.sleep(0)
    connection.connection_lost(None)
    await front.settle()
    assert (front.memory.bodies.held, front.memory.unread.held) == (0, 0)
    await asyncio.gather(*front.app.tasks, return_exceptions=True)
    assert (front.memory.bodies.held, front.memory.unread.held) == shares_hold(front) == (0, 0)
    front.app.threads.close()


@settings(max_examples=150, deadline=None)
@given(STEPS, st.booleans())
@example([("open", FAST, "a", "identity"), ("data", 0, 99_000, False, False)], False)
@example([("open", SLOW, "a", "identity"), ("data", 0, 99_000, False, False)], False)
@example([("open", FAST, "", "identity"), ("message", 0, 10, True, False), ("reply", 0, 300_000)], False)
@example([("open", SLOW, "", "gzip"), ("message", 0, 400_000, True, True), ("settle",)], False)
@example([("open", FAST, "a", "identity"), ("message", 0, 9_000, True, False), ("reset", 0), ("settle",)], True)
@example([("open", FAST, "a", "identity"), ("message", 0, 9_000, True, False), ("settle",), ("reply", 0, 9)], True)
@example(
    [("open", FAST, "a", "identity"), ("message", 0, 9, True, False), ("settle",), ("reply", 0, 99_000), ("reset", 0)],
    True,
)
def test_every_way_to_end_returns_what_was_held(steps, is_shared):
    log_level = server_connection.log.level
    server_connection.log.setLevel("CRITICAL")
    try:
        asyncio.run(play(steps, is_shared=is_shared))
    finally:
        server_connection.log.setLevel(log_level)


def envoys_connections(limit: int = LIMIT) -> list[Front]:
    """Connections of an Envoy with four threads and two priorities."""
    memory = ticking(Memory(limit, limit))
    return [Front(is_shared=True, memory=memory) for _ in range(8)]


async def end(fronts: list[Front]) -> None:
    for front in fronts:
        front.connection.connection_lost(None)
        await front.settle()
        await asyncio.gather(*front.app.tasks, return_exceptions=True)
        front.app.threads.close()
        assert shares_hold(*fronts) == (front.memory.bodies.held, front.memory.unread.held)
    assert (fronts[0].memory.bodies.held, fronts[0].memory.unread.held) == (0, 0)


async def test_a_tenant_has_a_number_of_requests_behind_an_envoy_whose_bodies_have_not_ended(monkeypatch):
    """Each takes memory of the Envoy, which all tenants share."""
    monkeypatch.setattr(server_connection, "_MOST_UNFINISHED", 4)
    fronts = envoys_connections()
    first, second, message = fronts[0], fronts[1], framed(bytes(9))

    async def begun(front: Front, path: str, tenant: str) -> int | None:
        number = front.open(path, tenant, client=1)
        await front.settle()
        front.data(number, message[:7], is_end=False)
        return number if number in front.connection._streams else None

    # A stream of messages may stay open.
    assert all([await begun(first, STREAM, "hog") for _ in range(6)])
    halves = [(front, await begun(front, path, "hog")) for front in (first, second) for path in (FAST, SLOW)]
    assert all(number for _, number in halves)
    assert [await begun(front, path, "hog") for front in (first, second) for path in (FAST, SLOW)] == [None] * 4
    assert first.memory.bodies.refused == 4
    assert await begun(first, FAST, "other")
    front, number = halves[0]
    front.data(number, message[7:], is_end=True)
    second.feed(frames.rst_stream(halves[2][1], Reason.CANCEL))
    await front.settle()
    assert await begun(second, FAST, "hog")
    assert await begun(first, FAST, "hog")
    assert await begun(first, FAST, "hog") is None
    await end(fronts)


async def test_a_tenant_has_one_share_of_requests_over_all_connections_of_an_envoy():
    fronts = envoys_connections()
    bodies = fronts[0].memory.bodies
    for _ in range(4):
        for front in fronts:
            front.data(front.open(FAST, "hog"), framed(bytes(LIMIT // 4))[: LIMIT // 8], is_end=False)
            await front.settle()
    assert LIMIT // 2 < bodies.held <= LIMIT * 4 // 5
    # New requests may take more. Their headers are read in turn.
    for _ in range(20):
        for front in fronts:
            front.open(STREAM, "hog")
        await front.settle()
    assert LIMIT * 4 // 5 < bodies.held <= LIMIT * 8 // 9
    assert dict(fronts[0].memory.held_by_tenant()) == {"hog": bodies.held}
    refused = bodies.refused
    other = fronts[3]
    # It takes twice its size: the body, and the message.
    other.data(other.open(FAST, "other"), framed(bytes(LIMIT // 32)), is_end=True)
    await other.settle()
    assert len(other.calls) == 1
    assert bodies.refused == refused > 0
    await end(fronts)


async def test_a_tenant_has_one_share_of_unread_responses_over_all_connections_of_an_envoy():
    fronts = envoys_connections()
    unread = fronts[0].memory.unread
    for front in fronts:
        front.feed(frames.settings({frames.WINDOW_SIZE: 0}))
        for _ in range(2):
            front.data(front.open(FAST, "hog"), framed(b"x"), is_end=True)
        await front.settle()
        for call in front.calls:
            call.reply((bytes(LIMIT // 8),), LIMIT // 8)
    assert LIMIT // 2 < unread.held <= LIMIT * 2 // 3
    # Small responses may take more.
    for front in fronts:
        front.data(front.open(FAST, "hog"), framed(b"x"), is_end=True)
        await front.settle()
        front.calls[-1].reply((bytes(LIMIT // 32),), LIMIT // 32)
    held = unread.held
    assert LIMIT * 2 // 3 < held <= LIMIT * 8 // 9
    other = fronts[3]
    number = other.open(FAST, "other")
    other.data(number, framed(b"x"), is_end=True)
    await other.settle()
    other.calls[-1].reply((bytes(LIMIT // 16),), LIMIT // 16)
    assert unread.held - held == LIMIT // 16 + 5
    assert other.connection._sender.has_unsent(number)
    await end(fronts)


@pytest.mark.parametrize("tenant", ["", "acme"])
async def test_clients_of_a_tenant_divide_its_share_of_requests(tenant):
    fronts = envoys_connections(limit := 8 * LIMIT)
    bodies, other = fronts[0].memory.bodies, fronts[3]

    async def fill(*clients: int) -> None:
        for _ in range(16):
            for front in fronts:
                for client in clients:
                    number = front.open(FAST, tenant, client=client)
                    front.data(number, framed(bytes(LIMIT // 4))[: LIMIT // 16], is_end=False)
                await front.settle()

    async def answers(name: str, client: int, size: int) -> bool:
        calls = len(other.calls)
        number = other.open(FAST, name, client=client)
        other.data(number, framed(bytes(size)), is_end=True)
        await other.settle()
        return len(other.calls) > calls

    await fill(1)
    assert limit * 3 // 5 < bodies.held <= limit * 2 // 3
    assert await answers(tenant, 2, LIMIT // 20)
    assert await answers("other", 1, LIMIT // 20)
    # So do several leave room, for another one of the tenant and for another tenant.
    await fill(*range(3, 7))
    assert limit * 2 // 3 < bodies.held <= limit * 4 // 5
    assert await answers(tenant, 9, LIMIT // 40)
    assert not await answers(tenant, 1, LIMIT // 40)
    assert await answers("other", 9, LIMIT // 20)
    assert bodies.refused == 0
    await end(fronts)


@pytest.mark.parametrize("path", [FAST, SLOW, STREAM])
async def test_small_calls_find_room_beside_what_other_clients_of_the_tenant_have_begun(path):
    fronts = envoys_connections(8 * LIMIT)
    bodies = fronts[0].memory.bodies
    for client in (1, 2, 3):
        for n in range(120):
            number = fronts[n % 8].open(FAST, "acme", client=client)
            fronts[n % 8].data(number, framed(bytes(LIMIT // 4))[: LIMIT // 16], is_end=False)
            await fronts[n % 8].settle()
        for n in range(200):
            fronts[n % 8].open(STREAM, "acme", client=client)
            await fronts[n % 8].settle()
    # Some of those were refused.
    refused, front = bodies.refused, fronts[3]
    assert refused > 0
    for client in range(4, 7):
        front.transport.written.clear()
        calls = len(front.calls)
        number = front.open(path, "acme", client=client)
        front.data(number, framed(b"a small body"), is_end=True)
        await front.settle()
        if path == FAST:
            front.calls[calls].reply((b"a small body",), 12)
            await front.settle()
        assert b"a small body" in front.transport.written
    assert bodies.refused == refused
    await end(fronts)


async def test_a_last_piece_that_waits_for_its_start_stays_counted():
    front = Front(is_shared=True)
    whole, data = framed(bytes(16_000)), b""
    for _ in range(5):
        data += front.opening(FAST, "a", client=1) + frames.frame(frames.DATA, 1, front.next - 2, framed(b"x"))
    number = front.next
    data += front.opening(SLOW, "a", client=1) + frames.frame(frames.DATA, 0, number, whole[:10])
    front.feed(data + frames.frame(frames.DATA, 1, number, whole[10:]))
    waited = 0
    while (stream := front.connection._streams.get(number)) is not None:
        if stream.kept is not None:
            waited += 1
            assert stream.held - stream.least_held >= len(whole) - 10
        shares_hold(front)
        await asyncio.sleep(0)
    assert waited > 0
    await end([front])


def test_a_clients_response_may_take_all_that_is_free_and_nothing_fits_a_full_account():
    account = MemoryAccount(90)
    share = TenantShares(account, have_clients=True).of(b"acme").of_client(b"1")
    share.add(60)
    assert not share.has_room(1)
    assert share.has_room_beside_large(1)
    assert share.fits(30)
    share.add(30)
    assert not share.fits(1)
    assert not share.has_room_beside_large(1)
    assert share.has_room(0)
    assert share.fits(0)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 10_000))
def test_a_request_that_begins_without_a_look_at_its_client_has_room(own, others, size, room):
    free = QUICK_FACTOR * (own + others + size) + room
    account = MemoryAccount(own + others + size + free)
    tenant = TenantShares(account, have_clients=True).of(b"acme")
    client = tenant.of_client(b"1")
    client.add(own)
    tenant.of_client(b"2").add(others)
    assert client.has_room_beside_large(size)


async def test_clients_of_a_tenant_divide_its_share_of_unread_responses():
    fronts = envoys_connections()
    unread = fronts[0].memory.unread
    for front in fronts:
        front.feed(frames.settings({frames.WINDOW_SIZE: 0}))
        await unread_responses(front, "acme", LIMIT // 8, client=1)
    assert LIMIT // 2 < unread.held <= LIMIT * 2 // 3
    # Small responses may take more, and still not all that the tenant may have.
    for front in fronts:
        await unread_responses(front, "acme", LIMIT // 64, client=1)
    held = unread.held
    assert LIMIT * 2 // 3 < held <= LIMIT * 64 // 81
    other = fronts[3]
    for size in (LIMIT // 15, LIMIT // 64):
        number = other.open(FAST, "acme", client=2)
        other.data(number, framed(b"x"), is_end=True)
        await other.settle()
        other.calls[-1].reply((bytes(size),), size)
        assert other.connection._sender.has_unsent(number) == (size == LIMIT // 64)
    await end(fronts)


async def test_requests_whose_headers_wait_have_one_share_over_all_connections_of_an_envoy():
    fronts = envoys_connections()
    memory = fronts[0].memory
    # No frames wait for a turn, however slow the machine is.
    memory.turns.clock = lambda: 1.0
    for front in fronts:
        # The first request shows that this is an Envoy's connection; of those that follow, few are decoded at once.
        front.open(STREAM, "first")
        front.feed(b"".join(front.opening(STREAM, "v" * 1_000 + str(n)) for n in range(40)))
    assert LIMIT // 2 < memory.later.held <= LIMIT * 2 // 3
    assert ("", memory.later.held) in set(memory.held_by_tenant())
    await end(fronts)


async def test_calls_that_services_make_for_a_tenant_count_in_its_share():
    fronts = envoys_connections()
    for has_connection in (True, False):
        for front in fronts:
            front._is_shared = has_connection
            for _ in range(8):
                front.data(front.open(FAST, "hog"), framed(bytes(LIMIT // 4))[: LIMIT // 32], is_end=False)
            # Frames wait for a turn where the machine is slow.
            await front.settle()
    assert LIMIT // 2 < fronts[0].memory.bodies.held <= LIMIT * 4 // 5
    await end(fronts)


async def unread_responses(front: Front, tenant: str, size: int, client: int | None = None) -> None:
    """Let `tenant`, or one of its clients, have as many responses of `size` bytes that wait as its share allows."""
    while True:
        number = front.open(FAST, tenant, client=client)
        front.data(number, framed(b"x"), is_end=True)
        await front.settle()
        front.calls[-1].reply((bytes(size),), size)
        if not front.connection._sender.has_unsent(number):
            return


async def test_a_direct_client_takes_nothing_from_the_share_of_a_tenant_that_it_names():
    behind = envoys_connections()[0]
    direct = Front(is_shared=True, is_direct=True, memory=behind.memory)
    for front in (behind, direct):
        front.feed(frames.settings({frames.WINDOW_SIZE: 0}))
    await unread_responses(direct, "victim", LIMIT // 8)
    memory = behind.memory
    assert memory.unread.held == direct.connection._unread.share.held > LIMIT // 2
    assert not memory.unread_of_tenants.by_tenant
    held = memory.unread.held
    number = behind.open(FAST, "victim")
    behind.data(number, framed(b"x"), is_end=True)
    await behind.settle()
    behind.calls[-1].reply((bytes(LIMIT // 8),), LIMIT // 8)
    assert memory.unread.held - held == LIMIT // 8 + 5
    await end([behind, direct])


@pytest.mark.parametrize("is_envoy", [True, False])
async def test_without_room_an_envoys_connection_that_pauses_is_kept_and_a_direct_clients_is_closed(is_envoy, caplog):
    hog = envoys_connections()[0]
    other = Front(is_direct=not is_envoy, memory=hog.memory)
    hog.feed(frames.settings({frames.WINDOW_SIZE: 0}))
    # Shares fill one after the other: many tenants leave next to nothing.
    for tenant in "abcdef":
        await unread_responses(hog, tenant, LIMIT // 32)
        await unread_responses(hog, tenant, 1_000)
    assert hog.memory.unread.limit - hog.memory.unread.held < LIMIT // 100
    other.transport.buffered = LIMIT // 16
    other.connection.pause_writing()
    assert other.transport.is_closing() == ("find no room" in caplog.text) == (not is_envoy)
    other.connection.resume_writing()
    await end([hog, other])


async def test_data_after_empty_data_that_waits_counts_in_the_share_that_the_tenant_has_then(monkeypatch):
    monkeypatch.setattr(memory_account, "_MAX_IDLE_SHARES", 4)
    (front,) = envoys_connections()[:1]
    shares, sender = front.memory.unread_of_tenants, front.connection._sender
    front.connection.pause_writing()
    number = front.open(SLOW, "a")
    sender.headers(number, b"")
    sender.data(number, b"")
    for n in range(8):
        shares.of(b"%d" % n)
    sender.data(number, bytes(1_000))
    assert dict(shares.held_by_tenant()) == {"a": 1_000}
    assert shares.of(b"a").held == 1_000
    await end([front])


def test_tenants_with_long_names_are_one():
    shares = TenantShares(MemoryAccount(LIMIT))
    assert shares.of(b"x" * 1_000) is shares.of(b"y" * 5_000) is not shares.of(b"x" * 256)
    assert max(map(len, shares.by_tenant)) == 256
