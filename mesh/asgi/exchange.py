"""One unary call on the short way: no task, no coroutine, no copy of the body. For methods that are called very often.

    app ──> Exchange ──receive()──> on_body ──> handler(body, exchange) ──later──> reply | refuse

What a coroutine would do by itself is done by the app's sweep for all exchanges together: ending those whose deadline
has passed, and finding out that a caller has gone (Envoy does not tell: it has to be asked).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mesh.asgi import status
from mesh.asgi.framing import PREFIX, PREFIX_BYTES, check_encoding, inflated, too_large
from mesh.interceptors import status_of
from shoal.errors import InvalidArgument, ShoalError

log = logging.getLogger(__name__)

_START = {"type": "http.response.start", "status": 200, "headers": status.HEADERS, "trailers": True}
_TRAILERS = {"type": "http.response.trailers", "headers": status.OK}


class Carrier(Protocol):
    """What an exchange needs of the app that it belongs to."""

    message_bytes: int
    """At most in a message, either way."""
    clock: Callable[[], float]
    exchanges: set[Exchange]
    """Those in flight."""


class ShortHandler(Protocol):
    """Answers unary calls of one method, now or later, with exactly one of the exchange's `reply` and `refuse`."""

    def __call__(self, body: bytes, exchange: Exchange) -> None:
        """`body` is the whole body: five bytes of prefix, then the message. May raise instead of refusing."""


class Exchange:
    """One call. Stands for the task that Envoy's module expects of an app: it needs none."""

    __slots__ = (
        "_app",
        "_handler",
        "_held",
        "_is_whole",
        "_parts",
        "_receive",
        "_send",
        "arrived",
        "deadline",
        "headers",
        "is_over",
        "is_polled",
        "on_end",
    )

    def __init__(
        self, app: Carrier, handler: ShortHandler, headers: dict[bytes, bytes], receive: Any, send: Any
    ) -> None:
        self._app = app
        self._handler = handler
        self._receive = receive
        self._send = send
        self._parts: list[bytes] | None = None
        self._is_whole = False
        self.headers = headers
        self.arrived = now = app.clock()
        self.deadline = status.deadline(headers, now)
        """On the app's clock; infinite when the caller set none."""
        self.on_end: Callable[[], None] | None = None
        """Called when nobody waits for the answer any more: deadline, or the caller has gone. Set by the handler."""
        self.is_over = False
        self.is_polled = False

    def add_done_callback(self, callback: Any, *, context: Any = None) -> None:
        """A task would report an exception that nobody caught. Here there is none: `on_body` catches all."""

    def on_body(self, future: asyncio.Future[dict[str, Any]]) -> None:
        """A piece of the request is here."""
        try:
            event = future.result()
            if event["type"] == "http.disconnect":
                self.abandon()
                return
            if self.take(event["body"], more=event["more_body"]):
                self._receive().add_done_callback(self.on_body)
        except BaseException as err:  # Else Envoy would answer OK with no message.
            self.refuse(err)

    def take(self, piece: bytes, *, more: bool) -> bool:
        """A piece of the body. With the last one the handler has its turn. Says whether another is wanted.

        Never raises.
        """
        if self.is_over:
            return False
        try:
            if more:
                self._hold(piece)
                return True
            if self._parts is not None:
                self._hold(piece)
                piece, self._parts = b"".join(self._parts), None
            self._is_whole = True
            if not piece or piece[0] or len(piece) - PREFIX_BYTES != int.from_bytes(piece[1:5]):
                piece = self._straightened(piece)
            self._handler(piece, self)
        except BaseException as err:
            self.refuse(err)
        return False

    def _hold(self, piece: bytes) -> None:
        if self._parts is None:
            self._parts, self._held = [], 0
        self._held += len(piece)
        if len(self._parts) == 1 and len(self._parts[0]) < PREFIX_BYTES:
            piece = self._parts.pop() + piece  # The prefix stays in one piece.
        if piece:
            self._parts.append(piece)
        limit, head = self._app.message_bytes, self._parts[0] if self._parts else b""
        if len(head) >= PREFIX_BYTES and PREFIX.unpack_from(head)[1] > limit:
            raise too_large(PREFIX.unpack_from(head)[1], limit)
        if self._held > limit + PREFIX_BYTES:
            raise too_large(self._held - PREFIX_BYTES, limit)

    def _straightened(self, body: bytes) -> bytes:
        """A body that is not simply one plain message: made one, or refused."""
        if len(body) < PREFIX_BYTES:
            raise InvalidArgument(f"expected one message, got a request of {len(body)} bytes")
        flags, size = PREFIX.unpack_from(body)
        if size > self._app.message_bytes:
            raise too_large(size, self._app.message_bytes)
        if size != len(body) - PREFIX_BYTES:
            raise InvalidArgument(
                f"expected one message: its prefix says {size} bytes, the request has {len(body) - PREFIX_BYTES}"
            )
        if flags > 1:
            raise InvalidArgument(f"a message begins with the flags {flags}: expected 0, or 1 when it is compressed")
        if not flags:
            return body
        encoding = self.headers.get(b"grpc-encoding")
        if encoding in (None, b"identity"):
            raise InvalidArgument("a message is marked as compressed, but the call has no grpc-encoding")
        check_encoding(encoding)
        return bytes(PREFIX_BYTES) + inflated(body[PREFIX_BYTES:], encoding, self._app.message_bytes)

    def reply(self, parts: Sequence[Any], size: int) -> None:
        """Ends the call with a message: `parts` are bytes-like, `size` bytes together. Nothing when it is over."""
        if self.is_over:
            return
        try:
            if size > self._app.message_bytes:
                raise too_large(size, self._app.message_bytes)
            body = b"".join((PREFIX.pack(0, size), *parts))
        except Exception as err:  # Too large, no bytes, or out of memory: the caller must hear of it.
            self.refuse(err)
            return
        self._end()
        self._answer(body)

    def refuse(self, error: BaseException) -> None:
        """Ends the call with an error. Nothing when it is over."""
        if self.is_over:
            return
        self._end()
        if not isinstance(error, ShoalError):
            log.error("unexpected error in a call", exc_info=error)
        code, message, trailing = status_of(error)
        self._answer_error([status.CONTENT_TYPE, *status.trailers(code.value[0], message, trailing)])

    def _end(self) -> None:
        self.is_over = True
        self._app.exchanges.discard(self)

    def _answer(self, body: bytes) -> None:
        """Sends a whole answer: status OK, and `body`, prefix included."""
        try:
            self._send(_START)
            self._send({"type": "http.response.body", "body": body})
            self._send(_TRAILERS)
        except Exception:  # Nobody there any more.
            log.debug("an answer could not be sent", exc_info=True)

    def _answer_error(self, headers: status.Headers) -> None:
        """Sends an answer that is only headers."""
        try:
            self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self._send({"type": "http.response.body", "body": b""})
        except Exception:
            log.debug("an error could not be sent", exc_info=True)

    def age_ns(self) -> int:
        """How long ago it came."""
        return int((self._app.clock() - self.arrived) * 1e9)

    def abandon(self) -> None:
        """The caller has gone."""
        if self.is_over:
            return
        self._end()
        if self.on_end is not None:
            self.on_end()

    def expire(self, error: ShoalError) -> None:
        """Its deadline has passed."""
        self.refuse(error)
        if self.on_end is not None:
            self.on_end()

    def poll(self) -> None:
        """Asks whether the caller is still there. Only after the whole body is here."""
        if self.is_polled or not self._is_whole:
            return
        self.is_polled = True
        self._receive().add_done_callback(self._on_poll)

    def _on_poll(self, future: asyncio.Future[dict[str, Any]]) -> None:
        self.is_polled = False
        if future.cancelled() or future.exception() is not None or future.result()["type"] == "http.disconnect":
            self.abandon()
