"""Interceptors of all calls: spans, and the translation of errors.

Incoming calls: a handler's ShoalError becomes its gRPC status. Any other exception is a fault: the log gets all of it,
the caller a fixed text. Outgoing calls: the trace is sent along, and a status becomes a ShoalError (`translated`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token
from typing import Any, TypeAlias

import grpc
from opentelemetry import context, propagate, trace
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode

from mesh.process.kept_spans import TENANT
from mesh.rpc.access import Access, tenant_of
from mesh.rpc.client.request import trace_metadata
from shoal.access.caller_header import CALLER_HEADER
from shoal.errors import (
    TRACE_KEY,
    Code,
    ResourceExhausted,
    ShoalError,
    Unimplemented,
    from_status,
    retry_after_of,
    retry_metadata,
    trace_of,
)
from shoal.tenant_header import TENANT_HEADER

log = logging.getLogger(__name__)

_STATUS = {status.value[0]: status for status in grpc.StatusCode}
# Every Envoy checks the health twice a second: spans of health checks would outnumber all others.
UNTRACED = ("/grpc.health.v1.Health/", "/envoy.service.discovery.v3.", "/grpc.reflection.")
"""Beginnings of the paths of calls without spans."""
FAILURES = frozenset(
    {
        Code.UNKNOWN,
        Code.DEADLINE_EXCEEDED,
        Code.RESOURCE_EXHAUSTED,
        Code.INTERNAL,
        Code.UNAVAILABLE,
        Code.DATA_LOSS,
    }
)
"""Statuses that are the server's doing or its limits': the caller learns the trace of a call that ends with one. The
others are the caller's doing, and their message says all."""
_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNKNOWN)

PATH = "shoal.path"
"""Attribute of server spans: `fast` or `slow`, the path that the call took."""
_SPAN_ATTRIBUTES = {"rpc.system": "grpc", PATH: "slow"}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return the gRPC status code, message and trailing metadata that a caller receives for `error`."""
    if isinstance(error, ShoalError):
        return _STATUS[int(error.code)], _truncated(error.message), retry_metadata(error) + error.trailing
    return grpc.StatusCode.INTERNAL, "internal error: the log of the service has the cause", ()


# Messages of so few characters always fit.
_SHORT_CHARS = 500
# Clients reject trailers of more than 8 to 16 KiB, and the caller would not even see the status code.
_MESSAGE_BYTES = 6_000


def _truncated(message: str) -> str:
    """Return the beginning of `message` that fits into a trailer, where percent-encoding makes three bytes of one."""
    if len(message) <= _SHORT_CHARS:
        return message
    written = 0
    for number, char in enumerate(message):
        is_plain = char.isascii() and char.isprintable() and char != "%"
        written += 1 if is_plain else 3 * len(char.encode(errors="replace"))
        if written > _MESSAGE_BYTES:
            return message[:number] + " ..."
    return message


def translate(error: grpc.RpcError, action: str = "") -> ShoalError:
    """Return the ShoalError of a failed call; `action` opens its message."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return from_status(Code.UNKNOWN, f"{action}: {error}" if action else str(error))
    trailing = error.trailing_metadata() or ()
    details = error.details() or "no details"
    message = f"{action}: {details}" if action else details
    found = from_status(error.code().value[0], message, retry_after_ms=retry_after_of(trailing))
    found.trace_id = trace_of(trailing)
    return found


@contextmanager
def translated(action: str = "") -> Iterator[None]:
    """Raise failures of calls inside the block as ShoalError, with their cause."""
    try:
        yield
    except grpc.RpcError as err:
        raise translate(err, action) from err


def sampled_span() -> SpanContext | None:
    """Return the context of this call's span in a sampled trace; None when this process makes no span of the call."""
    found = trace.get_current_span().get_span_context()
    # Without a span here, the current one is the caller's.
    return found if found.is_valid and found.trace_flags.sampled and not found.is_remote else None


class ServerInterceptor:
    """Wraps all methods of a server on the slow path: spans, and errors as statuses.

    The interceptor also records the open streams, so that a stop does not wait for idle ones: `end_idle_streams`.
    """

    def __init__(
        self, audit: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None, access: Access | None = None
    ) -> None:
        """Wrap methods; `audit` wraps the behaviour of a method before (mesh.rpc.auditing). `access` knows callers."""
        self._audit = audit
        self._access = access
        self._tracer = trace.get_tracer("shoal")
        self._streams: dict[asyncio.Task[Any], float] = {}
        self._ended: set[asyncio.Task[Any]] = set()

    def end_idle_streams(self, idle_s: float) -> int:
        """End streams that sent nothing for `idle_s` with UNAVAILABLE: clients reconnect. Return their number."""
        before = asyncio.get_running_loop().time() - idle_s
        idle = [task for task, last in self._streams.items() if last <= before and task not in self._ended]
        self._ended.update(idle)
        for task in idle:
            task.cancel()
        return len(idle)

    def _tenant_of(self, headers: Mapping[str, str]) -> str:
        named = [name for name in (CALLER_HEADER, TENANT_HEADER) if name in headers]
        return tenant_of(self._access, {name.encode(): headers[name].encode("latin-1", "replace") for name in named})

    def wrap(self, method: str, handler: Any) -> Any:
        """Return the wrapped handler of `method` (`/package.Service/Method`), of the same kind as `handler`."""
        kind = "_".join("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
        behaviour = getattr(handler, kind)
        if not inspect.iscoroutinefunction(behaviour) and not inspect.isasyncgenfunction(behaviour):
            # Our methods are all asynchronous: this is the default of the generated base class.
            behaviour = _unimplemented(method)
        elif self._audit is not None:
            behaviour = self._audit(method, behaviour)
        wrap = self._stream if inspect.isasyncgenfunction(behaviour) else self._single
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer)

    def _single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> Any:
            with self._span(method, ctx) as span:
                try:
                    return await behaviour(request, ctx)
                except (asyncio.CancelledError, grpc.aio.AbortError):
                    raise
                # SystemExit, too: an exception of one call must not end the others.
                except BaseException as err:
                    await _reject(method, err, ctx, span)

        return call

    def _stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> AsyncIterator[Any]:
            task = asyncio.current_task()
            # Every call on the slow path has a task.
            assert task is not None
            clock = asyncio.get_running_loop().time
            self._streams[task] = clock()
            with self._span(method, ctx) as span:
                try:
                    async for response in behaviour(request, ctx):
                        yield response
                        del response
                        self._streams[task] = clock()
                except asyncio.CancelledError:
                    if task not in self._ended:
                        raise
                    task.uncancel()
                    await ctx.abort(grpc.StatusCode.UNAVAILABLE, "this instance is stopping: open the stream again")
                except (grpc.aio.AbortError, GeneratorExit):
                    raise
                except BaseException as err:
                    await _reject(method, err, ctx, span)
                finally:
                    self._streams.pop(task, None)
                    self._ended.discard(task)

        return call

    @contextmanager
    def _span(self, method: str, ctx: Context) -> Iterator[Span]:
        if method.startswith(UNTRACED):
            yield trace.INVALID_SPAN
            return
        carrier = {key: value for key, value in ctx.invocation_metadata() or () if isinstance(value, str)}
        parent = propagate.extract(carrier)
        span = self._tracer.start_span(method.lstrip("/"), parent, SpanKind.SERVER, _SPAN_ATTRIBUTES)
        if span.is_recording() and (tenant := self._tenant_of(carrier)):
            span.set_attribute(TENANT, tenant)
        try:
            with attached(trace.set_span_in_context(span, parent)):
                yield span
        finally:
            span.end()


@contextmanager
def attached(current: context.Context) -> Iterator[None]:
    """Make a context of traces the current one in the block, which may be a part of an async generator."""
    token: Token[context.Context] | None = context.attach(current)
    try:
        yield
    except GeneratorExit:
        # The stream was closed from another task, whose context must stay as it is.
        token = None
        raise
    finally:
        if token is not None:
            context.detach(token)


def _unimplemented(method: str) -> Callable[..., Awaitable[Any]]:
    async def refuse(request: Any, ctx: Context) -> Any:
        raise Unimplemented(f"this server does not implement {method}")

    return refuse


async def _reject(method: str, error: BaseException, ctx: Context, span: Span) -> None:
    if isinstance(error, grpc.aio.AioRpcError):
        error = translate(error, f"{method} called another service")
    code, message, trailing = status_of(error)
    log_error(method, error)
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if not isinstance(error, ShoalError):
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        span.record_exception(error)
    elif code in _FAULTS:
        span.set_status(Status(StatusCode.ERROR, message))
    if span.is_recording() and code.value[0] in FAILURES:
        trailing += ((TRACE_KEY, f"{span.get_span_context().trace_id:032x}"),)
    elif isinstance(error, ShoalError):
        ctx.cause = error.trace_id  # type: ignore[attr-defined]
    await ctx.abort(code, message, trailing)


def log_error(method: str, error: BaseException) -> None:
    """Log the error of a call of `method`: unexpected errors and faults as errors, others at INFO or DEBUG."""
    code, message, _ = status_of(error)
    if not isinstance(error, ShoalError):
        log.error("unexpected error in %(method)s", {"event": "call.method_failed", "method": method}, exc_info=error)
    elif code in _FAULTS:
        log.error(
            "%(method)s failed: %(error)s", {"event": "call.failed", "method": method, "error": message}, exc_info=error
        )
    else:
        level = logging.INFO if isinstance(error, ResourceExhausted) else logging.DEBUG
        log.log(
            level,
            "%(method)s refused with %(code)s: %(reason)s",
            {"event": "call.refused", "method": method, "code": code.name, "reason": message},
        )


def _with_trace(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    carrier = trace_metadata()
    if not carrier:
        return details
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    for key, value in carrier.items():
        metadata.add(key, value)
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _Traced:
    """Base class of the client interceptors: sends the current trace as metadata."""

    async def _with_current_trace(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        return await continuation(_with_trace(details), request)


class _UnaryUnary(_Traced, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._with_current_trace(continuation, client_call_details, request)


class _UnaryStream(_Traced, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._with_current_trace(continuation, client_call_details, request)


class _StreamUnary(_Traced, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._with_current_trace(continuation, client_call_details, request_iterator)


class _StreamStream(_Traced, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._with_current_trace(continuation, client_call_details, request_iterator)


def client_interceptors() -> Sequence[grpc.aio.ClientInterceptor]:
    """Return the interceptors of a channel, one for each kind of call."""
    return [_UnaryUnary(), _UnaryStream(), _StreamUnary(), _StreamStream()]
