"""Server side of one connection (RFC 9113): frames in, requests to the application.

    HEADERS ──> ServerStream ──> Application.request ──> RequestHandler <── DATA ... END_STREAM

Flow control bounds the memory of requests: credit is given back when the application has consumed the data. `sending`
keeps to the peer's windows.
"""

from __future__ import annotations

import asyncio
import logging

from mesh.h2 import frames
from mesh.h2.frames import END_STREAM, LARGEST_WINDOW, ConnectionBroken, Reason
from mesh.h2.headers import Block
from mesh.h2.peer import STREAM_WINDOW, Peer
from mesh.h2.stream import Application, ServerStream

log = logging.getLogger(__name__)

# Concurrent requests of one connection.
_MAX_STREAMS = 4096

_SETTINGS_TIMEOUT_S = 10.0

# The Envoys of a node open a few dozen.
_MAX_CONNECTIONS = 1024

# Streams of one connection that were cancelled by the peer, or reset because of it, without one response in between.
# No client does that.
_MAX_RESETS = 20_000

# Longest wait for a peer to close a connection after its last response.
_LINGER_S = 1.0

# Payload of the PING after the first GOAWAY. Its acknowledgement shows that the peer has read the GOAWAY.
_SHUTDOWN_PING = b"shutdown"


class ServerConnection(Peer):
    """Connection of one peer; an entry of `connections` while open."""

    def __init__(self, app: Application, connections: set[ServerConnection]) -> None:
        super().__init__(awaits_preface=True)
        self._app = app
        self._connections = connections
        self._streams: dict[int, ServerStream] = {}
        self._is_closing = False
        self._goaway_read: asyncio.Future[None] = self._loop.create_future()
        self._lingering: asyncio.TimerHandle | None = None
        self._resets = 0

    # -- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(transport)
        peer = transport.get_extra_info("peername")
        self.peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("unix", 0)
        if len(self._connections) >= _MAX_CONNECTIONS:
            log.warning("a connection is refused: %d are open", len(self._connections))
            self._transport.abort()
            return
        self._connections.add(self)
        self._settings_timer = self._loop.call_later(_SETTINGS_TIMEOUT_S, self._on_settings_timeout)
        self._send_settings({frames.MAX_STREAMS: _MAX_STREAMS})

    def _on_settings_timeout(self) -> None:
        if not self._has_settings:
            self._break(ConnectionBroken(Reason.SETTINGS_TIMEOUT, f"no SETTINGS within {_SETTINGS_TIMEOUT_S:.0f} s"))

    def data_received(self, data: bytes) -> None:
        if self._lingering is None:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._connections:
            self._connections.remove(self)
            self._settings_timer.cancel()
        if self._lingering is not None:
            self._lingering.cancel()
        self._on_goaway_read()
        self._is_closing = True
        self._sender.close()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            _disconnect(stream)

    # -- requests

    def _on_block(self, number: int, flags: int, block: Block) -> None:
        if number <= self._newest or not number & 1:
            self._on_trailers(number, flags)
            return
        self._newest = number
        if len(self._streams) >= _MAX_STREAMS or self._is_closing:
            self._sender.write(frames.rst_stream(number, Reason.REFUSED_STREAM))
            return
        is_ended = flags & END_STREAM != 0
        self._streams[number] = stream = ServerStream(self._sender, number, block, self.peer, is_ended)
        self._sender.open(number)
        try:
            stream.handler = self._app.request(stream)
            if is_ended:
                stream.handler.data(b"", 0, is_end=True)
        except Exception:
            _reset(stream)

    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        self._credited(size)
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
        if stream.received > STREAM_WINDOW:
            raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"more on stream {number} than its window")
        stream.is_request_ended = is_end = flags & END_STREAM != 0
        try:
            stream.handler.data(payload, size, is_end=is_end)
        except Exception:
            _reset(stream)

    def _on_trailers(self, number: int, flags: int) -> None:
        stream = self._streams.get(number)
        if stream is None:
            if number > self._newest or not number & 1:
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"HEADERS on stream {number}, which no client opens")
            return
        if not flags & END_STREAM or stream.is_request_ended:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"HEADERS inside stream {number}")
        stream.is_request_ended = True
        try:
            stream.handler.data(b"", 0, is_end=True)
        except Exception:
            _reset(stream)

    def _on_goaway(self, payload: bytes) -> None:
        self._is_closing = True
        self._close_when_done()

    def _on_window(self, number: int, payload: bytes) -> None:
        super()._on_window(number, payload)
        self._check_resets()

    def _on_reset(self, number: int, reason: int) -> None:
        if not 0 < number <= self._newest:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which is not open")
        stream = self._streams.pop(number, None)
        if stream is None:
            return
        self._resets += 1
        self._check_resets()
        self._sender.forget(number)
        _disconnect(stream)
        self._close_when_done()

    def _check_resets(self) -> None:
        if self._resets > _MAX_RESETS:
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM, f"{_MAX_RESETS} streams were cancelled, and none got a response"
            )

    # -- the end

    def _ended(self, number: int, reason: Reason | None) -> None:
        """Remove a stream whose response has ended (None), or that was reset."""
        stream = self._streams.pop(number)
        self._resets = 0 if reason is None else self._resets + 1
        if reason is not None:
            _disconnect(stream)
        elif not stream.is_request_ended:
            # The response ended before the request: the rest of the request is not read.
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
        """Close the connection immediately. Its handlers are notified that their clients have disconnected."""
        self._transport.abort()

    def _close_when_done(self) -> None:
        if not self._is_closing or self._streams or self._lingering is not None:
            return
        self._sender.flush()
        if self._transport.is_closing():
            return
        # Only our side is closed. A peer whose own write fails may drop responses that it has not read yet, so the
        # connection stays open until the peer closes it.
        self._lingering = self._loop.call_later(_LINGER_S, self._end_lingering)
        self._transport.write_eof()

    def _end_lingering(self) -> None:
        # The peer may still be reading the last responses.
        if self._transport.get_write_buffer_size():
            self._lingering = self._loop.call_later(_LINGER_S, self._end_lingering)
        else:
            self._transport.abort()


def _reset(stream: ServerStream) -> None:
    """Reset the stream of a request whose handler has raised an exception."""
    log.exception("the handler of %s failed: its stream is reset", stream.head.path)
    stream.reset(Reason.INTERNAL_ERROR)


def _disconnect(stream: ServerStream) -> None:
    """Notify the handler that the client has disconnected."""
    try:
        stream.handler.disconnected()
    except Exception:
        log.exception("the handler of %s failed when its client disconnected", stream.head.path)
