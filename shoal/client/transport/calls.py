"""Caller: all RPCs to one node, each with a deadline, retries, a trace span, and errors that say what to do."""

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
from shoal.client.transport.failures import bounded, explain, timed_out
from shoal.client.transport.grpc_aio import GrpcAio
from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.retry import RetryPolicy
from shoal.client.transport.transport import Bidi, Transport
from shoal.errors import FailedPrecondition, Internal, InvalidArgument, ShoalError, Unavailable

Headers: TypeAlias = Mapping[str, str]

_HEADER = re.compile(r"^(?!grpc-)[a-z0-9][a-z0-9_.-]*(?<!-bin)$")


class Caller:
    """RPC caller of the node at `address`. The connection opens with the first call; `close()` ends it.

    `clock`, `sleep` and `draw` are injected for the tests of retries.
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
        self._headers = _validated(headers or {})
        self._sleep = sleep
        self._draw = draw
        self._tracer = trace.get_tracer("shoal.client")
        self._opened_transport: Transport | None = None
        self._closed = False

    async def close(self) -> None:
        """Close the connection. Calls in flight are cancelled, later calls raise FailedPrecondition."""
        self._closed = True
        if self._opened_transport is not None:
            await self._opened_transport.close()

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
        """Make a unary call and return its response; retry as the policy allows within `timeout_s`.

        Raises:
            ShoalError: the class follows the service's status code.
        """
        doing = doing or method.name
        timeout_s = bounded(timeout_s)
        deadline = self.clock() + timeout_s
        repeatable = method.idempotent if idempotent is None else idempotent
        with self._span(method) as (span, metadata):
            metadata += _validated(headers or {})
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
        """Return the seconds until a broken stream is reopened, or None to give up. `begun`: it had made progress."""
        return self._wait_s(error, attempt, True, deadline, stream=begun)

    def _wait_s(
        self, error: ShoalError, attempt: int, idempotent: bool, deadline: float | None, stream: bool = False
    ) -> float | None:
        left = None if deadline is None else deadline - self.clock()
        return self._retry.wait_s(
            error, attempt=attempt, idempotent=idempotent, left_s=left, draw=self._draw, stream=stream
        )

    async def pause(self, seconds: float) -> None:
        """Sleep for `seconds`."""
        await self._sleep(seconds)

    async def upload(self, method: Method[Q, R], requests: AsyncIterator[Q], *, timeout_s: float, doing: str = "") -> R:
        """Send a stream of requests and return the response; no retry: only the caller can repeat the requests."""
        timeout_s = bounded(timeout_s)
        with self._span(method) as (_, metadata), self.converted_errors(doing or method.name, timeout_s):
            call = self._transport().stream(method, requests, timeout_s=timeout_s, metadata=metadata)
            try:
                responses = [response async for response in call]
            finally:
                call.cancel()
        if len(responses) != 1:
            raise Internal(f"{doing or method.name}: received {len(responses)} responses, expected 1")
        return responses[0]

    async def stream(
        self, method: Method[Q, R], request: Q, *, timeout_s: float, doing: str = ""
    ) -> AsyncGenerator[R, None]:
        """Yield the responses to one request until the service ends the stream; no retry."""
        timeout_s = bounded(timeout_s)
        with self._span(method) as (_, metadata), self.converted_errors(doing or method.name, timeout_s):
            call = self._transport().stream(method, request, timeout_s=timeout_s, metadata=metadata)
            try:
                async for response in call:
                    yield response
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
        """Yield responses like `stream`, and reopen the stream when it breaks or ends early, until `ended(response)`.

        `request()` makes the request of each stream, so that a caller can continue from its last response.

        Raises:
            ShoalError: the stream cannot be reopened, or `timeout_s` has passed.
        """
        deadline = self.clock() + bounded(timeout_s)
        attempt, begun = 0, False
        while True:
            try:
                left = max(deadline - self.clock(), 0)
                async with aclosing(self.stream(method, request(), timeout_s=left, doing=doing)) as responses:
                    async for response in responses:
                        attempt, begun = 0, True
                        yield response
                        if ended(response):
                            return
                error: ShoalError = Unavailable(f"{doing or method.name}: the stream ended early")
            except ShoalError as err:
                error = err
            attempt += 1
            wait = self.stream_wait_s(error, attempt=attempt, begun=begun, deadline=deadline)
            if wait is None:
                if self.clock() >= deadline:
                    raise timed_out(doing or method.name, timeout_s) from error
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
        """Open a bidirectional stream; leaving the block, also by an error, cancels the rest of the call."""
        with self._span(method) as (_, metadata):
            metadata += _validated(headers or {})
            call = self._transport().stream(method, requests, timeout_s=timeout_s, metadata=metadata)
            try:
                with self.converted_errors(method.name, timeout_s or 0):
                    yield call
            finally:
                call.cancel()

    @contextmanager
    def converted_errors(self, doing: str, timeout_s: float) -> Iterator[None]:
        """Convert a failed call inside the block to its ShoalError."""
        try:
            yield
        except grpc.aio.AioRpcError as err:
            raise explain(err, address=self.address, doing=doing, timeout_s=timeout_s) from err

    def _transport(self) -> Transport:
        if self._closed:
            raise FailedPrecondition("this client is closed: create a new one")
        if self._opened_transport is None:
            self._opened_transport = _transport_to(self.address)
        return self._opened_transport

    @contextmanager
    def _span(self, method: Method[Any, Any]) -> Iterator[tuple[Span, tuple[tuple[str, str], ...]]]:
        """Yield a client span and its metadata. The span is not made current: a stream may outlive the context."""
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


def _transport_to(address: str) -> Transport:
    """Return a transport to `address`; it connects at the first call, on the running event loop."""
    if is_local(address):
        # Imported here: the import takes 23 ms, which clients of other machines save.
        from shoal.client.transport.local_h2 import LocalH2

        return LocalH2(address)
    return GrpcAio(address)


def _validated(headers: Headers) -> tuple[tuple[str, str], ...]:
    for key, value in headers.items():
        if not _HEADER.match(key):
            allowed = "lower-case letters, digits, `-`, `_`, `.`; not `grpc-...`, not `...-bin`"
            raise InvalidArgument(f"header {key!r}: use {allowed}")
        if not value.isascii() or not value.isprintable():
            raise InvalidArgument(f"header {key!r}: its value must be printable ASCII")
    return tuple(headers.items())
