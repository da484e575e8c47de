"""The ASGI app that Envoy calls: from the path of a call to its handler, and back with a status, whatever happens.

What Envoy's module would do by itself is guarded here: an exception that nobody catches would read as OK with no
message, deadlines would not be enforced, and a caller that goes would not be noticed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc

from mesh.asgi import status
from mesh.asgi.context import CallContext
from mesh.asgi.exchange import Exchange, ShortHandler
from mesh.asgi.framing import ACCEPTED, Deframer, check_encoding, framed, too_large
from mesh.interceptors import status_of
from shoal.errors import Code, DeadlineExceeded, InvalidArgument, ShoalError, Unimplemented

log = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]

_POLL_S = 0.05
# How soon it is noticed that a caller has gone. Each question costs a way to Envoy and back.

_SWEEP_S = 0.02
_POLLS_A_SWEEP = 64
# All exchanges together ask Envoy at most 3,200 times a second: under a tenth of a core.

_INBOX_MESSAGES = 16
_INBOX_BYTES = 4 << 20
# Of a stream, read ahead of the handler: enough to keep it busy, and little memory. A larger message comes alone.


class GrpcApp:
    """Serves `methods` (path to grpc.RpcMethodHandler) and `short` (path to ShortHandler): the server fills them."""

    _asgi_single_callable = True
    # What tells Envoy's module that this is ASGI 3, though calling it makes no coroutine of a known kind.

    def __init__(self, message_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.message_bytes = message_bytes
        self.clock = clock
        self.methods: dict[str, Any] = {}
        self.short: dict[str, ShortHandler] = {}
        self.exchanges: set[Exchange] = set()
        self.calls: set[asyncio.Task[Any]] = set()
        """The calls in flight are those of `exchanges` and of `calls`."""
        self.on_lifespan: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.is_open = asyncio.Event()
        """Set once the tables of methods are filled."""
        self._polled = 0

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """An Exchange, which needs no task, or a coroutine (`task_factory` tells them apart). Never raises."""
        if scope["type"] == "lifespan":
            return self._lifespan(receive, send)
        handler = self.short.get(scope["path"])
        if handler is None:
            return self.serve(scope, receive, send)
        headers = dict(scope["headers"])
        if headers.get(b"content-type") != b"application/grpc" or scope["method"] != "POST":
            return self.serve(scope, receive, send)
        try:
            exchange = Exchange(self, handler, headers, receive, send)
        except ShoalError:  # A header that is none of gRPC's: the long way says so.
            return self.serve(scope, receive, send)
        request = receive()
        if not isinstance(request, asyncio.Future):  # It has no body at all.
            return self.serve(scope, receive, send)
        self.exchanges.add(exchange)
        request.add_done_callback(exchange.on_body)
        return exchange

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        if self.on_lifespan is not None:
            await self.on_lifespan()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        task = asyncio.current_task()
        assert task is not None
        self.calls.add(task)
        try:
            if not _is_grpc(scope):
                await reply.refuse_http()
                return
            await self._call(scope, receive, reply)
        except OSError as err:  # ClientDisconnectedError is one: nobody is there to be told.
            if type(err).__name__ != "ClientDisconnectedError":
                await reply.fail(err)
        except asyncio.CancelledError:
            await reply.end(Code.UNAVAILABLE, "this instance is stopping")
            raise
        except BaseException as err:
            await reply.fail(err)
        finally:
            self.calls.discard(task)

    async def _call(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = dict(scope["headers"])
        handler = self.methods.get(scope["path"])
        if handler is None:
            raise Unimplemented(f"Method not found: this server does not do {scope['path']}")
        encoding = headers.get(b"grpc-encoding")
        check_encoding(encoding)
        deadline = status.deadline(headers, self.clock())
        peer = scope.get("client") or ("unix", 0)
        context = CallContext(scope["headers"], f"{peer[0]}:{peer[1]}", deadline, self.clock)
        reply.context = context
        inbox = _Inbox(receive, Deframer(encoding, self.message_bytes))
        async with _Watched(inbox) as watched:
            try:
                async with asyncio.timeout(None if deadline == math.inf else max(deadline - self.clock(), 0.0)):
                    await self._handle(handler, inbox, context, reply)
            except TimeoutError:
                raise DeadlineExceeded("the deadline of the call has passed") from None
            except grpc.aio.AbortError:
                await reply.end(*context.status, context.trailing)
            except asyncio.CancelledError:
                if not watched.is_disconnected:
                    raise
                watched.uncancel()

    async def _handle(self, handler: Any, inbox: _Inbox, context: CallContext, reply: _Reply) -> None:
        if handler.request_streaming:
            request: Any = _parsed(inbox, handler.request_deserializer)
        else:
            request = handler.request_deserializer(await inbox.only())
        kind = "_".join("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
        behaviour = getattr(handler, kind)
        if not handler.response_streaming:
            message = handler.response_serializer(await behaviour(request, context))
            await reply.message(self._sendable(message), is_last=True)
        else:
            responses = behaviour(request, context)
            try:
                async for response in responses:
                    await reply.message(self._sendable(handler.response_serializer(response)))
            finally:
                await responses.aclose()
        await reply.end(*context.status, context.trailing)

    def _sendable(self, message: bytes) -> bytes:
        if len(message) > self.message_bytes:
            raise too_large(len(message), self.message_bytes)
        return message

    async def sweep(self) -> None:
        """Ends the exchanges that are over, again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            if self.exchanges:
                self._sweep(self.clock())

    def _sweep(self, now: float) -> None:
        old = []
        for exchange in tuple(self.exchanges):
            if now >= exchange.deadline:
                exchange.expire(DeadlineExceeded("the deadline of the call has passed"))
            elif now - exchange.arrived >= _POLL_S:
                old.append(exchange)
        if not old:
            return
        first = self._polled % len(old)
        chosen = (old[first:] + old[:first])[:_POLLS_A_SWEEP]
        self._polled = first + len(chosen)
        for exchange in chosen:
            exchange.poll()


def task_factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
    """For the loop that the app runs on: an Exchange stays what it is, a coroutine becomes a task."""
    if isinstance(work, Exchange):
        return work
    coroutine: Coroutine[Any, Any, Any] = work
    return asyncio.Task(coroutine, loop=loop, **options)


def _is_grpc(scope: Scope) -> bool:
    content_type: bytes = dict(scope["headers"]).get(b"content-type", b"")
    is_plain = content_type == b"application/grpc"
    return (is_plain or content_type.startswith((b"application/grpc+", b"application/grpc;"))) and (
        scope["method"] == "POST"
    )


async def _kept(answer: Any) -> Any:
    """Awaits what Envoy's module will answer in any case: that its future was cancelled would be an error there."""
    return await (asyncio.shield(answer) if isinstance(answer, asyncio.Future) else answer)


async def _parsed(inbox: _Inbox, parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for message in inbox:
        yield parse(message)


class _Inbox:
    """The messages of one call, read ahead by `pump`, which also notices that the caller has gone."""

    def __init__(self, receive: Receive, deframer: Deframer) -> None:
        self._receive = receive
        self._deframer = deframer
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(_INBOX_MESSAGES)
        self._bytes = 0
        self._has_room = asyncio.Event()

    async def pump(self) -> None:
        """Reads until the caller has gone. Never raises, but for cancellation."""
        try:
            while True:
                event = await _kept(self._receive())
                if event["type"] == "http.disconnect":
                    return
                for message in self._deframer.feed(event["body"]):
                    self._bytes += len(message)
                    await self._queue.put(message)
                while self._bytes > _INBOX_BYTES:
                    self._has_room.clear()
                    await self._has_room.wait()
                if not event["more_body"]:
                    break
            self._deframer.finish()
            await self._queue.put(None)
        except ShoalError as err:
            await self._queue.put(err)
        # After the end of the body it answers at once, with nothing, until the caller has gone.
        while (await _kept(self._receive()))["type"] != "http.disconnect":  # noqa: ASYNC110 - it has to be asked.
            await asyncio.sleep(_POLL_S)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._queue.get()) is not None:
            if isinstance(message, BaseException):
                try:
                    raise message
                finally:
                    del message  # Its trace holds this frame: a circle, and in it what was received.
            self._bytes -= len(message)
            self._has_room.set()
            yield message

    async def only(self) -> bytes:
        """The one message of a unary call. Raises InvalidArgument when there is another number of them."""
        found: bytes | None = None
        async for message in self:
            if found is not None:
                raise InvalidArgument("expected one message, got a second one")
            found = message
        if found is None:
            raise InvalidArgument("expected one message, got none")
        return found


class _Watched:
    """Cancels the block's task when the caller goes."""

    def __init__(self, inbox: _Inbox) -> None:
        self._inbox = inbox
        self.is_disconnected = False

    async def __aenter__(self) -> _Watched:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._pump = asyncio.create_task(self._inbox.pump())
        self._pump.add_done_callback(self._on_gone)
        return self

    def _on_gone(self, pump: asyncio.Task[None]) -> None:
        if pump.cancelled():
            return
        if (err := pump.exception()) is not None:
            log.error("a request could not be read", exc_info=err)
        self.is_disconnected = True
        self._task.cancel()

    def uncancel(self) -> None:
        self._task.uncancel()

    async def __aexit__(self, *raised: object) -> None:
        self._pump.remove_done_callback(self._on_gone)
        self._pump.cancel()


class _Reply:
    """What the caller gets: messages, then a status, whatever has been sent until then."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_started = False
        self._has_body_ended = False
        self._is_over = False
        self.context: CallContext | None = None

    def _start(self, extra: status.Headers, *, trailers: bool) -> Any:
        leading = status.encoded(self.context.leading) if self.context else []
        headers = [status.CONTENT_TYPE, (b"grpc-accept-encoding", ACCEPTED), *leading, *extra]
        self._has_started = True
        return self._send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": trailers})

    async def message(self, message: bytes, *, is_last: bool = False) -> None:
        """Waits until Envoy has room for it."""
        if not self._has_started:
            await self._start([], trailers=True)
        self._has_body_ended = is_last
        await _kept(self._send({"type": "http.response.body", "body": framed(message), "more_body": not is_last}))

    async def end(self, code: Code | int, message: str, trailing: Any = ()) -> None:
        """Once; later ends change nothing."""
        if self._is_over:
            return
        self._is_over = True
        found = status.trailers(code, message, trailing)
        if not self._has_started:
            await self._start(found, trailers=False)
            await self._send({"type": "http.response.body", "body": b""})
            return
        if not self._has_body_ended:
            await self._send({"type": "http.response.body", "body": b""})
        await self._send({"type": "http.response.trailers", "headers": found})

    async def fail(self, error: BaseException) -> None:
        if not isinstance(error, ShoalError):
            log.error("unexpected error in a call", exc_info=error)
        code, message, trailing = status_of(error)
        try:
            await self.end(code.value[0], message, trailing)
        except OSError:
            log.debug("an error could not be sent", exc_info=True)

    async def refuse_http(self) -> None:
        """It is no gRPC: HTTP says so, as the protocol wants."""
        headers = [(b"content-type", b"text/plain")]
        await self._send({"type": "http.response.start", "status": 415, "headers": headers})
        await self._send(
            {"type": "http.response.body", "body": b"this is a gRPC server: content-type application/grpc\n"}
        )
