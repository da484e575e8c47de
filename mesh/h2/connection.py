"""One connection: frames in, calls out (RFC 9113).

    HEADERS ──> Inbound ──DATA ... END_STREAM──> short method: Exchange ──answer──> HEADERS, DATA, HEADERS in one write
                   └──> any other: Stream, a task of the GrpcApp

What may come is bounded by our windows, which are opened again as the data is taken; `sending` keeps to the peer's.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from functools import partial
from typing import TYPE_CHECKING

from mesh.asgi import status
from mesh.asgi.exchange import Exchange, ShortHandler
from mesh.h2 import frames
from mesh.h2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_BYTES,
    HEADERS,
    LARGEST_WINDOW,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ConnectionBroken,
    Reason,
)
from mesh.h2.headers import Block, Decoder, encode
from mesh.h2.sending import Sender
from mesh.h2.stream import Stream
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from mesh.asgi.app import GrpcApp

log = logging.getLogger(__name__)

_STREAMS = 4096
_STREAM_WINDOW = 4 << 20
_CONNECTION_WINDOW = 256 << 20
# What a trusted peer may send before we took it: many large tensors at the same time.

_CREDIT = 1 << 20
# Windows are opened again in steps of this size: an update costs as much as a small request.

_BLOCK_BYTES = 128 << 10
_CONTINUATIONS = 64
# Frames of one block: 128 KiB in frames of 16 KiB, with room. Else empty ones could come for ever.

_GREETING_S = 10.0
_CONNECTIONS = 1024
# The Envoys beside it open a few dozen.

_RESETS = 20_000
# Streams that the peer opened, and cancelled or had us cancel, on one connection, without one answer in between: no
# client does that.

_STATUS_200 = (b":status", b"200")


class Inbound:
    """What comes on a stream, from its HEADERS on."""

    __slots__ = ("block", "exchange", "is_ended", "received", "stream", "uncredited")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.received = 0
        self.uncredited = 0
        self.is_ended = False
        self.exchange: H2Exchange | None = None
        self.stream: Stream | None = None


class H2Exchange(Exchange):
    """An exchange that answers in one write, and is told when its caller goes."""

    __slots__ = ("_number", "_sender")

    def __init__(
        self, app: GrpcApp, handler: ShortHandler, headers: dict[bytes, bytes], sender: Sender, number: int
    ) -> None:
        super().__init__(app, handler, headers, None, None)
        self._sender = sender
        self._number = number

    def _answer(self, body: bytes) -> None:
        self._sender.answer(self._number, body)

    def _answer_error(self, headers: status.Headers) -> None:
        self._sender.end(self._number, encode([_STATUS_200, *headers]))

    def poll(self) -> None:
        """The connection says when the caller goes."""


class Connection(asyncio.Protocol):
    """Serves one peer. `connections` holds it as long as it is open."""

    def __init__(self, app: GrpcApp, connections: set[Connection]) -> None:
        self._app = app
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._inbound: dict[int, Inbound] = {}
        self._sender = Sender(self._ended)
        self._rest = b""
        self._has_preface = self._has_settings = self._is_closing = False
        self._block: tuple[int, int, bytearray] | None = None
        self._newest = 0
        self._credit = 0
        self._resets = 0
        self._continuations = 0

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is of no common class.
        self._sender.begin(self._transport)
        peer = transport.get_extra_info("peername")
        self.peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("unix", 0)
        if len(self._connections) >= _CONNECTIONS:
            log.warning("%d connections are open: one more is refused", len(self._connections))
            self._transport.abort()
            return
        self._connections.add(self)
        self._greeting = self._loop.call_later(_GREETING_S, self._ungreeted)
        ours = {
            frames.TABLE_SIZE: 0,
            frames.MAX_STREAMS: _STREAMS,
            frames.WINDOW_SIZE: _STREAM_WINDOW,
            frames.HEADER_LIST_SIZE: 64 << 10,
        }
        self._sender.write(frames.settings(ours) + frames.window_update(0, _CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    def _ungreeted(self) -> None:
        if not self._has_settings:
            self._break(ConnectionBroken(Reason.SETTINGS_TIMEOUT, f"no SETTINGS came within {_GREETING_S:.0f} s"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._connections:
            self._connections.remove(self)
            self._greeting.cancel()
        self._is_closing = True
        for inbound in list(self._inbound.values()):
            _gone(inbound)
        self._inbound.clear()
        self._sender.lost()

    def pause_writing(self) -> None:
        self._sender.pause()

    def resume_writing(self) -> None:
        self._sender.resume()

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except ConnectionBroken as err:
            self._break(err)
        except Exception:
            log.exception("a fault while reading a connection: it ends")
            self._break(ConnectionBroken(Reason.INTERNAL_ERROR, "internal error"))
        self._sender.flush()

    def _break(self, err: ConnectionBroken) -> None:
        log.warning("a connection is ended with %s: %s", err.reason.name, err)
        self._sender.write(frames.goaway(self._newest, err.reason, str(err)))
        self._sender.flush()
        self._transport.close()

    # -- what comes

    def _take(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        if not self._has_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, "this is no HTTP/2: the connection preface is missing")
            if end < len(PREFACE):
                self._rest = data
                return
            at, self._has_preface = len(PREFACE), True
        unpack = frames.HEADER.unpack_from
        while end - at >= HEADER_BYTES:
            high, low, kind, flags, number = unpack(data, at)
            size = high << 16 | low
            if size > DEFAULT_FRAME:
                raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, f"a frame of {size} bytes: at most {DEFAULT_FRAME}")
            start = at + HEADER_BYTES
            if start + size > end:
                break
            at = start + size
            if self._block is not None or not self._has_settings:
                self._check_order(kind)
            payload = data[start:at]
            if kind == DATA:
                self._on_data(number, flags, payload, size)
            elif kind == HEADERS:
                self._on_headers(number, flags, payload)
            else:
                self._on_other(kind, flags, number & LARGEST_WINDOW, payload)
        self._rest = data[at:]

    def _check_order(self, kind: int) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "a header block is not continued")
        if not self._has_settings and kind != SETTINGS:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "the first frame is not SETTINGS")

    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        self._credit += size
        if self._credit >= _CREDIT:
            self._sender.write(frames.window_update(0, self._credit))
            self._credit = 0
        inbound = self._inbound.get(number)
        if inbound is None:
            if not 0 < number <= self._newest:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"DATA on stream {number}, which is not open")
            return  # It was ended by us, or reset by the peer: what was on its way is dropped.
        if inbound.is_ended:
            raise ConnectionBroken(Reason.STREAM_CLOSED, f"DATA on stream {number} after its end")
        if flags & frames.PADDED:
            payload = frames.without_padding(payload, flags)
        exchange = inbound.exchange
        if exchange is not None and flags & END_STREAM and not inbound.received:
            inbound.is_ended = True  # Nearly all calls: one frame is the whole request.
            exchange.take(payload, more=False)
            return
        inbound.received += size
        if inbound.received - inbound.uncredited > _STREAM_WINDOW:
            raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"more on stream {number} than its window")
        is_end = bool(flags & END_STREAM)
        inbound.is_ended = is_end
        if exchange is None:
            assert inbound.stream is not None
            inbound.stream.feed(payload, size, is_end=is_end)
        elif exchange.take(payload, more=not is_end) and inbound.received - inbound.uncredited >= _CREDIT:
            self._taken(number, inbound.received - inbound.uncredited)

    def _taken(self, number: int, size: int) -> None:
        """So many bytes of a stream have been taken: the peer may send as many again."""
        inbound = self._inbound.get(number)
        if inbound is not None and size:
            inbound.uncredited += size
            if not inbound.is_ended:
                self._sender.write(frames.window_update(number, size))

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if flags & (frames.PADDED | PRIORITIZED):
            payload = frames.without_padding(payload, flags)
            if flags & PRIORITIZED:
                payload = payload[5:]
        if not flags & END_HEADERS:
            self._block, self._continuations = (number, flags, bytearray(payload)), 0
            return
        self._on_block(number, flags, payload)

    def _on_continuation(self, number: int, flags: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first, held = self._block
        held += payload
        self._continuations += 1
        if len(held) > _BLOCK_BYTES or self._continuations > _CONTINUATIONS:
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM,
                f"a header block of more than {_BLOCK_BYTES} bytes, or {_CONTINUATIONS} frames",
            )
        if flags & END_HEADERS:
            self._block = None
            self._on_block(number, first, bytes(held))

    def _on_block(self, number: int, flags: int, encoded: bytes) -> None:
        block = self._decoder.decode(encoded)
        if number <= self._newest or not number & 1:
            self._on_trailers(number, flags)
            return
        self._newest = number
        if len(self._inbound) >= _STREAMS or self._is_closing:
            self._sender.write(frames.rst_stream(number, Reason.REFUSED_STREAM))
            return
        inbound = self._inbound[number] = Inbound(block)
        self._sender.open(number)
        handler = self._app.short.get(block.path)
        if handler is None or not self._exchange(number, inbound, handler, flags):
            self._open(number, inbound)
            if flags & END_STREAM:
                assert inbound.stream is not None
                inbound.is_ended = True
                inbound.stream.feed(b"", 0, is_end=True)

    def _exchange(self, number: int, inbound: Inbound, handler: ShortHandler, flags: int) -> bool:
        """Begins a call on the short way. False when it is none: the long way says why."""
        headers = inbound.block.by_name
        if headers.get(b"content-type") != b"application/grpc" or headers.get(b":method") != b"POST":
            return False
        if flags & END_STREAM:
            return False
        try:
            inbound.exchange = exchange = H2Exchange(self._app, handler, headers, self._sender, number)
        except ShoalError:  # A header that is none of gRPC's.
            return False
        self._app.exchanges.add(exchange)
        return True

    def _on_trailers(self, number: int, flags: int) -> None:
        inbound = self._inbound.get(number)
        if inbound is None:
            if number > self._newest or not number & 1:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"HEADERS on stream {number}, which no client opens")
            return
        if not flags & END_STREAM or inbound.is_ended:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"HEADERS inside stream {number}")
        inbound.is_ended = True
        if inbound.exchange is not None:
            inbound.exchange.take(b"", more=False)
        elif inbound.stream is not None:
            inbound.stream.feed(b"", 0, is_end=True)

    def _open(self, number: int, inbound: Inbound) -> None:
        inbound.stream = stream = Stream(self._sender, number, partial(self._taken, number))
        stream.start(self._app, inbound.block, self.peer)

    def _on_other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._on_window(number, payload)
        elif kind == RST_STREAM:
            self._on_reset(number, payload)
        elif kind == SETTINGS:
            self._on_settings(number, flags, payload)
        elif kind == PING:
            if len(payload) != 8 or number:
                raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "PING of other than 8 bytes, or on a stream")
            if not flags & ACK:
                self._sender.acknowledge(frames.frame(PING, ACK, 0, payload))
        elif kind == CONTINUATION:
            self._on_continuation(number, flags, payload)
        elif kind == GOAWAY:
            self._is_closing = True
            self._close_when_done()
        elif kind == PUSH_PROMISE:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        elif kind == PRIORITY and len(payload) != 5:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "PRIORITY of other than 5 bytes")

    def _on_window(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "WINDOW_UPDATE of other than 4 bytes")
        size = struct.unpack(">I", payload)[0] & LARGEST_WINDOW
        if not size:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        self._sender.widen(number, size)
        self._check_resets()

    def _on_reset(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "RST_STREAM of other than 4 bytes")
        if not 0 < number <= self._newest:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which is not open")
        inbound = self._inbound.pop(number, None)
        if inbound is None:
            return
        self._resets += 1
        self._check_resets()
        self._sender.forget(number)
        _gone(inbound)
        self._close_when_done()

    def _check_resets(self) -> None:
        if self._resets > _RESETS:
            raise ConnectionBroken(Reason.ENHANCE_YOUR_CALM, f"{_RESETS} streams were cancelled, and none was answered")

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if number or len(payload) % 6:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "SETTINGS that are none")
        if flags & ACK:
            self._decoder.forbid_table()
            return
        self._has_settings = True
        self._sender.settle(dict(struct.iter_unpack(">HI", payload)))
        self._sender.acknowledge(frames.frame(SETTINGS, ACK, 0))

    # -- the end

    def _ended(self, number: int, reason: Reason | None) -> None:
        """Our side of a stream has ended: with its status (None), or without one."""
        inbound = self._inbound.pop(number)
        self._resets = 0 if reason is None else self._resets + 1
        if reason is not None:
            _gone(inbound)
        elif not inbound.is_ended:  # The answer came before the end of the request: nobody reads the rest.
            self._sender.write(frames.rst_stream(number, Reason.NO_ERROR))
        if self._is_closing:
            self._close_when_done()

    def goodbye(self) -> None:
        """Tells the peer to open no more streams; the open ones finish, then the connection is closed."""
        self._sender.write(frames.goaway(LARGEST_WINDOW, Reason.NO_ERROR))

    def last_goodbye(self) -> None:
        """Says which stream was the last to be answered."""
        self._is_closing = True
        self._sender.write(frames.goaway(self._newest, Reason.NO_ERROR))
        self._close_when_done()

    def abort(self) -> None:
        self._transport.abort()

    def _close_when_done(self) -> None:
        if self._is_closing and not self._inbound:
            self._sender.flush()
            self._transport.close()


def _gone(inbound: Inbound) -> None:
    if inbound.exchange is not None:
        inbound.exchange.abandon()
    if inbound.stream is not None:
        inbound.stream.disconnect()
