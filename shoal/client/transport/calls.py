"""One transport to a node, and every call on it: with a deadline, retries, a span, and errors that say what to do."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from shoal.client.transport.address import is_local
from shoal.client.transport.failures import bounded, explain, too_late
from shoal.client.transport.grpc_aio import GrpcAio
from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.retry import RetryPolicy
from shoal.client.transport.transport import Bidi, Transport
from shoal.errors import FailedPrecondition, Internal, InvalidArgument, ShoalError, Unavailable

Headers: TypeAlias = Mapping[str, str]

_HEADER = re.compile(r"^(?!grpc-)[a-z0-9][a-z0-9_.-]*(?<!-bin)$")


class Caller:
    """Calls methods of the node at `address`. The connection opens with the first call; `close()` ends it.

    `clock`, `sleep` and `draw` are the world that retries live in; tests bring their own.
    """

    def __init__(
        self,
        address: str,
        *,
        retry: RetryPolicy | None = None,
        headers: Headers | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.address = address
        self.clock = clock
        self._retry = retry or RetryPolicy()
        self._headers = _checked(headers or {})
        self._sleep = sleep
        self._draw = draw
        self._tracer = trace.get_tracer("shoal.client")
        self._open: Transport | None = None
        self._closed = False

    async def close(self) -> None:
        """Ends the connection: calls in flight are cancelled, later ones refused."""
        self._closed = True
        if self._open is not None:
            await self._open.close()

    async def call(
        self,
        method: Method[Q, R],
        request: Q,
        *,
        timeout_s: float,
        doing: str = "",
        headers: Headers | None = None,
        idempotent: bool | None = None,
    ) -> R:
        """One answer to one request, tried again as the policy allows within `timeout_s`.

        Raises:
            ShoalError: of the class that the service meant.
        """
        doing = doing or method.name
        timeout_s = bounded(timeout_s)
        deadline = self.clock() + timeout_s
        repeatable = method.idempotent if idempotent is None else idempotent
        with self._span(method) as (span, metadata):
            metadata += _checked(headers or {})
            for attempt in range(1, self._retry.attempts + 1):
                try:
                    left_s = max(deadline - self.clock(), 0)
                    return await self._transport().unary(method, request, timeout_s=left_s, metadata=metadata)
                except grpc.aio.AioRpcError as err:
                    error = explain(err, address=self.address, doing=doing, timeout_s=timeout_s)
                    wait = self._wait_s(error, attempt, repeatable, deadline)
                    if wait is None:
                        raise error from err
                    span.add_event("retry", {"attempt": attempt, "code": error.code.name, "wait_s": wait})
                await self._sleep(wait)
        raise AssertionError("the policy ends the loop")  # pragma: no cover

    def stream_wait_s(
        self, error: ShoalError, *, attempt: int, begun: bool, deadline: float | None = None
    ) -> float | None:
        """Seconds until a stream that broke is opened again; None: it is not. `begun`: it had moved before."""
        return self._wait_s(error, attempt, True, deadline, stream=begun)

    def _wait_s(
        self, error: ShoalError, attempt: int, idempotent: bool, deadline: float | None, stream: bool = False
    ) -> float | None:
        left = None if deadline is None else deadline - self.clock()
        return self._retry.wait_s(
            error, attempt=attempt, idempotent=idempotent, left_s=left, draw=self._draw, stream=stream
        )

    async def pause(self, seconds: float) -> None:
        """Waits."""
        await self._sleep(seconds)

    async def upload(self, method: Method[Q, R], requests: AsyncIterator[Q], *, timeout_s: float, doing: str = "") -> R:
        """One answer to a stream of requests, tried once: what is to be sent again only the caller knows."""
        timeout_s = bounded(timeout_s)
        with self._span(method) as (_, metadata), self.translated(doing or method.name, timeout_s):
            call = self._transport().stream(method, requests, timeout_s=timeout_s, metadata=metadata)
            try:
                answers = [answer async for answer in call]
            finally:
                call.cancel()
        if len(answers) != 1:
            raise Internal(f"{doing or method.name}: {len(answers)} answers came to a call that has one")
        return answers[0]

    async def stream(
        self, method: Method[Q, R], request: Q, *, timeout_s: float, doing: str = ""
    ) -> AsyncGenerator[R, None]:
        """The answers to one request, until the service ends the stream; tried once."""
        timeout_s = bounded(timeout_s)
        with self._span(method) as (_, metadata), self.translated(doing or method.name, timeout_s):
            call = self._transport().stream(method, request, timeout_s=timeout_s, metadata=metadata)
            try:
                async for answer in call:
                    yield answer
            finally:
                call.cancel()

    async def follow(
        self,
        method: Method[Q, R],
        request: Callable[[], Q],
        *,
        timeout_s: float,
        ended: Callable[[R], bool],
        doing: str = "",
    ) -> AsyncGenerator[R, None]:
        """Like `stream`, but opened again when it breaks or ends early, until `ended(answer)`.

        `request()` is asked for each time, so that the caller can go on where it was.

        Raises:
            ShoalError: it cannot be opened again, or `timeout_s` has passed.
        """
        deadline = self.clock() + bounded(timeout_s)
        attempt, begun = 0, False
        while True:
            try:
                left = max(deadline - self.clock(), 0)
                async with aclosing(self.stream(method, request(), timeout_s=left, doing=doing)) as answers:
                    async for answer in answers:
                        attempt, begun = 0, True
                        yield answer
                        if ended(answer):
                            return
                error: ShoalError = Unavailable(f"{doing or method.name}: the stream ended early")
            except ShoalError as err:
                error = err
            attempt += 1
            wait = self.stream_wait_s(error, attempt=attempt, begun=begun, deadline=deadline)
            if wait is None:
                if self.clock() >= deadline:
                    raise too_late(doing or method.name, timeout_s) from error
                raise error
            await self._sleep(wait)

    @contextmanager
    def bidi(
        self,
        method: Method[Q, R],
        requests: AsyncIterator[Q],
        *,
        timeout_s: float | None,
        headers: Headers | None = None,
    ) -> Iterator[Bidi[R]]:
        """A stream of requests and a stream of answers. Its end, and every failure, cancels what is left of it."""
        with self._span(method) as (_, metadata):
            metadata += _checked(headers or {})
            call = self._transport().stream(method, requests, timeout_s=timeout_s, metadata=metadata)
            try:
                with self.translated(method.name, timeout_s or 0):
                    yield call
            finally:
                call.cancel()

    @contextmanager
    def translated(self, doing: str, timeout_s: float) -> Iterator[None]:
        """Raises a call's failure inside the block as the ShoalError that explains it."""
        try:
            yield
        except grpc.aio.AioRpcError as err:
            raise explain(err, address=self.address, doing=doing, timeout_s=timeout_s) from err

    def _transport(self) -> Transport:
        if self._closed:
            raise FailedPrecondition("this client is closed: make a new one")
        if self._open is None:
            self._open = _opened(self.address)
        return self._open

    @contextmanager
    def _span(self, method: Method[Any, Any]) -> Iterator[tuple[Span, tuple[tuple[str, str], ...]]]:
        """A client span, and the metadata that carries it along. Not made current: a stream outlives a context."""
        service, _, name = method.path.strip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "server.address": self.address}
        span = self._tracer.start_span(f"{service}/{name}", kind=SpanKind.CLIENT, attributes=attributes)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span))
        try:
            yield span, (*self._headers, *carrier.items())
        except ShoalError as err:
            span.set_attribute("rpc.grpc.status_code", int(err.code))
            span.set_status(Status(StatusCode.ERROR, err.message))
            raise
        finally:
            span.end()


def _opened(address: str) -> Transport:
    """What carries calls to `address`. It connects with the first of them, on the event loop that runs now."""
    if is_local(address):
        from shoal.client.transport.local_h2 import Lean  # Its import takes 23 ms, which others need not wait for.

        return Lean(address)
    return GrpcAio(address)


def _checked(headers: Headers) -> tuple[tuple[str, str], ...]:
    for key, value in headers.items():
        if not _HEADER.match(key):
            allowed = "lower-case letters, digits, `-`, `_`, `.`; not `grpc-...`, not `...-bin`"
            raise InvalidArgument(f"header {key!r}: use {allowed}")
        if not value.isascii() or not value.isprintable():
            raise InvalidArgument(f"header {key!r}: its value must be printable ASCII")
    return tuple(headers.items())
