"""A call of any kind on the slow path: one task, which ends with a status whatever happens.

stream ──data──> pieces ──read on demand──> messages ──> handler ──> messages, status ──> stream
       ──disconnected──> the task is cancelled
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import grpc

from mesh.h2.headers import encode, response_head
from mesh.h2.server_connection import TENANT
from mesh.h2.stream import SMALL_BODY, ServerStream
from mesh.rpc import status, tail_spans
from mesh.rpc.access import Access
from mesh.rpc.call_context import CallContext, Metadata
from mesh.rpc.framing import (
    ACCEPTED,
    PIECE_OVERHEAD,
    PREFIX,
    Deframer,
    MessageParts,
    Unfinished,
    check_encoding,
    framed,
    inflated,
    inflated_inline,
    most_inflated,
    no_memory,
    pieces,
    stalled,
    too_large,
    unread,
)
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.interceptors import status_of
from mesh.rpc.message_threads import MessageThreads
from mesh.rpc.parsing import Parser, parse_in_turn
from shoal.errors import TRACE_KEY, Code, DeadlineExceeded, InvalidArgument, ShoalError, trace_of

log = logging.getLogger(__name__)

# A stream that has never sent a message is ended after so long, as at Envoy (stream_idle_timeout). One that has may be
# silent as long as it likes.
_NEVER_SENT_S = 300.0


class CallTable(Protocol):
    """The part of an application that a slow call uses."""

    methods: Mapping[str, Any]
    """grpc.RpcMethodHandler by path."""
    message_bytes: int
    """Maximal size of a message, in both directions."""
    clock: Callable[[], float]
    threads: MessageThreads
    heavy: HeavyWork
    tasks: set[asyncio.Task[None]]
    access: Access | None
    """None: every caller may call every method."""


class Disconnected(OSError):
    """The client has disconnected: nothing can be sent."""


class SlowCall:
    """One call; the RequestHandler of its stream."""

    is_task = True

    def __init__(self, app: CallTable, stream: ServerStream) -> None:
        self._app = app
        self._messages = _Messages(stream, app)
        self._response = _Response(stream, app.message_bytes)
        self._head = stream.head
        self._tenant = stream.head.by_name.get(TENANT, b"")
        self._peer = stream.peer
        self._refusal: ShoalError | None = None
        self._began = app.clock()
        task = asyncio.create_task(self._run(), name=stream.head.path)
        app.tasks.add(task)
        task.add_done_callback(app.tasks.discard)
        self._task: asyncio.Task[None] | None = task

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        """Keep a piece of the body until the handler reads it. Flow control bounds the kept bytes."""
        self._messages.add(piece, size, is_end=is_end)

    def stalled(self, idle_s: float) -> None:
        """Fail the messages when one of them is not whole, or when none ever arrived."""
        self._messages.stalled(idle_s)

    def disconnected(self) -> None:
        """Cancel the handler."""
        self._response.is_disconnected = True
        # The task keeps the exception that ends it, which refers to this call.
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def end(self, error: ShoalError) -> None:
        """Cancel the handler, and end the call with `error`."""
        self._refusal = error
        if self._task is not None:
            self._task.cancel()

    def _fail(self, code: int, message: str, trailing: Metadata = (), cause: str = "") -> None:
        """End the call with an error, which names its trace. `cause`: trace of the call that made it fail."""
        if not trace_of(trailing):
            headers, seconds = self._head.by_name, self._app.clock() - self._began
            trace_id = tail_spans.failed(
                self._head.path, headers, self._app.access, code, message, seconds=seconds, cause=cause
            )
            if trace_id:
                trailing = (*trailing, (TRACE_KEY, trace_id))
        self._response.end(code, message, trailing)

    async def _run(self) -> None:
        try:
            await self._call()
        except Disconnected:
            pass
        except asyncio.CancelledError:
            # Nobody reads a response, and this instance has not failed.
            if self._response.is_disconnected:
                return
            if self._refusal is not None:
                self._fail(self._refusal.code, self._refusal.message)
                return
            # The exception is not raised again: the task would keep it, with the frames that refer to the task. Such
            # reference cycles keep a call's memory until a garbage collection, and make that long.
            self._fail(Code.UNAVAILABLE, "this instance is stopping")
        # SystemExit, too: an exception of one call must not end the others.
        except BaseException as err:
            if not isinstance(err, ShoalError):
                log.error("unexpected error in a call", {"event": "call.unexpected_error"}, exc_info=err)
            code, message, trailing = status_of(err)
            self._fail(code.value[0], message, trailing, getattr(err, "trace_id", ""))
            # A traceback refers to frames, some of which refer to the exception: a reference cycle.
            err.__traceback__ = None

    async def _call(self) -> None:
        app, headers = self._app, self._head.by_name
        handler = app.methods[self._head.path]
        if app.access is None:
            await self._admitted(handler)
        else:
            with app.access.open_call(self._head.path, headers, self.end):
                await self._admitted(handler)

    async def _admitted(self, handler: Any) -> None:
        app, response, headers = self._app, self._response, self._head.by_name
        encoding = headers.get(b"grpc-encoding")
        check_encoding(encoding)
        self._messages.begin(encoding, is_single=not handler.request_streaming)
        deadline = status.deadline(headers, app.clock())
        peer = f"{self._peer[0]}:{self._peer[1]}"
        context = CallContext(self._head.fields, peer, deadline, app.clock, self._messages)
        response.context = context
        try:
            async with asyncio.timeout(None if deadline == math.inf else max(deadline - app.clock(), 0.0)):
                await self._handle(handler, context)
        except TimeoutError:
            raise DeadlineExceeded("the deadline of the call has passed") from None
        except grpc.aio.AbortError:
            self._fail(*context.status, context.trailing, context.cause)

    async def _handle(self, handler: Any, context: CallContext) -> None:
        messages, response = self._messages, self._response
        parse = handler.request_deserializer
        # Called with the bytes of a message.
        parsed = partial(
            parse_in_turn, self._app.heavy, self._tenant, parse if isinstance(parse, Parser) else Parser(parse)
        )
        if handler.request_streaming:
            request: Any = _parsed(messages, parsed)
        else:
            request = await parsed(await messages.only())
        kind = "_".join("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
        behaviour = getattr(handler, kind)
        if not handler.response_streaming:
            message = handler.response_serializer(await behaviour(request, context))
            seconds = self._app.clock() - self._began
            if seconds > tail_spans.SLOW_S:
                trace_id = tail_spans.slow(self._head.path, self._head.by_name, self._app.access, seconds)
                if trace_id:
                    context.trailing = (*context.trailing, (TRACE_KEY, trace_id))
            response.whole(message)
            return
        responses = behaviour(request, context)
        try:
            async for message in responses:
                await response.message(_parts(message, handler.response_serializer))
                # A stream that waits for its next message keeps none of the last one: no account counts that any more.
                # So do all that hand messages on.
                del message
        finally:
            await responses.aclose()
        response.end(*context.status, context.trailing)


def _parts(message: Any, serializer: Callable[[Any], bytes]) -> MessageParts:
    if isinstance(message, MessageParts):
        return message
    serialised = serializer(message)
    return MessageParts((serialised,), len(serialised))


async def _parsed(messages: _Messages, parsed: Callable[[bytes], Awaitable[Any]]) -> AsyncIterator[Any]:
    while (message := await messages.next()) is not None:
        size = len(message) if len(message) > SMALL_BODY else 0
        messages.hold(size)
        try:
            request = await parsed(message)
        finally:
            messages.release(size)
        del message
        yield request
        del request


class _Messages:
    """Messages of a request. A piece of the body is parsed on demand; only then is its credit given back.

    The message of a unary call counts in the memory of requests until the call ends; that of a stream until the
    handler asks for the next one. A handler that keeps messages longer, or makes copies, counts them (`hold`).
    """

    def __init__(self, stream: ServerStream, app: CallTable) -> None:
        self._stream = stream
        self._app = app
        self._encoding = b""
        self._deframer = Deframer(None, 0)
        self._is_single = False
        # Each with its size, and the bytes that are counted for it.
        self._pieces: deque[tuple[bytes, int, int]] = deque()
        self._is_first = True
        # Bytes that the stream holds for the pieces, for a message that a thread works on, for the message that the
        # handler has, and for what the handler itself holds.
        self._queued = self._in_thread = self._kept = self._reserved = 0
        self.message_bytes = 0
        """Size of the message that was read last."""
        self._is_ended = False
        self._error: ShoalError | None = None
        self._read: Iterator[bytes | Unfinished] = iter(())
        self._has_read = False
        self._changed = asyncio.Event()

    def begin(self, encoding: bytes | None, *, is_single: bool) -> None:
        """Set the compression, and whether the call is unary. Called before the first message is read."""
        self._encoding = encoding or b""
        self._is_single = is_single
        # A stream of messages may stay open for ever.
        if not is_single:
            self._stream.count_as_finished()
        self._deframer = Deframer(encoding, self._app.message_bytes)

    def add(self, piece: bytes, size: int, *, is_end: bool) -> None:
        self._is_ended = is_end
        if size and self._error is None:
            # A message begins: it has its own time to arrive, however long the stream was silent.
            if not self._pieces and not self._deframer.holds:
                self._stream.idle_ticks = 0
            # The first one, if small, is counted with its stream.
            counted = 0 if self._is_first and size <= SMALL_BODY else size + PIECE_OVERHEAD
            self._is_first = False
            if not counted or self._stream.hold(counted):
                self._pieces.append((piece, size, counted))
                self._queued += counted
            else:
                self._fail(no_memory())
        self._changed.set()

    def stalled(self, idle_s: float) -> None:
        """Fail the messages when the client is to blame for a pause of `idle_s`."""
        # What waits for the handler is no fault of the client.
        if self._pieces:
            return
        is_silent = not self._has_read and idle_s >= _NEVER_SENT_S
        if self._is_single or self._deframer.holds or is_silent:
            self._fail(stalled(idle_s))

    def _fail(self, error: ShoalError) -> None:
        self._error = error
        self._pieces.clear()
        self._queued = 0
        self._read = iter(())
        self._deframer = Deframer(None, 0)
        self._release()
        self._changed.set()

    def _release(self) -> None:
        """Release what was read. The stream holds nothing any more when it has ended."""
        needed = self._queued + self._deframer.holds + self._in_thread + self._kept + self._reserved
        if (last := self._stream.kept) is not None:
            needed += last[2]
        read = self._stream.held - self._stream.least_held - needed
        if read > 0:
            self._stream.release(read)

    def _reserve(self, size: int) -> None:
        if not self._stream.reserve(size):
            raise no_memory()

    @property
    def sender(self) -> Hashable:
        """Identity of the tenant and its connection, behind Envoy of its connection to Envoy."""
        return self._stream.sender

    @property
    def room(self) -> int:
        """Bytes that `hold_response` may count now."""
        return self._stream.share.free

    def hold(self, size: int) -> None:
        """Count `size` bytes more of memory until the call ends. Raises ResourceExhausted when there is no room."""
        self._reserve(size)
        self._reserved += size

    def hold_response(self, size: int) -> None:
        """Count `size` bytes of a response that is being written, as `hold`. It may take all that is free."""
        if not self._stream.reserve(size, is_response=True):
            raise no_memory()
        self._reserved += size

    def release(self, size: int) -> None:
        """Release bytes that were held, before the call ends."""
        self._reserved -= size
        self._stream.release(size)

    async def next(self) -> bytes | None:
        """Return the next message, or None after the last one. Raises a ShoalError for an invalid body."""
        if not self._is_single:
            self._kept = 0
        while True:
            message = next(self._read, None)
            if message is not None:
                self._has_read = True
                return self._read_whole(message) if isinstance(message, bytes) else await self._finished(message)
            self._release()
            if self._error is not None:
                raise self._error
            if self._pieces:
                piece, size, counted = self._pieces.popleft()
                self._queued -= counted
                self._stream.consumed(size)
                self._read = self._deframer.feed(piece)
            elif self._is_ended:
                self._deframer.finish()
                return None
            else:
                self._changed.clear()
                await self._changed.wait()

    def _read_whole(self, message: bytes) -> bytes:
        """Return a message that is whole, and release everything but its bytes."""
        self.message_bytes = self._kept = len(message)
        self._release()
        return message

    async def _finished(self, message: Unfinished) -> bytes:
        """Return a message that is joined and decompressed: in a thread, if it is large."""
        limit = self._app.message_bytes
        size = sum(map(len, message))
        # The copies that are made.
        copies = size if len(message) > 1 else 0
        if message.is_compressed:
            if not copies and (plain := inflated_inline(message[0], self._encoding)) is not None:
                self._reserve(len(plain))
                return self._read_whole(plain)
            copies += limit if copies else most_inflated(message[0], self._encoding, limit)
        self._reserve(copies)
        self._in_thread = size + copies
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def work() -> bytes:
            whole = b"".join(message)
            return inflated(whole, self._encoding, limit, done.done) if message.is_compressed else whole

        try:
            tenant = self._stream.head.by_name.get(TENANT, b"")
            begun = self._app.threads.start(tenant, work, partial(_deliver, done))
            try:
                found = await done
            finally:
                begun.cancel()
        except BaseException:
            self._in_thread = 0
            self._release()
            raise
        self._in_thread = 0
        return self._read_whole(found)

    async def only(self) -> bytes:
        """Return the message of a unary call. Raises InvalidArgument for another number of messages."""
        found = await self.next()
        if found is None:
            raise InvalidArgument("expected one message, got none")
        if await self.next() is not None:
            raise InvalidArgument("expected one message, got a second one")
        return found


def _deliver(done: asyncio.Future[bytes], result: bytes | BaseException) -> None:
    if done.done():
        return
    if isinstance(result, BaseException):
        done.set_exception(result)
    else:
        done.set_result(result)


class _Response:
    """Messages and status of one call's response. The status is sent once; later ones are ignored."""

    def __init__(self, stream: ServerStream, message_bytes: int) -> None:
        self._stream = stream
        self._message_bytes = message_bytes
        self._has_started = False
        self._is_over = False
        self.is_disconnected = False
        self.context: CallContext | None = None

    def whole(self, message: bytes) -> None:
        """Send the message of a unary call, and its status."""
        context = self.context
        assert context is not None
        self._check(len(message))
        trailers = status.trailers(*context.status, context.trailing)
        head = self._head()
        self._is_over = True
        self._stream.respond(head, framed(message), encode(trailers))

    async def message(self, message: MessageParts) -> None:
        """Send a message of a streamed response. Return when all of it is written."""
        self._check(message.size)
        if not self._has_started:
            self._stream.start(self._head())
            self._has_started = True
        sent = asyncio.get_running_loop().create_future()
        *first, last = pieces(PREFIX.pack(0, message.size), message.parts)
        for piece in first:
            self._stream.send(piece)
        self._stream.send(last, lambda: None if sent.done() else sent.set_result(None))
        await sent

    def end(self, code: Code | int, message: str, trailing: Iterable[tuple[str, str | bytes]] = ()) -> None:
        """Send the status."""
        if self._is_over:
            return
        self._is_over = True
        trailers = status.trailers(code, message, trailing)
        if self._has_started:
            self._stream.end(encode(trailers))
        else:
            self._stream.respond(self._head(trailers))

    def _head(self, trailers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
        leading = status.encoded(self.context.leading) if self.context else []
        return response_head(200, [status.CONTENT_TYPE, (b"grpc-accept-encoding", ACCEPTED), *leading, *trailers])

    def _check(self, size: int) -> None:
        if self.is_disconnected:
            raise Disconnected("the client has disconnected")
        if size > self._message_bytes:
            raise too_large(size, self._message_bytes)
        if not self._stream.has_room(size):
            raise unread()
