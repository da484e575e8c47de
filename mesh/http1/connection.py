"""Server side of one connection of HTTP/1.1: a request, its response, the next request.

    bytes ──> head ──> Http1Stream ──> Application.request ──> RequestHandler <── data ... is_end
                            └── respond, or start, send, end ──> the next request

While a request is open, some bytes of the next ones are kept, and then the connection is not read. A response before
the end of its request, and a malformed request, end the connection.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable

from mesh.h2.connections import Connections, admit
from mesh.h2.frames import PREFACE, Reason
from mesh.h2.headers import LIST_BYTES, Fields
from mesh.h2.memory_account import Share
from mesh.h2.peer import READ_BYTES
from mesh.h2.server_connection import LINGER_S, TENANT, Memory, ServerConnection, disconnect
from mesh.h2.stream import NO_HANDLER, STREAM_BYTES, Application, ServerStream
from mesh.h2.turns import Lot
from mesh.h2.unread import TICK_S, Unread
from mesh.http1.requests import BadRequest, Head, RequestReader

log = logging.getLogger(__name__)

# Ticks after which a head that is not whole, or a connection without any byte, is given up: 10 to 15 s.
_MAX_HEAD_TICKS = 2
# Ticks after which a connection between two requests is closed: 300 s. Browsers keep theirs for as long.
_MAX_IDLE_TICKS = 60
# Bytes of later requests that are kept while a request is open. One more read of the transport may follow.
_AHEAD_BYTES = 64 << 10
# Waiting bytes of a connection that are not counted.
_SMALL_BYTES = 4 << 10
# Bytes that are dropped after a response before its request's end. Then the connection is closed at once.
_DROPPED_BYTES = 4 << 20
# Chunked bytes that are read in one turn: 5,500 chunks of one byte take 2 ms.
_CHUNKED_BYTES = 32 << 10
# A request costs as much as so many frames of HTTP/2.
_FRAMES_A_REQUEST = 16

_PRI = PREFACE[:4]
_HEAD_END = b"\r\n\r\n"
_LONE_LF = re.compile(rb"(?<!\r)\n")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CLOSE, _KEEP = b"connection: close\r\n", b"connection: keep-alive\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"
_REASONS = {
    200: b"OK",
    202: b"Accepted",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


def encode_head(status: int, fields: Fields) -> bytes:
    """Encode the head of a response, without its last empty line."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b""))]
    lines += [b"%b: %b\r\n" % field for field in fields]
    return b"".join(lines)


class Http1Stream(ServerStream):
    """One request of a connection of HTTP/1.1, and its response. Responses have no trailers."""

    __slots__ = ()

    def consumed(self, size: int) -> None:
        """Do nothing: HTTP/1.1 has no flow control. The memory account bounds what is kept."""

    def encode_head(self, status: int, fields: Fields) -> bytes:
        return encode_head(status, fields)


class Http1Connection(asyncio.Protocol):
    """Connection of one peer; an entry of `connections` while open. A peer that speaks HTTP/2 gets a ServerConnection.

    The connection is the sender of its streams (`stream.ResponseSender`).
    """

    def __init__(self, app: Application, h2_app: Application, connections: Connections, memory: Memory) -> None:
        """Serve `app` over HTTP/1.1, and `h2_app` over HTTP/2."""
        self._app = app
        self._h2_app = h2_app
        self._connections = connections
        self._memory = memory
        self._turns = memory.turns
        self._loop = asyncio.get_running_loop()
        self._unread = Unread(memory.unread)
        self._kept = memory.bodies.share()
        self._reader = RequestReader()
        self._unparsed = b""
        # Begin of the search for the end of a head.
        self._searched = 0
        self._stream: Http1Stream | None = None
        self._head: Head | None = None
        self._missing = 0
        self._number = 0
        self._is_chunking = self._is_waiting = self._is_parsing = self._is_closing = False
        self._is_write_paused = self._is_read_paused = False
        self._on_sent: Callable[[], None] | None = None
        self._ticks = self._dropped = 0
        # Time that the data which arrived last took; what counts for its turns (`Turns`).
        self._took_s = self.used_s = 0.0
        self.lot = Lot.DIRECT
        self._lingering: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None

    # -- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is of no common class.
        peer = transport.get_extra_info("peername")
        self.peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("unix", 0)
        if not admit(self, self._connections):
            self._transport.abort()
            return
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._drop(data)
            return
        is_large = len(data) > READ_BYTES
        if self._unparsed:
            data = self._unparsed + data
        self._unparsed = data
        if not self._number and _PRI.startswith(data[:4]):
            if len(data) >= len(_PRI):
                self._hand_over(data)
            return
        if self._is_free():
            if self._turns.must_wait(len(data), self._took_s):
                self._wait()
            else:
                began = self._turns.clock()
                self._parse(1)
                self._took_s = self._turns.spent_since(began)
        # Its turn reads the transport again, as it does for HTTP/2.
        if is_large and not self._is_waiting and self._stream is not None:
            self._wait()
        self._read_or_not()

    def _hand_over(self, data: bytes) -> None:
        """Go on as a connection of HTTP/2."""
        self._unparsed = b""
        self._forget()
        successor = ServerConnection(self._h2_app, self._connections, self._memory)
        self._transport.set_protocol(successor)
        successor.connection_made(self._transport)
        successor.data_received(data)

    def _drop(self, data: bytes) -> None:
        self._dropped += len(data)
        if self._dropped > _DROPPED_BYTES:
            self._transport.abort()

    def _is_free(self) -> bool:
        """Return True when bytes may be read as a request or a part of one."""
        is_answering = self._stream is not None and self._stream.is_request_ended
        return not (is_answering or self._is_waiting or self._is_write_paused or self._is_parsing)

    def _read_or_not(self) -> None:
        """Pause the transport while enough waits, or the peer does not read; else resume it."""
        size = len(self._unparsed)
        if size > _SMALL_BYTES or self._kept.held:
            self._keep(size)
        if self._transport.is_closing():
            return
        is_paused = self._is_write_paused or self._is_waiting or (size > _AHEAD_BYTES and not self._is_free())
        if is_paused and not self._is_read_paused:
            self._transport.pause_reading()
        elif self._is_read_paused and not is_paused:
            self._transport.resume_reading()
        self._is_read_paused = is_paused

    def _keep(self, size: int) -> None:
        """Count the bytes that wait. Close the connection when there is no room for them."""
        kept = self._kept
        has_room = kept.has_room(max(size - kept.held, 0))
        kept.add(size - kept.held)
        if not has_room:
            log.warning(
                "a connection is closed: there is no room for %(bytes)d bytes of its requests",
                {"event": "connection.no_room_for_requests", "bytes": size},
            )
            self._transport.abort()

    def eof_received(self) -> None:
        """Close the connection: a client that has closed its side is taken for one that has left."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._is_waiting = False
        self._unread.count(0, self._transport)
        self._unparsed = b""
        self._kept.remove(self._kept.held)
        if (stream := self._take_stream()) is not None:
            stream.release_all()
            disconnect(stream, stream.handler)
        self._report_sent()

    def _forget(self) -> None:
        self._connections.pop(self, None)
        for timer in (self._tick_timer, self._lingering):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Stop reading, too: a peer that does not read may not ask for more."""
        self._is_write_paused = True
        self._unread.pause(self._transport)
        self._read_or_not()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._unread.count(0, self._transport)
        self._report_sent()
        self._go_on()

    def _tick(self) -> None:
        """Give up a peer that makes no progress."""
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        if self._is_write_paused or self._lingering is not None or self._transport.is_closing():
            self._unread.tick(self._transport)
            return
        stream = self._stream
        if stream is None:
            self._ticks += 1
            if self._is_waiting:
                self._ticks = 0
            elif (self._unparsed or not self._number) and self._ticks > _MAX_HEAD_TICKS:
                self._refuse(BadRequest(408, "the head of the request did not arrive in time"))
            elif self._ticks > _MAX_IDLE_TICKS:
                self._transport.close()
        elif not stream.is_request_ended:
            try:
                stream.tick()
            except Exception:
                self._fail(stream)

    # -- requests

    def take_turn(self, frames: int) -> bool:
        """Read some of the requests that wait (`Turns`)."""
        if not self._is_waiting:
            return False
        self._is_waiting = False
        if self._is_free():
            self._parse(max(1, frames // _FRAMES_A_REQUEST))
            self._read_or_not()
        return True

    def _parse(self, most: int) -> None:
        """Read what has arrived: the rest of the open request, and at most so many heads."""
        self._is_parsing = True
        try:
            while self._unparsed and self._lingering is None and not self._is_write_paused:
                if self._transport.is_closing():
                    self._unparsed = b""
                elif self._stream is not None:
                    if self._stream.is_request_ended:
                        break
                    if not self._read_body(self._stream):
                        self._wait()
                        break
                elif self._is_closing:
                    self._linger()
                elif not most:
                    self._wait()
                    break
                elif not self._read_head():
                    break
                else:
                    most -= 1
        except BadRequest as err:
            self._refuse(err)
        except Exception:
            log.exception(
                "a fault while reading a connection: the connection is closed", {"event": "connection.read_failed"}
            )
            self._transport.abort()
        finally:
            self._is_parsing = False

    def _wait(self) -> None:
        """Read on in this connection's turn. Meanwhile the transport is not read."""
        self._is_waiting = True
        self._turns.wait(self)

    def _read_head(self) -> bool:
        """Begin the request whose head is at the beginning of the data. Return False when the head is not whole."""
        data = self._unparsed
        # RFC 9112, section 2.2: an empty line before a request is ignored.
        if data.startswith(b"\r\n"):
            data = self._unparsed = data.lstrip(b"\r\n")
        found = data.find(_HEAD_END, max(self._searched - 3, 0))
        if (found if found >= 0 else len(data)) > LIST_BYTES:
            raise BadRequest(431, f"headers of more than {LIST_BYTES} bytes: send less")
        if found < 0:
            # What can never become a request is refused at once.
            if len(data) > 3 and not data[:1].isalpha():
                raise BadRequest(400, "this is no request of HTTP/1.1")
            if _LONE_LF.search(data, self._searched):
                raise BadRequest(400, "the request is malformed: a line ends with LF, expected CR LF")
            self._searched = len(data)
            return False
        self._searched = self._ticks = 0
        self._number += 1
        self._unparsed = data[found + 4 :]
        self._begin(self._reader.feed_head(data[: found + 4]))
        return True

    def _begin(self, head: Head) -> None:
        self._head = head
        self._is_closing = self._is_closing or not head.keeps_alive
        # Each request has a share of its own: a connection has one open request.
        share: Share = self._memory.bodies.share()
        size = STREAM_BYTES + head.block.list_bytes
        has_room = share.has_room(size)
        share.add(size)
        is_ended = head.length == 0
        self._missing = head.length or 0
        stream = self._stream = Http1Stream(self, self, self._number, head.block, is_ended, share, size)
        try:
            if not has_room:
                self._memory.bodies.refused += 1
                self._app.reject(stream)
                return
            stream.handler = self._app.request(stream)
            if is_ended:
                stream.handler.data(b"", 0, is_end=True)
            elif head.expects_continue and self._stream is stream:
                self._transport.write(_CONTINUE)
        except Exception:
            self._fail(stream)

    def _read_body(self, stream: Http1Stream) -> bool:
        """Read what has arrived of the body. Return False when chunks are left for another turn."""
        piece, rest = self._unparsed, b""
        assert self._head is not None, "a request is open"
        self._unparsed = b""
        is_chunked = self._head.length is None
        if is_chunked:
            piece, later = piece[:_CHUNKED_BYTES], piece[_CHUNKED_BYTES:]
            piece, rest = self._reader.feed_body(piece)
            rest += later
            is_end = self._reader.is_complete
        else:
            if len(piece) > self._missing:
                piece, rest = piece[: self._missing], piece[self._missing :]
            self._missing -= len(piece)
            is_end = not self._missing
        self._unparsed = rest
        stream.moved += len(piece)
        stream.is_request_ended = is_end
        try:
            if piece or is_end:
                stream.handler.data(piece, len(piece), is_end=is_end)
        except Exception:
            self._fail(stream)
        return is_end or not (is_chunked and rest)

    def _fail(self, stream: Http1Stream) -> None:
        log.exception(
            "the handler of %(path)s failed: its connection is closed",
            {"event": "stream.handler_failed", "path": stream.head.path},
        )
        self._transport.abort()

    def _refuse(self, err: BadRequest) -> None:
        """Answer a request that cannot be read, and end the connection."""
        log.info(
            "a connection is closed with status %(status)d: %(error)s",
            {"event": "connection.closed_with_status", "status": err.status, "error": err.message},
        )
        self._unparsed = b""
        stream = self._take_stream()
        if stream is not None:
            stream.release_all()
            disconnect(stream, stream.handler)
        # A response that has begun can only be cut.
        if self._is_chunking:
            self._transport.abort()
            return
        body = err.message.encode("ascii", "replace") + b"\n"
        fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        self._transport.write(encode_head(err.status, fields) + _CLOSE + b"\r\n" + body)
        self._linger()

    def _take_stream(self) -> Http1Stream | None:
        stream, self._stream = self._stream, None
        return stream

    # -- responses: the connection as the sender of its streams

    def is_open(self, number: int) -> bool:
        """Return True while the response of a request may be sent."""
        return self._stream is not None and number == self._number

    def has_room(self, number: int, size: int) -> bool:
        """Return True when a response of `size` bytes may wait for the peer to read."""
        if not self.is_open(number) or (size <= LIST_BYTES and not self._is_write_paused):
            return True
        return self._unread.share.has_room(size)

    def respond(self, number: int, head: bytes, body: bytes, trailers: bytes) -> None:
        """Send a whole response; `head` has its content-length."""
        if not self.is_open(number):
            return
        if not self.has_room(number, len(body)):
            self.reset(number, Reason.ENHANCE_YOUR_CALM)
            return
        end = self._head_end()
        if not self._has_body():
            self._transport.write(head + end)
        elif len(body) > LIST_BYTES:
            self._transport.write(head + end)
            self._transport.write(body)
        else:
            self._transport.write(b"".join((head, end, body)))
        self._end()

    def headers(self, number: int, head: bytes) -> None:
        """Send the head of a streamed response. Without chunks, in HTTP/1.0, the end of the connection ends it."""
        if not self.is_open(number):
            return
        assert self._head is not None, "a request is open"
        is_1_0 = self._head.is_http_1_0
        self._is_closing = self._is_closing or is_1_0
        self._is_chunking = not is_1_0
        self._transport.write(b"".join((head, b"" if is_1_0 else _CHUNKED, self._head_end())))

    def data(self, number: int, data: bytes | memoryview, on_sent: Callable[[], None] | None) -> None:
        """Send data of a streamed response. `on_sent` is called when more may be sent, or the connection is lost."""
        if self.is_open(number) and data and self._has_body():
            self._transport.write(b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if self._is_chunking else data)
        if self._is_write_paused and self.is_open(number):
            self._on_sent = on_sent or self._on_sent
        elif on_sent is not None:
            on_sent()

    def end(self, number: int, trailers: bytes) -> None:
        """End a streamed response."""
        if self.is_open(number):
            if self._is_chunking and self._has_body():
                self._transport.write(b"0\r\n\r\n")
            self._end()

    def reset(self, number: int, reason: Reason) -> None:
        """Close the connection in the middle of a request or a response."""
        if self.is_open(number):
            self._transport.abort()

    def write(self, data: bytes) -> None:
        """Do nothing: there are no frames of flow control."""

    def return_credit(self, size: int) -> None:
        """Do nothing: there is no flow control."""

    def owes_credit(self, stream: ServerStream, size: int) -> None:
        """Do nothing: there is no flow control."""

    def _head_end(self) -> bytes:
        """Return the end of a response's head, which says if the connection goes on."""
        stream = self._stream
        assert self._head is not None, "a request is open"
        assert stream is not None, "a request is open"
        self._is_closing = self._is_closing or not stream.is_request_ended
        if self._is_closing:
            return _CLOSE + b"\r\n"
        return _KEEP + b"\r\n" if self._head.is_http_1_0 else b"\r\n"

    def _has_body(self) -> bool:
        assert self._head is not None, "a request is open"
        return self._head.has_response_body

    def _report_sent(self) -> None:
        on_sent, self._on_sent = self._on_sent, None
        if on_sent is not None:
            on_sent()

    def _end(self) -> None:
        """End the open request: its response is sent."""
        stream = self._take_stream()
        assert stream is not None, "a request is open"
        stream.handler = NO_HANDLER
        stream.release_all()
        self._is_chunking = False
        self._ticks = 0
        if self._is_closing:
            self._unparsed = b""
            self._linger()
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Read the requests that have waited, in this connection's turn."""
        if self._unparsed and self._is_free():
            self._wait()
        self._read_or_not()

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        if self._kept.held:
            yield "", self._kept.held
        if self._stream is not None:
            yield self._stream.head.by_name.get(TENANT, b"").decode("latin-1"), self._stream.share.held

    # -- the end

    @property
    def is_idle(self) -> bool:
        """True while no request is open."""
        return self._stream is None

    @property
    def is_new(self) -> bool:
        """True before the first request."""
        return not self._number

    def send_goaway(self) -> asyncio.Future[None]:
        """Close the connection after the open request. HTTP/1.1 has nothing with which to ask before."""
        self.send_last_goaway()
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    def send_last_goaway(self) -> None:
        """Close the connection after the open request."""
        self._is_closing = True
        if self._stream is None and self._lingering is None:
            self._linger()

    def abort(self) -> None:
        """Close the connection immediately."""
        self._transport.abort()

    def _linger(self) -> None:
        """Close our side. The peer may still be sending, and would lose the response to a reset."""
        if self._lingering is not None or self._transport.is_closing():
            return
        self._lingering = self._loop.call_later(LINGER_S, self._end_lingering)
        self._transport.resume_reading()
        self._is_read_paused = False
        self._transport.write_eof()

    def _end_lingering(self) -> None:
        # The peer may still be reading the last response.
        if self._transport.get_write_buffer_size():
            self._lingering = self._loop.call_later(LINGER_S, self._end_lingering)
        else:
            self._transport.abort()
