"""A unary call on the fast path: no task, no coroutine, no copy of the body. For methods that are called very often.

    GrpcApp ──> FastCall ──data──> handler(body, call) ──now or later──> reply | refuse

The stream reports a client that disconnects. `Deadlines` ends the calls whose deadline has passed.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mesh.h2.frames import DEFAULT_FRAME
from mesh.h2.headers import encode, response_head
from mesh.h2.server_connection import TENANT
from mesh.h2.stream import SMALL_BODY, ServerStream
from mesh.rpc import status, tail_spans
from mesh.rpc.access import Access, tenant_of
from mesh.rpc.fast_spans import FastTracer, parent_of
from mesh.rpc.framing import (
    JOIN_BYTES,
    MOST_PIECES,
    PIECE_OVERHEAD,
    PREFIX,
    PREFIX_BYTES,
    check_encoding,
    check_pieces,
    inflated,
    inflated_inline,
    most_inflated,
    no_memory,
    not_encoded,
    pieces,
    stalled,
    too_large,
    unread,
)
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.interceptors import FAILURES, status_of
from mesh.rpc.message_threads import MessageThreads
from mesh.rpc.stream_memory import StreamMemory
from mesh.rpc.tail_spans import NO_ATTRIBUTES, Attributes
from shoal.errors import TRACE_KEY, Code, DeadlineExceeded, InvalidArgument, ShoalError

log = logging.getLogger(__name__)

_HEAD = response_head(200, [status.CONTENT_TYPE])
_OK = encode(status.OK)
_NEVER = math.inf

UNJOINED_BYTES = 1 << 20
"""Parts of a larger message are sent as they are. A join of 100 MB takes 50 ms, and as much memory again."""

# Time between two checks of the deadlines. A timer for each call would cost more than the call.
_DEADLINE_CHECK_S = 0.02


class CallLimits(Protocol):
    """The part of an application that a fast call uses."""

    message_bytes: int
    """Maximal size of a message, in both directions."""
    clock: Callable[[], float]
    deadlines: Deadlines
    threads: MessageThreads
    heavy: HeavyWork
    tracer: FastTracer | None
    """None: no spans are exported."""
    access: Access | None
    """Knows the tenants of callers; None: callers name them."""


class FastHandler(Protocol):
    """Replies to calls of one unary method, now or later, with exactly one of the call's `reply` and `refuse`."""

    def __call__(self, body: bytes, call: FastCall, /) -> None:
        """Reply to a call. `body` is the whole body: five bytes of prefix, then the message.

        May raise instead of calling `refuse`.
        """


class FastCall(StreamMemory):
    """One call; the RequestHandler of its stream. It begins in `__init__` and ends in `_finish`, exactly once each."""

    __slots__ = (
        "_app",
        "_handler",
        "_held",
        "_parts",
        "deadline",
        "headers",
        "is_task",
        "on_end",
        "span",
    )

    def __init__(self, app: CallLimits, handler: FastHandler, stream: ServerStream) -> None:
        """Begin a call. Raises InvalidArgument for an invalid `grpc-timeout`."""
        self._app = app
        self._handler = handler
        self._stream = stream
        self._parts: list[bytes] | None = None
        self.headers = headers = stream.head.by_name
        self.span = None if app.tracer is None else app.tracer.begin(headers)
        """None: the call is not sampled."""
        timeout = headers.get(b"grpc-timeout")
        self.deadline = _NEVER if timeout is None else app.clock() + status.timeout_s(timeout)
        """On the app's clock; infinite without a timeout."""
        self.on_end: Callable[[], None] | None = None
        """Callback for a passed deadline or a disconnected client. Set by the handler."""
        self.is_over = False
        self.is_task = False
        """Set by a handler that replies in a task."""
        if timeout is not None:
            app.deadlines.add(self)

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        """Receive a piece of the body; the handler is called with the last one. Never raises."""
        if self.is_over:
            return
        try:
            if not is_end:
                if not self._stream.hold(size + PIECE_OVERHEAD):
                    raise no_memory()
                self._keep(piece)
                self._stream.consumed(size)
                return
            if self._parts is not None:
                whole = self._joined(piece)
                if whole is None:
                    return
                piece = whole
            elif size > SMALL_BODY and not self._stream.reserve(size):
                raise no_memory()
            if not piece or piece[0] or len(piece) - PREFIX_BYTES != int.from_bytes(piece[1:5]):
                plain = self._plain_message(piece)
                if plain is None:
                    return
                piece = plain
            self._handler(piece, self)
        except BaseException as err:
            self.refuse(err)

    def disconnected(self) -> None:
        """End the call without a response: the client has disconnected."""
        if self.is_over:
            return
        on_end = self.on_end
        self._finish(Code.CANCELLED)
        if on_end is not None:
            on_end()

    def stalled(self, idle_s: float) -> None:
        """End the call: its body does not arrive."""
        self.refuse(stalled(idle_s))

    def _keep(self, piece: bytes) -> None:
        if self._parts is None:
            self._parts, self._held = [], 0
        self._held += len(piece)
        # The prefix stays in one piece.
        if len(self._parts) == 1 and len(self._parts[0]) < PREFIX_BYTES:
            piece = self._parts.pop() + piece
        if piece:
            self._parts.append(piece)
            if len(self._parts) > MOST_PIECES:
                check_pieces(len(self._parts), self._held)
        limit, first = self._app.message_bytes, self._parts[0] if self._parts else b""
        if len(first) >= PREFIX_BYTES and PREFIX.unpack_from(first)[1] > limit:
            raise too_large(PREFIX.unpack_from(first)[1], limit)
        if self._held > limit + PREFIX_BYTES:
            raise too_large(self._held - PREFIX_BYTES, limit)

    def _joined(self, last: bytes) -> bytes | None:
        """Return the body, whose last piece this is; None when a thread joins it. Raises a ShoalError."""
        self._keep(last)
        assert self._parts is not None, "only called for a body of several pieces"
        parts, self._parts = self._parts, None
        # The joined body, beside its pieces.
        if not self._stream.reserve(self._held):
            raise no_memory()
        if self._held > JOIN_BYTES:
            self._start_thread(lambda: b"".join(parts))
            return None
        self._release_all_but(self._held)
        return b"".join(parts)

    def _release_all_but(self, size: int) -> None:
        """Release what the call holds, except for its own memory and a body of `size` bytes."""
        self._stream.release(max(self._stream.held - self._stream.least_held - size, 0))

    def _plain_message(self, body: bytes) -> bytes | None:
        """Return a body that is not one plain message as one; None when a thread decompresses it.

        Raises a ShoalError when it cannot be read as one.
        """
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
        if encoding is None or encoding == b"identity":
            raise not_encoded()
        check_encoding(encoding)
        message = memoryview(body)[PREFIX_BYTES:]
        plain = inflated_inline(message, encoding)
        if plain is not None:
            self.hold(len(plain))
            return bytes(PREFIX_BYTES) + plain
        limit = self._app.message_bytes
        self.hold(most_inflated(message, encoding, limit))
        self._start_thread(lambda: inflated(message, encoding, limit, lambda: self.is_over, is_framed=True))
        return None

    def _start_thread(self, work: Callable[[], bytes]) -> None:
        """Do `work` on the body in a thread. Its result is then received as the whole body."""
        begun = self._app.threads.start(self.tenant, work, self._on_thread_end)
        self.on_end = begun.cancel

    def _on_thread_end(self, result: bytes | BaseException) -> None:
        if self.is_over:
            return
        self.on_end = None
        if isinstance(result, BaseException):
            self.refuse(result)
        else:
            self._release_all_but(len(result))
            # With a size of 0: the body is counted already.
            self.data(result, 0, is_end=True)

    def reply(self, parts: Sequence[Any], size: int, trailers: bytes = _OK) -> None:
        """End the call with a message. `parts` are bytes-like, `size` bytes together. Does nothing after the end.

        Parts of more than UNJOINED_BYTES together are kept until they are sent: nobody may change them. `trailers` are
        an encoded header block.
        """
        if self.is_over:
            return
        try:
            if size > DEFAULT_FRAME:
                self._check_large(size)
                if size > UNJOINED_BYTES:
                    self._reply_unjoined(pieces(PREFIX.pack(0, size), parts), trailers)
                    return
            body = b"".join((PREFIX.pack(0, size), *parts))
        # Too large, not bytes, or out of memory: the client needs a status.
        except Exception as err:
            self.refuse(err)
            return
        self._finish()
        self._stream.respond(_HEAD, body, trailers)
        # The response waits for the client to read: it counts by itself.
        if self._stream.held:
            self._release_all_but(0)

    def _reply_unjoined(self, pieces: Sequence[bytes | memoryview], trailers: bytes) -> None:
        stream = self._stream
        self._finish()
        # The pieces count when they are sent, or wait to be.
        self._release_all_but(0)
        stream.start(_HEAD)
        for piece in pieces:
            stream.send(piece)
        stream.end(trailers)

    def _check_large(self, size: int) -> None:
        if size > self._app.message_bytes:
            raise too_large(size, self._app.message_bytes)
        if not self._stream.has_room(size):
            raise unread()

    def reply_after(self, parts: Sequence[Any], size: int, seconds: float) -> None:
        """End the call as `reply` does; keep its span when `seconds`, its time, are more than SLOW_S."""
        if seconds > tail_spans.SLOW_S:
            self.reply_slow(parts, size, seconds)
        else:
            self.reply(parts, size)

    def reply_slow(self, parts: Sequence[Any], size: int, seconds: float, about: Attributes = NO_ATTRIBUTES) -> None:
        """End the call as `reply` does, and keep its span: the call took `seconds`, too long."""
        trailers = _OK
        if not self.is_over and self.span is None:
            trace_id = tail_spans.slow(self._stream.head.path, self.headers, self._app.access, seconds, about)
            if trace_id:
                trailers = encode([*status.OK, (TRACE_KEY.encode(), trace_id.encode())])
        self.reply(parts, size, trailers)

    def refuse(self, error: BaseException, seconds: float = 0.0, about: Attributes = NO_ATTRIBUTES) -> None:
        """End the call with an error. Does nothing after the end.

        The span of the call has `seconds`, its time (0: unknown), and the attributes `about`.
        """
        if self.is_over:
            return
        code, message, trailing = status_of(error)
        number, text = code.value[0], message if isinstance(error, ShoalError) else type(error).__name__
        self._finish(number, text)
        if not isinstance(error, ShoalError):
            log.error("unexpected error in a call", {"event": "call.unexpected_error"}, exc_info=error)
        if self.span is not None:
            trace_id = self.span.trace_id if number in FAILURES else ""
        else:
            path, cause = self._stream.head.path, getattr(error, "trace_id", "")
            trace_id = tail_spans.failed(
                path, self.headers, self._app.access, number, text, seconds=seconds, attributes=about, cause=cause
            )
        if trace_id:
            trailing = (*trailing, (TRACE_KEY, trace_id))
        trailers = status.trailers(number, message, trailing)
        self._stream.respond(response_head(200, [status.CONTENT_TYPE, *trailers]))

    def expire(self) -> None:
        """End the call: its deadline has passed."""
        if self.is_over:
            return
        on_end = self.on_end
        seconds = status.timeout_s(self.headers[b"grpc-timeout"])
        self.refuse(DeadlineExceeded("the deadline of the call has passed"), seconds)
        if on_end is not None:
            on_end()

    @property
    def heavy(self) -> HeavyWork:
        """Turns for work on the call that would hold the event loop."""
        return self._app.heavy

    @property
    def tenant(self) -> bytes:
        """Tenant that the call names; empty without one."""
        return self.headers.get(TENANT, b"")

    @property
    def traceparent(self) -> str:
        """Trace context for work after the call: the call's span, else the caller's; empty without a trace."""
        return parent_of(self.headers) if self.span is None else self.span.traceparent

    def _finish(self, code: int = 0, message: str = "") -> None:
        self.is_over = True
        # The callback refers to the handler's work, which refers to this call.
        self.on_end = None
        if self.span is not None:
            assert self._app.tracer is not None
            tenant = tenant_of(self._app.access, self.headers)
            self._app.tracer.end(self.span, self._stream.head.path, code, message, tenant)
        if self.deadline != _NEVER:
            self._app.deadlines.discard(self)


class Deadlines:
    """The fast calls that have a deadline. While there are any, a timer ends the calls whose deadline has passed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._calls: set[FastCall] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: FastCall) -> None:
        self._calls.add(call)
        if self._timer is None:
            self._timer = self._loop.call_later(_DEADLINE_CHECK_S, self._check)

    def discard(self, call: FastCall) -> None:
        self._calls.discard(call)

    def _check(self) -> None:
        now = self._clock()
        try:
            for call in [call for call in self._calls if call.deadline <= now]:
                try:
                    call.expire()
                # An error of one call must not affect the deadlines of the others.
                except Exception:
                    self.discard(call)
                    log.exception("the end of a call at its deadline failed", {"event": "call.deadline_failed"})
        finally:
            self._timer = self._loop.call_later(_DEADLINE_CHECK_S, self._check) if self._calls else None


def admitted(methods: Mapping[str, FastHandler], access: Access | None) -> Mapping[str, FastHandler]:
    """Return handlers that ask `access` for each call, as the slow path does. No model is known."""
    return methods if access is None else {rpc: _Admitted(rpc, handler, access) for rpc, handler in methods.items()}


class _Admitted:
    def __init__(self, rpc: str, handler: FastHandler, access: Access) -> None:
        self._rpc = rpc
        self._handler = handler
        self._access = access

    def __call__(self, body: bytes, call: FastCall) -> None:
        self._access.check_call(self._rpc, call.headers)
        self._handler(body, call)
