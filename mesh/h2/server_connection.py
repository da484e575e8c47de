"""Server side of one connection (RFC 9113): frames in, requests to the application.

    HEADERS ──> ServerStream ──> Application.request ──> RequestHandler <── DATA ... END_STREAM

Credit is given back when the application has consumed the data. What it holds meanwhile is counted (`memory_account`),
and so is what the peer does not read. `sending` keeps to the peer's windows. A peer that makes no progress, in one
direction or the other, loses the stream, and one that does not read loses the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial

from mesh.h2 import frames
from mesh.h2.bursts import Bursts
from mesh.h2.connections import Connections, admit
from mesh.h2.credits import SHARED_WINDOW, STEP_BYTES, Credits
from mesh.h2.frames import ACK, END_STREAM, LARGEST_WINDOW, ConnectionBroken, Reason
from mesh.h2.headers import LATER, Block, HeaderCache
from mesh.h2.memory_account import (
    BODY_BYTES,
    QUICK_FACTOR,
    UNREAD_BYTES,
    ClientShare,
    MemoryAccount,
    Share,
    TenantShares,
)
from mesh.h2.peer import CREDIT, READ_BYTES, STREAM_WINDOW, Peer
from mesh.h2.starts import TASKS, Starts
from mesh.h2.stream import NO_HANDLER, SMALL_BODY, STREAM_BYTES, Application, RequestHandler, ServerStream
from mesh.h2.turns import PART_FRAMES, PART_S, Lot, Turns
from mesh.h2.unread import MAX_TICKS, TICK_S, Unread
from shoal.tenant_header import TENANT_HEADER

log = logging.getLogger(__name__)

# Concurrent requests of one connection.
_MAX_STREAMS = 4096

# Requests of one tenant behind Envoy whose bodies have not ended. Each takes 30 kB of an Envoy, which all tenants
# share: 13,000 half-sent calls, without another byte, had it refuse every call for 30 s.
_MOST_UNFINISHED = 1_000

_SETTINGS_TIMEOUT_S = 10.0

# Token bucket of streams that the peer cancels, or that are reset because of it. A response gives one token back: an
# Envoy whose clients give up on every second call is no attack, and carries everybody's calls.
_RESETS, _RESETS_A_S = 10_000, 1_000

# SETTINGS that change windows cost as much as resets. Clients that adapt their windows send a few a second.
_SETTINGS_TOKENS = 10


# The connection's window. What is held is counted and bounded, so the window never closes before the account is full.
_WINDOW_MARGIN = 64 << 20

TENANT = TENANT_HEADER.encode()
"""Header of a request that names the tenant whose share of memory its body takes."""

# Frames of a shared connection that are handled at once at least: starting their calls takes turns of its own, and
# frames that wait unread would delay the calls of all its senders.
_SHARED_FRAMES = 512

# New header blocks of a shared connection that are decoded at once in one turn. To decode one costs more than all else
# of reading a call.
_NEW_BLOCKS = 4

# Frames of such a request that are kept at most, and what each takes beside its payload.
_LATE_FRAMES, _FRAME_BYTES = 64, 128

# In place of the tenant of a request whose headers are to be decoded later.
_NEW = b"\0new"

# The end of a stream whose connection is lost costs as much as so many frames.
_FRAMES_A_STREAM = 8

# Memory of lost requests that is freed in one iteration of the event loop, or one larger request. As many bytes of
# short texts take 3 ms to free.
_FREED_BYTES = 4 << 20

# Ticks without any byte of a peer with open streams after which it is pinged: 30 s. After as many more it is given up.
# A machine that has lost its power, or a proxy that has lost its client, closes no connection.
_QUIET_TICKS = 6

LINGER_S = 1.0
"""Longest wait for a peer to close a connection after its last response."""

# Payload of the PING after the first GOAWAY. Its acknowledgement shows that the peer has read the GOAWAY.
_SHUTDOWN_PING = b"shutdown"
_ALIVE_PING = b"alive?.."


class Memory:
    """State that connections of one server share: header cache, memory accounts, turns to read, start and write.

    An Envoy opens a connection for each of its threads and priorities, and each carries the calls of all tenants. So a
    tenant behind Envoy has one share of each account, over all of them, and all clients without a tenant have one
    together. Clients of a tenant, by their connection to Envoy, divide its share. Calls that services make for
    themselves count in shares of the connection.
    """

    def __init__(self, body_bytes: int = BODY_BYTES, unread_bytes: int = UNREAD_BYTES) -> None:
        self.headers = HeaderCache()
        self.bodies = MemoryAccount(body_bytes)
        self.unread = MemoryAccount(unread_bytes)
        self.tenants = TenantShares(self.bodies, have_clients=True)
        self.unread_of_tenants = TenantShares(self.unread, have_clients=True)
        self.later = self.bodies.share()
        """Share of the requests whose headers are to be decoded later."""
        self.turns = Turns()
        self.bursts = Bursts()
        self.starts = Starts()

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        """Yield the bytes that requests of a tenant behind Envoy hold; "" for those that name none."""
        yield from self.tenants.held_by_tenant()
        if self.later.held:
            yield "", self.later.held


class _Late:
    """Frames of a request whose headers are to be decoded later."""

    __slots__ = ("encoded", "flags", "frames", "held")

    def __init__(self, flags: int, encoded: bytes, held: int) -> None:
        self.flags = flags
        self.encoded = encoded
        # Those that followed, and the bytes that all together count.
        self.frames: list[tuple[int, int, bytes]] = []
        self.held = held


class ServerConnection(Peer):
    """Connection of one peer; an entry of `connections` while open."""

    _turns: Turns

    def __init__(self, app: Application, connections: Connections, memory: Memory) -> None:
        self._unread = Unread(memory.unread)
        super().__init__(
            awaits_preface=True,
            cache=memory.headers,
            unread=self._unread.share,
            turns=memory.turns,
            bursts=memory.bursts,
        )
        self._app = app
        self._connections = connections
        self._memory = memory
        self._bodies = memory.bodies
        self._starts = memory.starts
        # True when calls of several senders come over the connection: they start at once until `_starts_until`, then in
        # turn.
        self._is_shared, self._starts_until = False, 0.0
        # Requests of a shared connection that began in a task since it was last given a turn, or data: with their
        # headers, and when they were whole.
        self._tasks_begun = self._tasks_started = 0
        # Tenants of direct clients, and calls of services without a tenant.
        self._tenants = TenantShares(memory.bodies)
        self._streams: dict[int, ServerStream] = {}
        # Credit of the bodies, when the peer is at a unix socket: such peers are Envoys.
        self._credits: Credits | None = None
        self._stream_window = STREAM_WINDOW
        # Requests whose headers are to be decoded later, by stream.
        self._later: dict[int, _Late] = {}
        # True while one of them is opened. It was accepted before the connection began to close.
        self._is_late = False
        # Streams of the lost connection, and the bytes that they held.
        self._lost: list[tuple[ServerStream, int]] = []
        self._is_aborted = False
        self._is_closing = False
        self._goaway_read: asyncio.Future[None] = self._loop.create_future()
        self._lingering: asyncio.TimerHandle | None = None
        self._settings_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._resets, self._resets_counted_at = 0, 0.0
        self._quiet_ticks = 0

    # -- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = (str(peer[0]), int(peer[1]))
        else:
            self.peer, self._credits, self._stream_window = ("unix", 0), Credits(), SHARED_WINDOW
            self._unread.is_closed_for_room = False
        if not admit(self, self._connections):
            self._transport.abort()
            return
        self._settings_timer = self._loop.call_later(_SETTINGS_TIMEOUT_S, self._on_settings_timeout)
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        window = min(self._bodies.limit + _WINDOW_MARGIN, LARGEST_WINDOW)
        self._send_settings({frames.MAX_STREAMS: _MAX_STREAMS}, window, self._stream_window)

    @property
    def is_idle(self) -> bool:
        """True while no stream is open."""
        return not self._streams and not self._later

    @property
    def is_new(self) -> bool:
        """True before the first request."""
        return not self._newest

    def _on_settings_timeout(self) -> None:
        if not self._has_settings:
            self._break(ConnectionBroken(Reason.SETTINGS_TIMEOUT, f"no SETTINGS within {_SETTINGS_TIMEOUT_S:.0f} s"))

    def data_received(self, data: bytes) -> None:
        self._quiet_ticks = 0
        if self._lingering is None:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.pop(self, None)
        for timer in (self._settings_timer, self._tick_timer, self._lingering):
            if timer is not None:
                timer.cancel()
        had_waited, self._is_waiting = self._is_waiting, False
        self._on_goaway_read()
        self._is_closing = True
        self._unread.count(0, self._transport)
        self._sender.close()
        if self._credits is not None:
            self._credits.close()
        self._lost, self._streams = [(stream, stream.held) for stream in self._streams.values()], {}
        for stream, _ in self._lost:
            stream.release_all()
        self._end_lost(len(self._lost) if self._is_aborted else self._turns.at_once // _FRAMES_A_STREAM)
        # The memory of one such connection is freed in an iteration.
        self._become(Lot.DIRECT)
        if self._lost and not had_waited:
            self._turns.wait(self)
        self._unparsed, self._block = b"", None
        for number in tuple(self._later):
            self._drop_late(number)

    def _end_lost(self, most: int) -> None:
        """Notify the handlers of the lost connection's streams, not of thousands in one iteration of the loop."""
        freed = 0
        for _ in range(min(most, len(self._lost))):
            stream, held = self._lost.pop()
            disconnect(stream, stream.handler)
            freed += held
            if freed > _FREED_BYTES and not self._is_aborted:
                break

    def take_turn(self, frames: int) -> bool:
        """Handle some of the frames that wait; of a lost connection, end some of its streams."""
        if not self._lost:
            return super().take_turn(frames)
        self._end_lost(frames // _FRAMES_A_STREAM)
        if self._lost:
            self._turns.wait(self)
        return True

    def _lot(self, size: int) -> Lot:
        """Return the kind of the connection while `size` bytes wait.

        `Starts` bounds the tasks that calls from an Envoy begin. The tasks of calls on 30 direct connections, when
        begun in one iteration, held the event loop for 22 ms.
        """
        if not self._is_shared:
            return Lot.DIRECT
        return Lot.MUCH if size > READ_BYTES else Lot.SHORT

    def pause_writing(self) -> None:
        """Stop reading, too: a peer that does not read may not ask for more."""
        super().pause_writing()
        self._is_write_paused = True
        self._unread.pause(self._transport)
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._unread.count(0, self._transport)
        super().resume_writing()
        self._read_if_free()

    def _tick(self) -> None:
        """Give up the streams and the connection of a peer that makes no progress."""
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        # A connection that ends stays open, too, until its peer has read the last responses.
        if self._is_write_paused or self._lingering is not None or self._transport.is_closing():
            self._unread.tick(self._transport)
            return
        credits = self._credits
        for stream in [stream for stream in self._streams.values() if not stream.is_request_ended]:
            # One that waits for credit cannot make progress.
            if credits is not None and credits.is_waiting(stream.number):
                stream.idle_ticks = 0
                continue
            try:
                stream.tick()
            except Exception:
                reset(stream)
        self._sender.tick(MAX_TICKS)
        self._check_peer()

    def _check_peer(self) -> None:
        """Ping a silent peer that has open streams, and close the connection of one that has gone."""
        # While it waits for its turn, it is not read, and may have sent anything.
        if not self._streams or self._is_waiting:
            self._quiet_ticks = 0
            return
        self._quiet_ticks += 1
        if self._quiet_ticks > 2 * _QUIET_TICKS:
            log.warning(
                "a connection with %(streams)d streams is closed: its peer answers no PING",
                {"event": "connection.peer_is_gone", "streams": len(self._streams)},
            )
            self._transport.abort()
        elif self._quiet_ticks == _QUIET_TICKS:
            self._sender.write(frames.frame(frames.PING, 0, 0, _ALIVE_PING))

    # -- requests

    def _on_block(self, number: int, flags: int, block: Block) -> None:
        if number <= self._newest or not number & 1:
            self._on_trailers(number, flags, block)
            return
        is_ended = flags & END_STREAM != 0
        is_malformed = block.is_malformed or (is_ended and bool(block.body_bytes))
        if is_malformed or len(self._streams) >= _MAX_STREAMS or (self._is_closing and not self._is_late):
            if block is LATER:
                encoded = self._decoder.latest
                if not self._opens_later(number, flags, encoded):
                    self._on_block(number, flags, self._decoder.decode_now(encoded))
                return
            self._newest = number
            reason = Reason.PROTOCOL_ERROR if is_malformed else Reason.REFUSED_STREAM
            self._sender.write(frames.rst_stream(number, reason))
            self._spend(1)
            return
        self._newest = number
        tenant, tenants, client = block.by_name.get(TENANT, b""), self._tenants, None
        # Only an Envoy speaks for others.
        if self._credits is not None:
            client = self._decoder.connection
            if client is not None:
                self._is_shared = True
            if tenant or client is not None:
                tenants = self._memory.tenants
        account = self._bodies
        # As `TenantShares.of` and `add` of the client's share: the common case calls no function.
        share = tenants.by_tenant.get(tenant) or tenants.open(tenant)
        size = STREAM_BYTES + block.list_bytes
        free = account.limit - account.held - size
        key = client or b""
        has_room = QUICK_FACTOR * (share.held + size) <= free or share.of_client(key).has_room_beside_large(size)
        share.held += size
        account.held += size
        if (by_client := share.by_client) is not None:
            by_client[key] = by_client.get(key, 0) + size
        self._streams[number] = stream = ServerStream(self, self._sender, number, block, is_ended, share, size, client)
        if client is not None and tenant and not is_ended:
            has_room = has_room and share.unfinished < _MOST_UNFINISHED
            stream.is_unfinished = True
            share.unfinished += 1
        self._sender.open(number)
        try:
            if not has_room:
                account.refused += 1
                self._app.reject(stream)
                return
            stream.handler = handler = self._app.request(stream)
            if is_ended and not (self._is_shared and self._waits(stream, b"", 0)):
                handler.data(b"", 0, is_end=True)
            if self._is_shared and handler.is_task:
                self._tasks_begun += 1
        except Exception:
            reset(stream)

    def _opens_later(self, number: int, flags: int, encoded: bytes) -> bool:
        """Let a request with a new header block wait for its start. Return False when it is to be opened now."""
        has_place = len(self._streams) + len(self._later) < _MAX_STREAMS and not self._is_closing
        if not has_place or not self._memory.later.has_room(size := STREAM_BYTES + len(encoded)):
            return False
        self._newest = number
        self._memory.later.add(size)
        self._later[number] = _Late(flags, encoded, size)
        self._starts.add(_NEW, self._decoder.connection_of(encoded), partial(self._start_late, number))
        return True

    def _start_late(self, number: int) -> bool:
        """Open a request that has waited. Return True when it begins in a task."""
        tasks = self._tasks_begun + self._tasks_started
        try:
            self._open_late(number)
        except Exception as err:
            self._fail(err)
        return self._tasks_begun + self._tasks_started > tasks

    def _open_late(self, number: int) -> None:
        """Handle the frames of a request that has waited, if it still does. Raises ConnectionBroken."""
        late = self._drop_late(number)
        if late is None or self._transport.is_closing():
            return
        block = self._decoder.decode_now(late.encoded)
        # Later streams may have begun.
        newest, self._newest = self._newest, number - 1
        self._is_late = True
        try:
            self._on_block(number, late.flags, block)
        finally:
            self._newest, self._is_late = newest, False
        for kind, flags, payload in late.frames:
            if kind == frames.DATA:
                # Its credit was given back when it came.
                self._credited(-len(payload))
                self._on_data(number, flags, payload, len(payload))
            elif kind == frames.WINDOW_UPDATE:
                self._on_window(number, payload)
            else:
                self._on_trailers(number, flags, self._decoder.decode_now(payload))
        self._close_when_done()

    def _drop_late(self, number: int) -> _Late | None:
        late = self._later.pop(number, None)
        if late is not None:
            self._memory.later.remove(late.held)
        return late

    def _keeps(self, number: int, kind: int, flags: int, payload: bytes) -> bool:
        """Keep a frame for a request that is to be opened later. Return False when there is none."""
        late = self._later.get(number)
        if late is None:
            return False
        size = len(payload) + _FRAME_BYTES
        if len(late.frames) >= _LATE_FRAMES or not self._memory.later.has_room(size):
            self._open_late(number)
            return False
        self._memory.later.add(size)
        late.held += size
        late.frames.append((kind, flags, payload))
        return True

    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        self._credited(size)
        stream = self._streams.get(number)
        if stream is None and number in self._later:
            if self._keeps(number, frames.DATA, flags, payload):
                return
            stream = self._streams.get(number)
        if stream is None:
            if not 0 < number <= self._newest:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"DATA on stream {number}, which is not open")
            # The stream has ended or was reset: data that was on its way is dropped.
            return
        if stream.is_request_ended:
            raise ConnectionBroken(Reason.STREAM_CLOSED, f"DATA on stream {number} after its end")
        if flags & frames.PADDED:
            payload = frames.without_padding(payload, flags)
        stream.received += size
        if stream.received > self._stream_window + stream.extra:
            raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"more on stream {number} than its window")
        if (left := stream.left) is not None:
            stream.left = left = left - len(payload)
            if left < 0 or (left and flags & END_STREAM):
                self._reset_malformed(stream)
                return
        if (credits := self._credits) is not None and number in credits.bodies:
            credits.arrived(number, size)
            if flags & END_STREAM:
                self._expects_no_more(number)
        if flags & END_STREAM:
            stream.is_request_ended = is_end = True
            if stream.is_unfinished:
                stream.count_as_finished()
            if self._is_shared and self._waits(stream, payload, size):
                return
        else:
            stream.moved += size
            is_end = False
        handler = stream.handler
        try:
            handler.data(payload, size, is_end=is_end)
        except Exception:
            reset(stream)
        if is_end and self._is_shared and handler.is_task:
            self._tasks_started += 1

    def _waits(self, stream: ServerStream, piece: bytes, size: int) -> bool:
        """Let a whole request, whose last piece is `piece`, wait for its start. Return False when it starts now."""
        starts = self._starts
        tenant, sender = stream.head.by_name.get(TENANT, b""), stream.client or b""
        is_early = self._tasks_started < TASKS and starts.clock() < self._starts_until
        if is_early and not starts.has(tenant, sender):
            return False
        # As a handler would: a small piece is counted with its stream.
        counted = size if size > SMALL_BODY else 0
        if counted and not stream.reserve(counted):
            return False
        stream.kept = piece, size, counted
        starts.add(tenant, sender, partial(self._start, stream.number))
        return True

    def _start(self, number: int) -> bool:
        """Start a request that has waited, unless it has ended. Return True when it begins in a task."""
        stream = self._streams.get(number)
        if stream is None or stream.kept is None:
            return False
        (piece, size, counted), stream.kept = stream.kept, None
        stream.release(counted)
        handler = stream.handler
        try:
            handler.data(piece, size, is_end=True)
        except Exception:
            reset(stream)
        return handler.is_task

    def _handle(self, data: bytes, most: int) -> None:
        if self._is_shared:
            self._starts_until = self._starts.clock() + PART_S
            self._tasks_begun = self._tasks_started = 0
            self._decoder.new_blocks = _NEW_BLOCKS
            most = max(most, _SHARED_FRAMES)
        super()._handle(data, most)

    def _has_handled_enough(self, took_s: float) -> bool:
        if not self._is_shared:
            return super()._has_handled_enough(took_s)
        # What a task costs follows later: 128 streams that began held the event loop for 30 ms.
        return took_s > 2 * PART_S or self._tasks_begun >= PART_FRAMES

    def _on_trailers(self, number: int, flags: int, block: Block) -> None:
        encoded = self._decoder.latest
        if number in self._later and self._keeps(number, frames.HEADERS, flags, encoded):
            return
        if block is LATER:
            if number not in self._streams and number <= self._newest:
                # The stream has ended or was reset: trailers that were on their way are dropped.
                return
            self._tasks_begun += 1
            block = self._decoder.decode_now(encoded)
        stream = self._streams.get(number)
        if stream is None:
            if number > self._newest or not number & 1:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"HEADERS on stream {number}, which no client opens")
            return
        is_malformed = block.is_malformed or any(name[:1] == b":" for name in block.by_name)
        if is_malformed or not flags & END_STREAM or stream.is_request_ended or stream.left:
            self._reset_malformed(stream)
            return
        stream.is_request_ended = True
        stream.count_as_finished()
        self._expects_no_more(number)
        if self._is_shared and self._waits(stream, b"", 0):
            return
        handler = stream.handler
        try:
            handler.data(b"", 0, is_end=True)
        except Exception:
            reset(stream)
        if self._is_shared and handler.is_task:
            self._tasks_started += 1

    def _reset_malformed(self, stream: ServerStream) -> None:
        """End the stream of a malformed request, and no other one (RFC 9113, section 8.1.1)."""
        stream.reset(Reason.PROTOCOL_ERROR)
        self._spend(0)

    def _on_goaway(self, payload: bytes) -> None:
        self._is_closing = True
        self._close_when_done()

    def _unread_share(self, number: int) -> Share | ClientShare:
        """Return the share of a client of a tenant behind Envoy, or of the connection."""
        stream = self._streams.get(number)
        if stream is not None and self._credits is not None:
            tenant = stream.head.by_name.get(TENANT, b"")
            if tenant or stream.client is not None:
                return self._memory.unread_of_tenants.of(tenant).of_client(stream.client or b"")
        return self._unread_of_connection

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        """Yield what requests hold that have shares of the connection; `Memory` has the others."""
        return self._tenants.held_by_tenant()

    def return_credit(self, size: int) -> None:
        """Give back flow-control credit of the connection; a negative `size` keeps it."""
        self._credited(size)

    def owes_credit(self, stream: ServerStream, size: int) -> None:
        """Give back credit of a stream, of which `size` bytes were consumed; now, or when it is its body's turn."""
        if self._credits is None:
            if size >= CREDIT:
                stream.give_credit()
        elif size >= STEP_BYTES + stream.extra // 2 and not stream.is_request_ended and stream.number in self._streams:
            self._credits.wait(stream)

    def _expects_no_more(self, number: int) -> None:
        """Stop counting the credit of a body that has ended."""
        if (credits := self._credits) is not None and number in credits.bodies:
            credits.ended(number)

    def _on_window(self, number: int, payload: bytes) -> None:
        if number in self._later and self._keeps(number, frames.WINDOW_UPDATE, 0, payload):
            return
        super()._on_window(number, payload)
        # A window that is too large resets its stream.
        if self._resets > _RESETS:
            self._spend(0)

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if self._has_settings and not flags & ACK:
            self._spend(_SETTINGS_TOKENS)
        super()._on_settings(number, flags, payload)

    def _on_reset(self, number: int, reason: int) -> None:
        if not 0 < number <= self._newest:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which is not open")
        stream = self._streams.pop(number, None)
        if stream is None:
            if self._drop_late(number) is not None:
                self._close_when_done()
                self._spend(1)
            return
        self._sender.forget(number)
        self._expects_no_more(number)
        stream.release_all()
        disconnect(stream, stream.handler)
        self._close_when_done()
        self._spend(1)

    def _spend(self, tokens: int) -> None:
        """Take tokens of the bucket of resets. Raises ConnectionBroken when it is empty.

        A node's Envoy carries the calls of all its clients: their resets may not end the calls of others.
        """
        now = self._loop.time()
        regained = int((now - self._resets_counted_at) * _RESETS_A_S)
        if regained:
            self._resets = max(0, self._resets - regained)
            self._resets_counted_at = now
        self._resets += tokens
        if self._resets > _RESETS and not (self._is_shared and self.peer[0] == "unix"):
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM, f"more than {_RESETS} streams were cancelled, and {_RESETS_A_S} a second"
            )

    # -- the end

    def _ended(self, number: int, reason: Reason | None) -> None:
        """Remove a stream whose response has ended (None), or that was reset."""
        stream = self._streams.pop(number)
        # Handler and stream refer to each other. Unless that ends here, the body waits for Python's garbage collector,
        # which counts objects and not bytes.
        handler, stream.handler = stream.handler, NO_HANDLER
        stream.count_as_finished()
        # As `ServerStream.release_all`, for the common case.
        held, stream.held, stream.least_held = stream.held, 0, 0
        share = stream.share
        share.held -= held
        self._bodies.held -= held
        if (by_client := share.by_client) is not None:
            key = stream.client or b""
            by_client[key] = left = by_client[key] - held
            if not left:
                del by_client[key]
        if stream.withheld:
            stream.return_withheld()
        if reason is not None:
            self._expects_no_more(number)
            # The bucket is checked at a frame of the peer: an exception here would reach the application.
            self._resets += 1
            disconnect(stream, handler)
        else:
            if self._resets:
                self._resets -= 1
            if not stream.is_request_ended:
                # The response ended before the request: the rest of the request is not read.
                self._expects_no_more(number)
                self._sender.write(frames.rst_stream(number, Reason.NO_ERROR))
        if self._is_closing:
            self._close_when_done()

    def send_goaway(self) -> asyncio.Future[None]:
        """Ask the peer to open no more streams. The future is done when the peer has read it or has disconnected.

        Open streams finish, and those that the peer opens before it reads the GOAWAY.
        """
        if self._has_settings and self._lingering is None and not self._transport.is_closing():
            ping = frames.frame(frames.PING, 0, 0, _SHUTDOWN_PING)
            self._sender.write(frames.goaway(LARGEST_WINDOW, Reason.NO_ERROR) + ping)
        else:
            self._on_goaway_read()
        return self._goaway_read

    def _acknowledged(self, payload: bytes) -> None:
        if payload == _SHUTDOWN_PING:
            self._on_goaway_read()

    def _on_goaway_read(self) -> None:
        if not self._goaway_read.done():
            self._goaway_read.set_result(None)

    def send_last_goaway(self) -> None:
        """Tell the peer which stream is the last one that is served. The connection closes when all have ended."""
        if self._lingering is None:
            self._is_closing = True
            self._sender.write(frames.goaway(self._newest, Reason.NO_ERROR))
            self._close_when_done()

    def abort(self) -> None:
        """Close the connection immediately. Its handlers are notified at once that their clients have disconnected."""
        self._is_aborted = True
        self._transport.abort()

    def _close_when_done(self) -> None:
        if not self._is_closing or self._streams or self._later or self._lingering is not None:
            return
        self._sender.flush()
        if self._transport.is_closing():
            return
        # Only our side is closed. A peer whose own write fails may drop responses that it has not read yet, so the
        # connection stays open until the peer closes it.
        self._lingering = self._loop.call_later(LINGER_S, self._end_lingering)
        self._sender.write_eof()

    def _end_lingering(self) -> None:
        # The peer may still be reading the last responses.
        if self._transport.get_write_buffer_size():
            self._lingering = self._loop.call_later(LINGER_S, self._end_lingering)
        else:
            self._transport.abort()


def reset(stream: ServerStream) -> None:
    """Reset the stream of a request whose handler has raised an exception."""
    log.exception(
        "the handler of %(path)s failed: its stream is reset",
        {"event": "stream.handler_failed", "path": stream.head.path},
    )
    stream.reset(Reason.INTERNAL_ERROR)


def disconnect(stream: ServerStream, handler: RequestHandler) -> None:
    """Notify the handler that the client has disconnected."""
    stream.handler = NO_HANDLER
    try:
        handler.disconnected()
    except Exception:
        log.exception(
            "the handler of %(path)s failed when its client disconnected",
            {"event": "stream.handler_failed_at_disconnect", "path": stream.head.path},
        )
