"""One connection: frames in, calls out (RFC 9113).

    HEADERS ──> Inbound ──DATA ... END_STREAM──> short method: Exchange ──answer──> HEADERS, DATA, HEADERS in one write
                   └──> any other: Stream, a task of the GrpcApp

What may be sent is bounded by the peer's windows: an answer that fits goes out at once, one that does not waits its
turn in `_waiting`. What may come is bounded by ours, which are opened again as the data is taken.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mesh.embedded import status
from mesh.embedded.exchange import Exchange, ShortHandler
from mesh.embedded.framing import PREFIX, too_large
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
from mesh.h2.stream import Stream
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from mesh.embedded.app import GrpcApp

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

_UNREAD = 1000
# Answers to PING and SETTINGS that the peer does not read: each would cost memory.

_GREETING_S = 10.0
_CONNECTIONS = 1024
# The Envoys beside it open a few dozen.

_RESETS = 20_000
# Streams that the peer opened and cancelled on one connection, without one answer in between: no client does that.

_ANSWER = encode([(b":status", b"200"), status.CONTENT_TYPE])
_END = encode(status.OK)
_STATUS_200 = (b":status", b"200")


class Inbound:
    """A stream from its HEADERS on. `window`: what the peer lets us send, beyond what its settings say."""

    __slots__ = ("block", "exchange", "is_ended", "parts", "received", "stream", "uncredited", "window")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.parts: list[bytes] = []
        self.received = 0
        self.uncredited = 0
        self.window = 0
        self.is_ended = False
        self.exchange: H2Exchange | None = None
        self.stream: Stream | None = None


class Outgoing:
    """Data of one stream that has to wait for a window; then `after`, the frames that end the stream, if any."""

    __slots__ = ("after", "chunks", "on_sent", "size")

    def __init__(self) -> None:
        self.chunks: deque[memoryview] = deque()
        self.size = 0
        self.after = b""
        self.on_sent: Callable[[], None] | None = None


class H2Exchange(Exchange):
    """An exchange that answers in one write, and is told when its caller goes."""

    __slots__ = ("_connection", "_number")

    def __init__(
        self, app: GrpcApp, handler: ShortHandler, headers: dict[bytes, bytes], connection: Connection, number: int
    ) -> None:
        super().__init__(app, handler, headers, None, None)
        self._connection = connection
        self._number = number

    def reply(self, parts: Sequence[Any], size: int) -> None:
        if not self.is_over:
            self.is_over = True
            self._app.exchanges.discard(self)
            self._connection.answer(self._number, parts, size)

    def refuse(self, error: BaseException) -> None:
        if not self.is_over:
            self.is_over = True
            self._app.exchanges.discard(self)
            self._connection.end(self._number, encode([_STATUS_200, status.CONTENT_TYPE, *self._trailers(error)]))

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
        self._waiting: dict[int, Outgoing] = {}
        self._out: list[bytes] = []
        self._rest = b""
        self._has_preface = self._has_settings = self._is_flushing = self._is_closing = False
        self._block: tuple[int, int, bytearray] | None = None
        self._newest = 0
        self._credit = 0
        self._resets = 0
        self._unread = 0
        self._continuations = 0
        self._window = frames.DEFAULT_WINDOW
        self._stream_window = frames.DEFAULT_WINDOW
        self._frame = DEFAULT_FRAME
        self.is_paused = False
        self.drained: asyncio.Event = asyncio.Event()

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is of no common class.
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
        self._write(frames.settings(ours) + frames.window_update(0, _CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

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
        for outgoing in list(self._waiting.values()):
            if outgoing.on_sent is not None:
                outgoing.on_sent()
        self._waiting.clear()
        self.drained.set()

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        self._unread = 0
        self._pump()

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except ConnectionBroken as err:
            self._break(err)
        except Exception:
            log.exception("a fault while reading a connection: it ends")
            self._break(ConnectionBroken(Reason.INTERNAL_ERROR, "internal error"))
        self._flush()

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        if not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            if not self._transport.is_closing():
                self._transport.write(data)

    def _break(self, err: ConnectionBroken) -> None:
        log.warning("a connection is ended with %s: %s", err.reason.name, err)
        self._write(frames.goaway(self._newest, err.reason, str(err)))
        self._flush()
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
            self._out.append(frames.window_update(0, self._credit))
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
            exchange.handle(payload)
            return
        inbound.received += size
        if inbound.received - inbound.uncredited > _STREAM_WINDOW:
            raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"more on stream {number} than its window")
        is_end = bool(flags & END_STREAM)
        if exchange is None:
            assert inbound.stream is not None
            inbound.is_ended = is_end
            inbound.stream.feed(payload, size, is_end=is_end)
            return
        self._gather(number, inbound, exchange, payload, is_end=is_end)

    def _gather(self, number: int, inbound: Inbound, exchange: Exchange, payload: bytes, *, is_end: bool) -> None:
        """One more piece of a short method's request."""
        inbound.parts.append(payload)
        if (size_is := self._oversize(inbound)) is not None:
            inbound.parts.clear()
            exchange.refuse(too_large(size_is, self._app.message_bytes))
            return
        if is_end:
            inbound.is_ended = True
            body = b"".join(inbound.parts)
            inbound.parts.clear()
            exchange.handle(body)
            return
        if inbound.received - inbound.uncredited >= _CREDIT:
            self.credit(number, inbound.received - inbound.uncredited)

    def _oversize(self, inbound: Inbound) -> int | None:
        """The size of a message that is over the limit: as its prefix says, or as much as has come."""
        limit, parts = self._app.message_bytes, inbound.parts
        if inbound.received - PREFIX.size > limit:
            return inbound.received - PREFIX.size
        if len(parts) > 1 and len(parts[0]) >= PREFIX.size:
            return None  # It was looked at before.
        head = b"".join(parts)[: PREFIX.size]
        says = PREFIX.unpack(head)[1] if len(head) == PREFIX.size else 0
        return says if says > limit else None

    def credit(self, number: int, size: int) -> None:
        """So many bytes of a stream have been taken: the peer may send as many again."""
        inbound = self._inbound.get(number)
        if inbound is not None and size:
            inbound.uncredited += size
            if not inbound.is_ended:
                self._write(frames.window_update(number, size))

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
            self._write(frames.rst_stream(number, Reason.REFUSED_STREAM))
            return
        inbound = self._inbound[number] = Inbound(block)
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
            inbound.exchange = exchange = H2Exchange(self._app, handler, headers, self, number)
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
        if inbound.exchange is not None:
            self._gather(number, inbound, inbound.exchange, b"", is_end=True)
        elif inbound.stream is not None:
            inbound.is_ended = True
            inbound.stream.feed(b"", 0, is_end=True)

    def _open(self, number: int, inbound: Inbound) -> None:
        inbound.stream = stream = Stream(self, number)
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
                self._acknowledge(frames.frame(PING, ACK, 0, payload))
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
        if not number:
            self._window += size
            if self._window > LARGEST_WINDOW:
                raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, "the connection's window is too large")
        elif (inbound := self._inbound.get(number)) is not None:
            inbound.window += size
            if self._stream_window + inbound.window > LARGEST_WINDOW:
                self.reset(number, Reason.FLOW_CONTROL_ERROR)
                _gone(inbound)
        if self._waiting:
            self._pump()

    def _on_reset(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "RST_STREAM of other than 4 bytes")
        if not 0 < number <= self._newest:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which is not open")
        inbound = self._inbound.pop(number, None)
        if inbound is None:
            return
        self._resets += 1
        if self._resets > _RESETS:
            raise ConnectionBroken(Reason.ENHANCE_YOUR_CALM, f"{_RESETS} streams were cancelled, and none was answered")
        outgoing = self._waiting.pop(number, None)
        if outgoing is not None and outgoing.on_sent is not None:
            outgoing.on_sent()
        _gone(inbound)
        self._close_when_done()

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if number or len(payload) % 6:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "SETTINGS that are none")
        if flags & ACK:
            self._decoder.forbid_table()
            return
        self._has_settings = True
        for key, value in struct.iter_unpack(">HI", payload):
            if key == frames.WINDOW_SIZE:
                if value > LARGEST_WINDOW:
                    raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"a window of {value}")
                self._stream_window = value
            elif key == frames.FRAME_SIZE:
                if not DEFAULT_FRAME <= value <= frames.LARGEST_FRAME:
                    raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"frames of {value}")
                self._frame = value
        self._acknowledge(frames.frame(SETTINGS, ACK, 0))
        if self._waiting:
            self._pump()

    def _acknowledge(self, data: bytes) -> None:
        self._out.append(data)
        self._unread += self.is_paused
        if self._unread > _UNREAD:
            raise ConnectionBroken(Reason.ENHANCE_YOUR_CALM, f"{_UNREAD} acknowledgements were asked for and not read")

    # -- what goes

    def answer(self, number: int, parts: Sequence[Any], size: int) -> None:
        """A whole answer: headers, one message of `parts` (bytes-like, `size` together), status OK."""
        inbound = self._inbound.get(number)
        if inbound is None:
            return
        self._resets = 0
        total = size + 5
        opening = frames.opening
        head = opening(HEADERS, END_HEADERS, number, len(_ANSWER))
        prefix = b"\0" + size.to_bytes(4, "big")
        tail = opening(HEADERS, END_HEADERS | END_STREAM, number, len(_END))
        if total <= self._frame and total <= self._window and total <= self._stream_window + inbound.window:
            self._window -= total
            data = opening(DATA, 0, number, total)
            self._write(b"".join((head, _ANSWER, data, prefix, *parts, tail, _END)))
            self._close(number)
            return
        self._write(head + _ANSWER)
        self.send(number, b"".join((prefix, *parts)), tail + _END, None)

    def send(self, number: int, data: bytes, after: bytes, on_sent: Callable[[], None] | None) -> None:
        """Sends data as windows allow, then the frames `after`, which end the stream; `on_sent` once all has gone."""
        if number not in self._inbound:
            if on_sent is not None:
                on_sent()
            return
        outgoing = self._waiting.setdefault(number, Outgoing())
        if data:
            outgoing.chunks.append(memoryview(data))
            outgoing.size += len(data)
        outgoing.after += after
        outgoing.on_sent = on_sent or outgoing.on_sent
        self._pump()

    def headers(self, number: int, block: bytes) -> None:
        """The headers of an answer."""
        if number in self._inbound:
            self._write(frames.opening(HEADERS, END_HEADERS, number, len(block)) + block)

    def end(self, number: int, block: bytes) -> None:
        """Ends an answer with these headers (of which there were none) or trailers, once its data has gone."""
        if number not in self._inbound:
            return
        last = frames.opening(HEADERS, END_HEADERS | END_STREAM, number, len(block)) + block
        if number in self._waiting:
            self.send(number, b"", last, None)
            return
        self._write(last)
        self._close(number)

    def end_data(self, number: int) -> None:
        """Ends an answer that has no trailers, as plain HTTP does."""
        last = frames.opening(DATA, END_STREAM, number, 0)
        if number in self._waiting:
            self.send(number, b"", last, None)
        elif number in self._inbound:
            self._write(last)
            self._close(number)

    def reset(self, number: int, reason: Reason) -> None:
        """Ends a stream without a status."""
        if number in self._inbound:
            self._waiting.pop(number, None)
            self._write(frames.rst_stream(number, reason))
            del self._inbound[number]
            self._close_when_done()

    def _pump(self) -> None:
        for number in list(self._waiting):
            if self._window <= 0 or self.is_paused:
                return
            outgoing, inbound = self._waiting[number], self._inbound[number]
            while outgoing.chunks and self._window > 0:
                size = min(self._frame, self._window, self._stream_window + inbound.window, len(outgoing.chunks[0]))
                if size <= 0:
                    break
                chunk = outgoing.chunks[0]
                self._write(frames.opening(DATA, 0, number, size) + bytes(chunk[:size]))
                outgoing.chunks[0] = chunk[size:]
                outgoing.size -= size
                self._window -= size
                inbound.window -= size
                if not len(outgoing.chunks[0]):
                    outgoing.chunks.popleft()
            if not outgoing.chunks:
                del self._waiting[number]
                if outgoing.after:
                    self._write(outgoing.after)
                    self._close(number)
                if outgoing.on_sent is not None:
                    outgoing.on_sent()

    def _close(self, number: int) -> None:
        """Our side of a stream has ended."""
        inbound = self._inbound.pop(number)
        if not inbound.is_ended:  # The answer came before the end of the request: nobody reads the rest.
            self._write(frames.rst_stream(number, Reason.NO_ERROR))
        if self._is_closing:
            self._close_when_done()

    # -- the end

    def goodbye(self) -> None:
        """Tells the peer to open no more streams; the open ones finish, then the connection is closed."""
        self._write(frames.goaway(LARGEST_WINDOW, Reason.NO_ERROR))

    def last_goodbye(self) -> None:
        """Says which stream was the last to be answered."""
        self._is_closing = True
        self._write(frames.goaway(self._newest, Reason.NO_ERROR))
        self._close_when_done()

    def abort(self) -> None:
        self._transport.abort()

    def _close_when_done(self) -> None:
        if self._is_closing and not self._inbound:
            self._flush()
            self._transport.close()


def _gone(inbound: Inbound) -> None:
    if inbound.exchange is not None:
        inbound.exchange.abandon()
    if inbound.stream is not None:
        inbound.stream.disconnect()
