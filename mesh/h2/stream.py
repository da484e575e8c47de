"""One request and its response on a server's connection, and the interface between the core and an application.

    Application.request(stream) ──> RequestHandler.data(...) ... data(..., is_end=True)
    stream.respond(...)                        a whole response in one write, or
    stream.start, send ... send, end           a streamed response

All of it is callbacks, so a request costs no task and no coroutine.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from mesh.h2 import frames
from mesh.h2.credits import SHARED_WINDOW
from mesh.h2.frames import Reason
from mesh.h2.headers import Block, Fields, response_head
from mesh.h2.memory_account import ClientShare, Share
from mesh.h2.sending import PROGRESS_BYTES
from mesh.h2.unread import MAX_TICKS, TICK_S


class RequestHandler(Protocol):
    """Receives the body of one request. An exception in it resets the stream."""

    @property
    def is_task(self) -> bool:
        """True when the request begins in a task of its own, whose cost follows in the next iteration of the loop."""

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        """Receive a piece of the body. The last piece has `is_end`, and may be empty.

        `size` is the flow-control size of the piece: `ServerStream.consumed` gives it back. A handler that keeps the
        piece beyond this call holds it (`ServerStream.hold`).
        """

    def stalled(self, idle_s: float) -> None:
        """End the request, or not: nothing of its body, which is not whole, has arrived for `idle_s`. Repeated."""

    def disconnected(self) -> None:
        """The client cancelled the request or closed the connection. Called once, and never after the response."""


class Application(Protocol):
    """Handles the requests of all connections of a listener."""

    def request(self, stream: ServerStream) -> RequestHandler:
        """Begin a request whose head has arrived, and maybe respond. An exception resets the stream."""

    def reject(self, stream: ServerStream) -> None:
        """Respond to a request for which there is no memory. An exception resets the stream."""


class _NoHandler:
    """Ignores the body of a request."""

    is_task = False

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        pass

    def stalled(self, idle_s: float) -> None:
        pass

    def disconnected(self) -> None:
        pass


NO_HANDLER: RequestHandler = _NoHandler()
"""Handler of a request whose body is ignored."""


STREAM_BYTES = 8 << 10
"""Memory that is counted for each request beside its head: 4 KiB for its objects, and SMALL_BODY for its body."""

SMALL_BODY = 4 << 10
"""Bytes of a body that STREAM_BYTES covers: a small call is counted once, when it begins."""


class Connection(Protocol):
    """The part of a connection that a stream uses."""

    peer: tuple[str, int]

    def return_credit(self, size: int) -> None:
        """Give back flow-control credit of the connection; a negative `size` keeps it."""

    def owes_credit(self, stream: ServerStream, size: int) -> None:
        """Give back credit of a stream, of which `size` bytes were consumed; now or later, by `give_credit`."""


class ResponseSender(Protocol):
    """The part of `sending.Sender` that a stream uses."""

    def is_open(self, number: int, /) -> bool: ...

    def has_room(self, number: int, size: int, /) -> bool: ...

    def respond(self, number: int, head: bytes, body: bytes, trailers: bytes, /) -> None: ...

    def headers(self, number: int, head: bytes, /) -> None: ...

    def data(self, number: int, data: bytes | memoryview, on_sent: Callable[[], None] | None, /) -> None: ...

    def end(self, number: int, trailers: bytes, /) -> None: ...

    def reset(self, number: int, reason: Reason, /) -> None: ...

    def write(self, data: bytes, /) -> None: ...


class ServerStream:
    """One request and its response.

    Heads and trailers of responses are header blocks (`headers.encode`), so that an application may encode them once.
    Everything is dropped after the response has ended or the client has disconnected.
    """

    __slots__ = (
        "_connection",
        "_sender",
        "_unreturned",
        "client",
        "extra",
        "handler",
        "head",
        "held",
        "idle_ticks",
        "is_request_ended",
        "is_unfinished",
        "kept",
        "least_held",
        "left",
        "moved",
        "number",
        "received",
        "share",
        "withheld",
    )

    handler: RequestHandler

    def __init__(
        self,
        connection: Connection,
        sender: ResponseSender,
        number: int,
        head: Block,
        is_request_ended: bool,
        share: Share,
        size: int,
        client: bytes | None = None,
    ) -> None:
        """Begin a request; `share` already counts `size` bytes for it."""
        self.client = client
        """Behind Envoy, the number of the client's connection to Envoy; else None."""
        self._connection = connection
        self._sender = sender
        self._unreturned = 0
        self.withheld = self.moved = self.idle_ticks = 0
        self.share = share
        """Share of the memory for requests that the request's tenant has, behind Envoy, or else on its connection."""
        self.held = self.least_held = size
        """Bytes that the share counts for this request, and those of them from its beginning, which are released last.
        Both 0 after its end."""
        self.number = number
        self.head = head
        """Method, path and headers of the request."""
        self.is_request_ended = is_request_ended
        """True when the whole body has arrived."""
        self.is_unfinished = False
        """True while the share counts the request as one whose body has not ended."""
        self.left = head.body_bytes
        """Bytes of the body that are still to come; None where the head announces no length."""
        self.received = 0
        """Bytes of the body, in flow-control size, whose credit has not been given back to the client."""
        self.kept: tuple[bytes, int, int] | None = None
        """The last piece of a whole body that waits for its start, its size, and the bytes that are counted for it."""
        self.extra = 0
        """Bytes by which the window is larger than at first."""
        self.handler = NO_HANDLER

    @property
    def peer(self) -> tuple[str, int]:
        """Address of the client; ("unix", 0) for a unix socket."""
        return self._connection.peer

    @property
    def sender(self) -> Hashable:
        """Identity of the request's tenant and its connection, behind Envoy of its connection to Envoy."""
        return self.share if self.client is None else (self.share, self.client)

    @property
    def _own_share(self) -> Share | ClientShare:
        """The share in which bytes are added: behind Envoy, that of the request's client."""
        return self.share.of_client(self.client or b"")

    def hold(self, size: int) -> bool:
        """Keep `size` bytes of the body in memory, as `reserve` does.

        The connection's credit for them is not given back until they are released.
        """
        if not self.reserve(size):
            return False
        self.withheld += size
        self._connection.return_credit(-size)
        return True

    def tick(self) -> None:
        """Count a tick without progress, and tell the handler of a stalled request. Raises what the handler raises."""
        self.idle_ticks = 0 if self.moved >= PROGRESS_BYTES else self.idle_ticks + 1
        self.moved = 0
        if self.idle_ticks > MAX_TICKS:
            self.handler.stalled((self.idle_ticks - 1) * TICK_S)

    def reserve(self, size: int, *, is_response: bool = False) -> bool:
        """Count `size` bytes of memory for this request, until they are released or the stream ends.

        A response may take all that is free: its request was admitted, and its memory is free soon.
        Return False, and count nothing, when there is no room, or the stream has ended.
        """
        share = self._own_share
        has_room = share.fits(size) if is_response else share.has_room(size)
        if not has_room or not self._sender.is_open(self.number):
            return False
        share.add(size)
        self.held += size
        return True

    def release(self, size: int) -> None:
        """Release bytes that were held or reserved. Does nothing after the stream's end, which has released all."""
        if not self.held:
            return
        self.held -= size
        self._own_share.remove(size)
        # Bytes that withheld no credit are released last.
        if returned := min(size, self.withheld):
            self.withheld -= returned
            self._connection.return_credit(returned)

    def count_as_finished(self) -> None:
        """Stop counting the request as one whose body has not ended: it has, or need not."""
        if self.is_unfinished:
            self.is_unfinished = False
            self.share.unfinished -= 1

    def release_all(self) -> None:
        """Release what the stream holds. Called at its end."""
        self.count_as_finished()
        held, self.held, self.least_held = self.held, 0, 0
        self._own_share.remove(held)
        if self.withheld:
            self.return_withheld()

    def return_withheld(self) -> None:
        """Give back the credit that was withheld. Called at the end of the stream."""
        returned, self.withheld = self.withheld, 0
        self._connection.return_credit(returned)

    def has_room(self, size: int) -> bool:
        """Return True when a response of `size` bytes can be sent now, or may wait for the client to read."""
        return self._sender.has_room(self.number, size)

    def consumed(self, size: int) -> None:
        """Give back flow-control credit of a piece that needs no more memory. The client may send as much again.

        Credit is sent in steps; on a shared connection when it is this body's turn.
        """
        self._unreturned += size
        self._connection.owes_credit(self, self._unreturned)

    def give_credit(self, extra: int = 0) -> int:
        """Give back the credit of what was consumed, and make the window `extra` bytes larger than at first.

        It becomes smaller as bytes are consumed whose credit is not given back. Return the bytes that may still come
        on a shared connection; 0 when no more of the body is expected.
        """
        consumed, self._unreturned = self._unreturned, 0
        if self.is_request_ended or not self._sender.is_open(self.number):
            return 0
        self.received -= consumed
        size = max(consumed + extra - self.extra, 0)
        self.extra += size - consumed
        if size:
            self._sender.write(frames.window_update(self.number, size))
        return SHARED_WINDOW + self.extra - self.received

    def encode_head(self, status: int, fields: Fields) -> bytes:
        """Encode the head of a response, in the form that `respond` and `start` take."""
        return response_head(status, fields)

    def respond(self, head: bytes, body: bytes = b"", trailers: bytes = b"") -> None:
        """Send a whole response."""
        self._sender.respond(self.number, head, body, trailers)

    def start(self, head: bytes) -> None:
        """Send the head of a streamed response."""
        self._sender.headers(self.number, head)

    def send(self, data: bytes | memoryview, on_sent: Callable[[], None] | None = None) -> None:
        """Send a piece of a streamed response.

        `on_sent` is called when all of it is written, or the stream is closed. To bound memory, wait for it.
        """
        self._sender.data(self.number, data, on_sent)

    def end(self, trailers: bytes = b"") -> None:
        """End a streamed response, after the data that was sent."""
        self._sender.end(self.number, trailers)

    def reset(self, reason: Reason) -> None:
        """End the stream with RST_STREAM. The handler is notified as if the client had disconnected."""
        self._sender.reset(self.number, reason)
