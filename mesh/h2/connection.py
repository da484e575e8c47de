"""One connection: frames in, calls out (RFC 9113).

    HEADERS ──> Inbound ──DATA ... END_STREAM──> short method: Exchange ──answer──> HEADERS, DATA, HEADERS in one write
                   └──> any other: Stream, a task of the GrpcApp

What may come is bounded by our windows, which are opened again as the data is taken; `sending` keeps to the peer's.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from mesh.asgi import status
from mesh.asgi.exchange import Exchange, ShortHandler
from mesh.h2 import frames
from mesh.h2.frames import END_STREAM, LARGEST_WINDOW, ConnectionBroken, Reason
from mesh.h2.headers import Block, encode
from mesh.h2.peer import CREDIT, STREAM_WINDOW, Peer
from mesh.h2.sending import Sender
from mesh.h2.stream import Stream
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from mesh.asgi.app import GrpcApp

log = logging.getLogger(__name__)

_STREAMS = 4096

_GREETING_S = 10.0
_CONNECTIONS = 1024
# The Envoys beside it open a few dozen.

_RESETS = 20_000
# Streams that the peer opened, and cancelled or had us cancel, on one connection, without one answer in between: no
# client does that.

_LINGER_S = 1.0
# Longest for a peer to close a connection that has served its last call.

_GOODBYE = b"goodbye."
# What is asked with the first goodbye, and comes back once the peer has read it.

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


class Connection(Peer):
    """Serves one peer. `connections` holds it as long as it is open."""

    def __init__(self, app: GrpcApp, connections: set[Connection]) -> None:
        super().__init__(awaits_preface=True)
        self._app = app
        self._connections = connections
        self._inbound: dict[int, Inbound] = {}
        self._is_closing = False
        self._heard: asyncio.Future[None] = self._loop.create_future()
        self._lingering: asyncio.TimerHandle | None = None
        self._resets = 0

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(transport)
        peer = transport.get_extra_info("peername")
        self.peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("unix", 0)
        if len(self._connections) >= _CONNECTIONS:
            log.warning("%d connections are open: one more is refused", len(self._connections))
            self._transport.abort()
            return
        self._connections.add(self)
        self._greeting = self._loop.call_later(_GREETING_S, self._ungreeted)
        self._greet({frames.MAX_STREAMS: _STREAMS})

    def _ungreeted(self) -> None:
        if not self._has_settings:
            self._break(ConnectionBroken(Reason.SETTINGS_TIMEOUT, f"no SETTINGS came within {_GREETING_S:.0f} s"))

    def data_received(self, data: bytes) -> None:
        if self._lingering is None:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._connections:
            self._connections.remove(self)
            self._greeting.cancel()
        if self._lingering is not None:
            self._lingering.cancel()
        self._was_heard()
        self._is_closing = True
        for inbound in list(self._inbound.values()):
            _gone(inbound)
        self._inbound.clear()
        self._sender.lost()

    # -- what comes

    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        self._credited(size)
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
        if inbound.received - inbound.uncredited > STREAM_WINDOW:
            raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"more on stream {number} than its window")
        is_end = bool(flags & END_STREAM)
        inbound.is_ended = is_end
        if exchange is None:
            assert inbound.stream is not None
            inbound.stream.feed(payload, size, is_end=is_end)
        elif exchange.take(payload, more=not is_end) and inbound.received - inbound.uncredited >= CREDIT:
            self._taken(number, inbound.received - inbound.uncredited)

    def _taken(self, number: int, size: int) -> None:
        """So many bytes of a stream have been taken: the peer may send as many again."""
        inbound = self._inbound.get(number)
        if inbound is not None and size:
            inbound.uncredited += size
            if not inbound.is_ended:
                self._sender.write(frames.window_update(number, size))

    def _on_block(self, number: int, flags: int, block: Block) -> None:
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

    def _on_goaway(self, payload: bytes) -> None:
        self._is_closing = True
        self._close_when_done()

    def _on_window(self, number: int, payload: bytes) -> None:
        super()._on_window(number, payload)
        self._check_resets()

    def _on_reset(self, number: int, reason: int) -> None:
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

    def goodbye(self) -> asyncio.Future[None]:
        """Tells the peer to open no more streams. What is returned is done once it has read so, or is gone.

        The open streams finish, and those that it opens before it reads this; then the connection is closed.
        """
        if self._has_settings and self._lingering is None and not self._transport.is_closing():
            ping = frames.frame(frames.PING, 0, 0, _GOODBYE)
            self._sender.write(frames.goaway(LARGEST_WINDOW, Reason.NO_ERROR) + ping)
        else:
            self._was_heard()
        return self._heard

    def _acknowledged(self, what: bytes) -> None:
        if what == _GOODBYE:
            self._was_heard()

    def _was_heard(self) -> None:
        if not self._heard.done():
            self._heard.set_result(None)

    def last_goodbye(self) -> None:
        """Says which stream was the last to be answered."""
        if self._lingering is None:
            self._is_closing = True
            self._sender.write(frames.goaway(self._newest, Reason.NO_ERROR))
            self._close_when_done()

    def abort(self) -> None:
        self._transport.abort()

    def _close_when_done(self) -> None:
        if not self._is_closing or self._inbound or self._lingering is not None:
            return
        self._sender.flush()
        if self._transport.is_closing():
            return
        # What the peer still sends must find somebody: if a write of its own fails, it may throw away what it has not
        # read, the last answers among it. It closes when it has read to our end.
        self._lingering = self._loop.call_later(_LINGER_S, self._end_lingering)
        self._transport.write_eof()

    def _end_lingering(self) -> None:
        if self._transport.get_write_buffer_size():  # It is still reading the last answers.
            self._lingering = self._loop.call_later(_LINGER_S, self._end_lingering)
        else:
            self._transport.abort()


def _gone(inbound: Inbound) -> None:
    if inbound.exchange is not None:
        inbound.exchange.abandon()
    if inbound.stream is not None:
        inbound.stream.disconnect()
