"""One call: its body, its admission, its deadline, and its response.

    stream ──data──> pieces ──is_end──> task: join, decompress ──> operation ──> Reply, or events ──> stream
           │                   └── fast path: no task, a response now or later (`fast_infer`)
           └──disconnected──> the task is cancelled

The call is the memory of its request (`RequestMemory`), from the first piece of its body to its response.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import orjson

from mesh.h2.server_connection import TENANT
from mesh.h2.stream import SMALL_BODY, ServerStream
from mesh.rest import long_lists
from mesh.rest.heartbeats import Heartbeats
from mesh.rest.json_text import PARSER, parsed_bytes
from mesh.rest.target import Target
from mesh.rest.tenant_lock import TenantLock
from mesh.rpc import status, tail_spans
from mesh.rpc.access import ADDRESS, CALLER, tenant_of
from mesh.rpc.auditing import Auditing
from mesh.rpc.call_context import CallContext
from mesh.rpc.fast_spans import FastTracer
from mesh.rpc.framing import (
    INLINE_BYTES,
    JOIN_BYTES,
    PIECE_OVERHEAD,
    check_pieces,
    inflated,
    inflated_inline,
    most_inflated,
    no_memory,
    stalled,
    too_large,
    unread,
)
from mesh.rpc.heavy_work import Steps
from mesh.rpc.held_shares import CallLimits
from mesh.rpc.interceptors import FAILURES, log_error, status_of
from mesh.rpc.parsing import UNSCANNED_BYTES, parse_in_turn
from mesh.rpc.slow_call import CallTable
from mesh.rpc.stream_memory import StreamMemory
from mesh.rpc.tail_spans import MODEL, NO_ATTRIBUTES, Attributes
from shoal.access.audit import AUDITED
from shoal.errors import (
    TRACE_KEY,
    Code,
    DeadlineExceeded,
    InvalidArgument,
    ShoalError,
    Unavailable,
    Unimplemented,
)

log = logging.getLogger(__name__)

R = TypeVar("R")

HTTP_STATUS: Mapping[Code, int] = {
    Code.CANCELLED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}
"""Status of HTTP by the code of an error. They are Triton's, where Triton has the error."""

JSON = b"application/json"
# Pieces of any size in which a body may come: a command may send it line by line. A million of them took 84 ms to join.
_MOST_PIECES = 10_000

_EVENTS = b"text/event-stream; charset=utf-8"
_REFUSALS = frozenset((b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"))
_ENCODINGS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
# Smaller responses are not compressed.
_COMPRESSED_BYTES = 1 << 10
# The fastest: 100 MB/s.
_LEVEL = 1
# Parses of smaller JSON hold too little memory to take turns.
_LARGE_JSON = 64 << 10


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response."""

    body: bytes = b""
    content_type: bytes = JSON
    status: int = 200
    fields: tuple[tuple[bytes, bytes], ...] = ()


def json_reply(document: Any, status: int = 200) -> Reply:
    """Return a response with a JSON document."""
    return Reply(orjson.dumps(document), JSON, status)


def health_reply(what: str, *, is_it: bool) -> Reply:
    """Return a response to a check: the status is Triton's, and the body, which Triton lacks, KServe's."""
    return json_reply({what: is_it}, 200 if is_it else 400)


class KnownHead:
    """Head of equal responses, by the class of their streams: encoded once for each."""

    __slots__ = ("_encoded", "content_type", "fields", "length")

    def __init__(self, content_type: bytes, fields: tuple[tuple[bytes, bytes], ...], length: int) -> None:
        """`length`: bytes of the body."""
        self.content_type = content_type
        self.fields = fields
        self.length = length
        self._encoded: dict[type[ServerStream], bytes] = {}

    def encoded(self, stream: ServerStream) -> bytes:
        """Return the head for a stream."""
        kind = type(stream)
        found = self._encoded.get(kind)
        if found is None:
            found = self._encoded[kind] = _encoded_head(stream, 200, self.content_type, self.fields, self.length)
        return found


Events = AsyncGenerator[bytes, None]
"""A streamed response: JSON documents, each sent as one event."""


class RestTable(CallTable, Protocol):
    """The part of an application that a call uses."""

    tracer: FastTracer | None
    auditing: Auditing | None
    """Audits acts; None: there is no audit log."""
    large_json: TenantLock
    """Held while a large JSON document exists as Python objects."""

    def operation(self, target: Target) -> Callable[[RestCall], Any]:
        """Return the coroutine function of an operation: it returns a Reply, or Events."""

    def start_fast(self, call: RestCall, body: bytes) -> bool:
        """Start a call on the fast path, and return True; False when the call needs a task. May raise."""


class RestCall(StreamMemory):
    """One call; the RequestHandler of its stream. Its body is whole before its operation begins."""

    is_task = False
    heartbeat = b""
    """Bytes that are sent when a streamed response has had no event for HEARTBEAT_S; empty: nothing is sent."""
    slow_s = tail_spans.SLOW_S
    """A call that succeeds and takes longer leaves a span; its operation may set another time."""

    def __init__(self, app: RestTable, stream: ServerStream, target: Target) -> None:
        self._app = app
        self._stream = stream
        self.target = target
        self.headers = stream.head.by_name
        self.deadline = math.inf
        """On the app's clock; infinite without one."""
        self._pieces: list[bytes] = []
        self.message_bytes = 0
        """Bytes of the body that have arrived."""
        self._task: asyncio.Task[None] | None = None
        self._refusal: ShoalError | None = None
        self.on_end: Callable[[], None] | None = None
        """Callback for a disconnected client, on the fast path."""
        self.is_over = self._has_begun = False
        self._began = 0.0
        """Start of the call's task, on the app's clock; 0: there is none."""
        self.span = None if app.tracer is None else app.tracer.begin(self.headers)

    # -- RequestHandler

    def data(self, piece: bytes, size: int, *, is_end: bool) -> None:
        """Keep a piece of the body. The operation begins with the last one."""
        if self.is_over:
            return
        if size and (size > SMALL_BODY or self._pieces or not is_end):
            if not self._stream.hold(size + PIECE_OVERHEAD):
                self._fail(no_memory())
                return
            self._stream.consumed(size)
        if piece:
            self._pieces.append(piece)
            self.message_bytes += len(piece)
            if self.message_bytes > self._app.message_bytes:
                self._fail(too_large(self.message_bytes, self._app.message_bytes))
                return
            if len(self._pieces) > _MOST_PIECES:
                try:
                    check_pieces(len(self._pieces), self.message_bytes, _MOST_PIECES)
                except ShoalError as err:
                    self._fail(err)
                    return
        if is_end:
            try:
                if len(self._pieces) == 1 and self._app.start_fast(self, self._pieces[0]):
                    return
            except BaseException as err:
                self.refuse(err)
                return
            self._start(self._call)

    def _start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the rest of the call in a task."""
        with self.span.current() if self.span is not None else contextlib.nullcontext():
            task = asyncio.create_task(self._run(work), name=self._stream.head.path)
        self._app.tasks.add(task)
        task.add_done_callback(self._app.tasks.discard)
        self._task = task
        self.is_task = True

    def stalled(self, idle_s: float) -> None:
        """End the call: its body does not arrive."""
        if not self.is_over:
            self._fail(stalled(idle_s))

    def disconnected(self) -> None:
        """Cancel the operation."""
        on_end, self.on_end = None if self.is_over else self.on_end, None
        self.is_over = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        elif on_end is not None:
            self._end_span(Code.CANCELLED)
            on_end()

    def end(self, error: ShoalError) -> None:
        """Cancel the operation, and end the call with `error`."""
        self._refusal = error
        if self._task is not None:
            self._task.cancel()

    # -- the form of errors and events

    @property
    def events_type(self) -> bytes:
        """Content type of a streamed response."""
        return _EVENTS

    def event(self, document: bytes) -> bytes:
        """Return an event of a streamed response."""
        return b"data: %b\n\n" % document

    def error_document(self, code: Code, message: str) -> bytes:
        """Return the JSON of an error."""
        return error_body(message)

    def last_event(self, code: Code, message: str) -> bytes:
        """Return the event of an error that ends a streamed response."""
        return self.event(self.error_document(code, message))

    # -- for operations

    @property
    def query(self) -> str:
        """The query of the request, without its question mark."""
        return self._stream.head.path.partition("?")[2]

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header; None without it. Raises InvalidArgument for one with several values."""
        head = self._stream.head
        if head.has_repeated_names and (count := len({*head.values(name)})) > 1:
            raise InvalidArgument(f"the header '{name.decode()}' has {count} different values: send it once")
        return head.by_name.get(name)

    def context(self) -> CallContext:
        """Return the context of a handler of gRPC that serves this call."""
        app, (host, port) = self._app, self._stream.peer
        return CallContext(self._stream.head.fields, f"{host}:{port}", self.deadline, app.clock, self)

    def handler(self, rpc: str) -> Any:
        """Return the grpc.RpcMethodHandler of an RPC of this server."""
        return self._app.methods[rpc]

    async def in_turn(self, steps: Steps[R]) -> R:
        """Return the result of heavy work, in the turns of the call's tenant."""
        return await self._app.heavy.run(self.headers.get(TENANT, b""), steps)

    @property
    def tenant(self) -> str:
        """The tenant: the verified caller's, else the one that the caller names."""
        access = self._app.access
        if access is None:
            return self.headers.get(TENANT, b"").decode("latin-1")
        caller = access.check_call(self.target.rpc, self.headers, self.target.model)
        return "" if caller is None else caller.tenant

    @property
    def limits(self) -> CallLimits | None:
        """The limits of the policy in which the call counts."""
        access = self._app.access
        return None if access is None else access.limits_of(self.headers.get(CALLER), self.target.model)

    def check(self, rpc: str, model: str | None) -> None:
        """Raise PermissionDenied or Unauthenticated when the caller may not call `rpc` for the model; None: for any."""
        if self._app.access is not None:
            self._app.access.check(rpc, self.headers.get(CALLER), model)

    def may_see(self, model: str) -> bool:
        """Return True when the caller may see the model in a list."""
        access = self._app.access
        return access is None or access.allows(self.target.rpc, self.headers.get(CALLER), model)

    async def body(self) -> bytes:
        """Return the body, joined and decompressed. Raises a ShoalError when it cannot be."""
        pieces, self._pieces = self._pieces, []
        size = self.message_bytes
        body = pieces[0] if len(pieces) == 1 else b""
        if len(pieces) > 1:
            self.hold(size)
            body = await self._worked(lambda: b"".join(pieces), is_long=size > JOIN_BYTES)
        # Several fields are one list (RFC 9110, section 5.3).
        encoding = b", ".join(self._stream.head.values(b"content-encoding") or [b"identity"]).lower()
        if encoding == b"identity":
            return body
        if encoding not in _ENCODINGS:
            raise Unimplemented("Unsupported compression type")
        plain = inflated_inline(body, encoding)
        if plain is not None:
            self.hold(len(plain))
            return plain
        limit = self._app.message_bytes
        self.hold(most_inflated(body, encoding, limit))
        return await self._worked(lambda: inflated(body, encoding, limit, lambda: self.is_over), is_long=True)

    async def _worked(self, work: Callable[[], bytes], *, is_long: bool) -> bytes:
        """Return the result of `work` on the body: in a thread when it is long."""
        if not is_long:
            return work()
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def deliver(result: bytes | BaseException) -> None:
            if done.done():
                return
            if isinstance(result, BaseException):
                done.set_exception(result)
            else:
                done.set_result(result)

        begun = self._app.threads.start(self.headers.get(TENANT, b""), work, deliver)
        try:
            return await done
        finally:
            begun.cancel()

    @contextlib.asynccontextmanager
    async def parsed(self, text: bytes) -> AsyncGenerator[Any, None]:
        """Yield the JSON document in `text`. Its objects are counted, and one large one exists at a time.

        Keep no reference to it after the block. Raises InvalidArgument for other text, for more than JSON_BYTES, and
        for a document that costs too much.
        """
        size = parsed_bytes(text)
        tenant = self.headers.get(TENANT, b"")
        async with self._app.large_json.held_by(tenant) if len(text) > _LARGE_JSON else contextlib.nullcontext():
            held = size if len(text) > SMALL_BODY else 0
            self.hold(held)
            try:
                if len(text) > UNSCANNED_BYTES:
                    yield await self.in_turn(long_lists.parse(text))
                else:
                    yield await parse_in_turn(self._app.heavy, tenant, PARSER, text)
            finally:
                self.release(held)

    # -- for the fast path

    def reply(self, head: KnownHead, body: bytes) -> None:
        """End the call with a response. Raises a ShoalError when it cannot be sent. Does nothing after the end."""
        if self.is_over:
            return
        self.on_end = None
        if len(body) >= _COMPRESSED_BYTES:
            if _accepted_encoding(self.headers):
                self._start(partial(self._reply, Reply(body, head.content_type, 200, head.fields)))
                return
            if len(body) > self._app.message_bytes:
                raise too_large(len(body), self._app.message_bytes)
            self.hold_response(len(body))
        stream = self._stream
        if not stream.has_room(len(body)):
            raise unread()
        self.is_over = True
        if self.span is not None:
            self._end_span()
        stream.respond(head.encoded(stream), body)

    def reply_later(self, write: Callable[[], Awaitable[Reply]]) -> None:
        """End the call with a response that a task writes."""

        async def written() -> None:
            await self._reply(await write())

        self._start(written)

    def keep_slow(self, seconds: float, about: Attributes = NO_ATTRIBUTES) -> None:
        """Keep the span of the call, which succeeds and took `seconds`, too long."""
        if self.span is None:
            tail_spans.slow(self.target.rpc, self.headers, self._app.access, seconds, {**self._about, **about})

    def refuse(self, error: BaseException, seconds: float = 0.0, about: Attributes = NO_ATTRIBUTES) -> None:
        """End the call with an error. Does nothing after the end. `seconds` and `about` are for its span."""
        if not self.is_over:
            self.on_end = None
            self._end_span(*self._refused(error, seconds, about))

    def _refused(
        self, error: BaseException, seconds: float = 0.0, about: Attributes = NO_ATTRIBUTES
    ) -> tuple[Code, str]:
        """Respond with an error; return its code and text for the span."""
        log_error(self.target.rpc, error)
        self._fail(error, seconds, about)
        # A traceback refers to frames, some of which refer to the exception: a reference cycle.
        error.__traceback__ = None
        return Code(status_of(error)[0].value[0]), str(error)

    def _end_span(self, code: Code = Code.OK, message: str = "") -> None:
        if self.span is not None and self._app.tracer is not None:
            tenant = tenant_of(self._app.access, self.headers)
            self._app.tracer.end(self.span, self.target.rpc, code, message, tenant)

    # -- the call

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        code, message = Code.OK, ""
        self._began = self._app.clock()
        # Of a fast call whose response needs a task. It refers to this call.
        self.on_end = None
        try:
            await work()
        except asyncio.CancelledError:
            if self.is_over:
                code = Code.CANCELLED
            else:
                error = self._refusal or Unavailable("this instance is stopping")
                code, message = error.code, error.message
                self._fail(error)
                if self._refusal is None:
                    raise
        # SystemExit, too: an exception of one call must not end the others.
        except BaseException as err:
            code, message = self._refused(err)
        finally:
            self._end_span(code, message)
            seconds = self._app.clock() - self._began
            if seconds > self.slow_s and code is Code.OK and not self._has_begun:
                self.keep_slow(seconds)

    async def _call(self) -> None:
        access = self._app.access
        if access is None:
            await self._admitted()
        else:
            with access.open_call(self.target.rpc, self.headers, self.end):
                await self._admitted()

    async def _admitted(self) -> None:
        clock = self._app.clock
        if self.target.model:
            self.check(self.target.rpc, self.target.model)
        self.deadline = status.deadline(self.headers, clock())
        left = None if self.deadline == math.inf else max(self.deadline - clock(), 0.0)
        try:
            async with asyncio.timeout(left):
                async with self._act():
                    found = await self._app.operation(self.target)(self)
                if isinstance(found, Reply):
                    await self._reply(found)
                else:
                    await self._stream_events(found)
        except TimeoutError:
            raise DeadlineExceeded("the deadline of the call has passed") from None

    def _act(self) -> AbstractAsyncContextManager[object]:
        """Return a block that is audited, when the operation is an act."""
        auditing, target = self._app.auditing, self.target
        if auditing is None or target.rpc not in AUDITED:
            return contextlib.nullcontext()
        address = self.headers.get(ADDRESS, b"").decode("latin-1")
        return auditing.act(target.rpc, self.headers.get(CALLER), address, target.model)

    async def _reply(self, reply: Reply) -> None:
        body, fields = reply.body, list(reply.fields)
        if len(body) > self._app.message_bytes:
            raise too_large(len(body), self._app.message_bytes)
        if len(body) >= _COMPRESSED_BYTES and (encoding := _accepted_encoding(self.headers)):
            plain, wbits = body, _ENCODINGS[encoding]
            self.hold_response(len(plain))
            body = await self._worked(lambda: _compressed(plain, wbits), is_long=len(plain) > INLINE_BYTES)
            fields.append((b"content-encoding", encoding))
        self._respond(reply.status, reply.content_type, body, fields)

    def _respond(
        self, status: int, content_type: bytes, body: bytes, fields: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        if self.is_over:
            return
        stream = self._stream
        if not stream.has_room(len(body)):
            raise unread()
        self.is_over = True
        stream.respond(_encoded_head(stream, status, content_type, fields or (), len(body)), sent_body(stream, body))

    async def _stream_events(self, events: Events) -> None:
        stream = self._stream
        heartbeats = Heartbeats(stream, self.heartbeat)
        try:
            async with aclosing(events):
                async for event in events:
                    if not self._has_begun:
                        self._has_begun = True
                        head = [(b"content-type", self.events_type), (b"cache-control", b"no-store")]
                        stream.start(stream.encode_head(200, head))
                    heartbeats.stop()
                    await self._send(self.event(event))
                    del event
                    heartbeats.start()
        finally:
            heartbeats.stop()
        if self._has_begun:
            self.is_over = True
            stream.end()
        else:
            self._respond(200, self.events_type, b"")

    async def _send(self, data: bytes) -> None:
        if not self._stream.has_room(len(data)):
            raise unread()
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stream.send(data, lambda: None if sent.done() else sent.set_result(None))
        await sent

    def _fail(self, error: BaseException, seconds: float = 0.0, about: Attributes = NO_ATTRIBUTES) -> None:
        """End the call with an error: as a response, or as the last event of one that has begun."""
        if self.is_over:
            return
        self._pieces = []
        grpc_code, message, trailing = status_of(error)
        code = Code(grpc_code.value[0])
        stream = self._stream
        self.is_over = True
        if self._has_begun:
            stream.send(self.last_event(code, message))
            stream.end()
            return
        body = self.error_document(code, message)
        http_status = HTTP_STATUS[code]
        fields = error_fields(http_status, trailing)
        if trace_id := self._trace_of(error, code, message, seconds, about):
            fields.append((TRACE_KEY.encode(), trace_id.encode()))
        head = [(b"content-type", JSON), *fields, (b"content-length", b"%d" % len(body))]
        stream.respond(stream.encode_head(http_status, head), sent_body(stream, body))

    @property
    def _about(self) -> Attributes:
        return {MODEL: self.target.model} if self.target.model else NO_ATTRIBUTES

    def _trace_of(self, error: BaseException, code: Code, message: str, seconds: float, about: Attributes) -> str:
        """Return the trace that the error of the call names, and keep a span of it; an empty text: none."""
        if self.span is not None:
            return self.span.trace_id if code in FAILURES else ""
        if self._began:
            seconds = self._app.clock() - self._began
        text = message if isinstance(error, ShoalError) else type(error).__name__
        return tail_spans.failed(
            self.target.rpc,
            self.headers,
            self._app.access,
            code,
            text,
            seconds=seconds,
            attributes={**self._about, **about},
            cause=getattr(error, "trace_id", ""),
        )


def _encoded_head(
    stream: ServerStream, status: int, content_type: bytes, fields: Iterable[tuple[bytes, bytes]], length: int
) -> bytes:
    return stream.encode_head(status, [(b"content-type", content_type), *fields, (b"content-length", b"%d" % length)])


def sent_body(stream: ServerStream, body: bytes) -> bytes:
    """Return what follows the head of a response with `body`: nothing for HEAD (RFC 9110, section 9.3.2).

    A client would end the stream at a body, and Envoy the connection.
    """
    return b"" if stream.head.method == "HEAD" else body


def error_body(message: str) -> bytes:
    """Return the JSON of an error, in Triton's form."""
    return orjson.dumps({"error": message.encode(errors="replace").decode()})


def error_fields(http_status: int, trailing: Iterable[tuple[str, str]] = ()) -> list[tuple[bytes, bytes]]:
    """Return the headers of an error's response; `trailing` is the metadata of its gRPC status."""
    fields = [(name.encode(), value.encode()) for name, value in trailing]
    if http_status == 401:
        fields.append((b"www-authenticate", b"Bearer"))
    return fields


def accepted(header: bytes) -> Iterator[bytes]:
    """Yield the names in a header such as Accept, in small letters; none of weight 0 (RFC 9110, section 12.4.2)."""
    for part in header.lower().split(b","):
        name, *parameters = part.split(b";")
        if _REFUSALS.isdisjoint(parameter.replace(b" ", b"") for parameter in parameters):
            yield name.strip()


def _accepted_encoding(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the first supported compression that a request accepts; None without one."""
    return next((name for name in accepted(headers.get(b"accept-encoding", b"")) if name in _ENCODINGS), None)


def _compressed(body: bytes, wbits: int) -> bytes:
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, wbits)
    return stream.compress(body) + stream.flush()


def header_length(call: RestCall, size: int) -> int | None:
    """Return the bytes of JSON before the binary tensors of a body; None for a body of JSON alone.

    Raises:
        InvalidArgument: the header is no number from 0 to the size of the body, or is there with several values.
    """
    given = call.header(b"inference-header-content-length")
    if given is None:
        return None
    length = int(given) if given.isdigit() and len(given) < 20 else -1
    if not 0 <= length <= size:
        shown = given[:40].decode("latin-1")
        raise InvalidArgument(f"inference header size should be in range (0, {size}), got: {shown}")
    return length
