"""Caller: all RPCs to one node, each with a deadline, retries, a trace span, and errors that say what to do."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeAlias

import grpc
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from shoal.client.transport import forks, grpc_aio
from shoal.client.transport.address import is_local
from shoal.client.transport.deadline import Deadline, Timeout
from shoal.client.transport.failures import explain, timed_out
from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.retry import RetryPolicy
from shoal.client.transport.security import Security
from shoal.client.transport.transport import Bidi, Transport
from shoal.errors import FailedPrecondition, Internal, InvalidArgument, ShoalError, Unavailable
from shoal.tenant_header import TENANT_HEADER, header_value

Headers: TypeAlias = Mapping[str, str]

"""Header that names the tenant of a call."""

_TOKEN_HEADER = "authorization"
_HEADER = re.compile(r"^(?!grpc-)[a-z0-9][a-z0-9_.-]*(?<!-bin)$")


class Caller:
    """RPC caller of the node at `address`. The connection opens with the first call; `close()` ends it.

    Each event loop that makes calls has its own connection, and so has a forked child. Every call carries `headers`,
    `tenant` in TENANT_HEADER, and `token` as `authorization`. `security` None: plaintext, in which a token goes to
    another machine only with `plaintext_token`. `is_near`: the node is on this machine, whatever its address is.
    `clock`, `sleep` and `draw` are injected for the tests of retries.
    """

    def __init__(
        self,
        address: str,
        *,
        retry: RetryPolicy | None = None,
        headers: Headers | None = None,
        tenant: str = "",
        token: str = "",
        plaintext_token: bool = False,
        security: Security | None = None,
        is_near: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.address = address
        self.clock = clock
        if not isinstance(retry, RetryPolicy | None):
            raise InvalidArgument(f"retry: expected a RetryPolicy, such as RetryPolicy(attempts=3), got {retry!r}")
        self._retry = retry or RetryPolicy()
        self._security = security
        self._is_near = is_near
        self._may_send_token = plaintext_token or security is not None or is_near or is_local(address)
        named = {TENANT_HEADER: header_value(_validated_tenant(tenant))} if tenant else {}
        bearer = {_TOKEN_HEADER: f"Bearer {_validated_token(token)}"} if token != "" else {}
        self._headers = self._sendable({**named, **bearer, **_validated(headers or {})})
        self.url = address if security is None else f"https://{address}"
        self._sleep = sleep
        self._draw = draw
        self._tracer = trace.get_tracer("shoal.client")
        self._transports: dict[asyncio.AbstractEventLoop, Transport] = {}
        # The entry of the last call: nearly all clients have one event loop.
        self._last_used: tuple[asyncio.AbstractEventLoop, Transport] | None = None
        self._closed = False
        forks.renew_in_child(self)

    async def close(self) -> None:
        """Close the connections. Calls in flight are cancelled, later calls raise FailedPrecondition."""
        self._closed, self._last_used = True, None
        transports, self._transports = self._transports, {}
        here = transports.pop(asyncio.get_running_loop(), None)
        for loop, transport in transports.items():
            # RuntimeError: the loop has ended, and the connection with it.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_close_on_its_loop, loop, transport)
        if here is not None:
            await here.close()

    def after_fork(self) -> None:
        """Leave the connections to the parent, in a forked child. The next call opens another one."""
        for transport in self._transports.values():
            transport.leave_to_parent()
        forks.keep(self._transports)
        self._transports, self._last_used = {}, None

    def _sendable(self, headers: Headers) -> Headers:
        """Return the headers. Raises InvalidArgument when their token would be sent to another machine in plaintext."""
        if _TOKEN_HEADER in headers and not self._may_send_token:
            raise InvalidArgument(
                f"the token is not sent to {self.address} in plaintext: use https://{self.address}; or "
                "plaintext_token=True, where nobody on the way is to be feared"
            )
        return headers

    def deadline(self, timeout_s: Timeout) -> Deadline:
        """Return the deadline of a method that makes several calls, for all of these. Raises InvalidArgument."""
        return timeout_s if isinstance(timeout_s, Deadline) else Deadline.after(timeout_s, self.clock())

    def _left_s(self, deadline: Deadline, doing: str) -> float | None:
        """Return the seconds that are left. Raises DeadlineExceeded at the end: grpc would begin the call."""
        left_s = deadline.left_s(self.clock())
        if left_s is not None and left_s <= 0:
            raise timed_out(doing, deadline.timeout_s)
        return left_s

    async def call(
        self,
        method: Method[Q, R],
        request: Q,
        *,
        timeout_s: Timeout,
        doing: str = "",
        headers: Headers | None = None,
        idempotent: bool | None = None,
        retries: int | None = None,
    ) -> R:
        """Make a unary call and return its response; retry as the policy allows within `timeout_s`.

        `retries` replaces the policy's number of attempts; it never repeats a call that is not idempotent.

        Raises:
            ShoalError: the class follows the service's status code.
        """
        doing = doing or method.name
        deadline = self.deadline(timeout_s)
        repeatable = method.idempotent if idempotent is None else idempotent
        policy = self._retry if retries is None else replace(self._retry, attempts=_validated_retries(retries) + 1)
        with self._span(method, headers) as (span, metadata):
            attempt = 0
            while True:
                attempt += 1
                try:
                    left_s = self._left_s(deadline, doing)
                    return await self._transport().unary(method, request, timeout_s=left_s, metadata=metadata)
                except grpc.aio.AioRpcError as err:
                    error = explain(err, address=self.url, doing=doing, timeout_s=deadline.timeout_s)
                    wait = self._wait_s(policy, error, attempt, repeatable, deadline)
                    if wait is None:
                        raise error from err
                    span.add_event("retry", {"attempt": attempt, "code": error.code.name, "wait_s": wait})
                await self._sleep(wait)

    def stream_wait_s(
        self, error: ShoalError, *, attempt: int, begun: bool, deadline: Deadline | None = None
    ) -> float | None:
        """Return the seconds until a broken stream is reopened, or None to give up. `begun`: it had made progress."""
        return self._wait_s(self._retry, error, attempt, True, deadline, stream=begun)

    def _wait_s(
        self,
        policy: RetryPolicy,
        error: ShoalError,
        attempt: int,
        idempotent: bool,
        deadline: Deadline | None,
        stream: bool = False,
    ) -> float | None:
        left = None if deadline is None else deadline.left_s(self.clock())
        return policy.wait_s(error, attempt=attempt, idempotent=idempotent, left_s=left, draw=self._draw, stream=stream)

    async def pause(self, seconds: float) -> None:
        """Sleep for `seconds`."""
        await self._sleep(seconds)

    async def upload(
        self, method: Method[Q, R], requests: AsyncIterator[Q], *, timeout_s: Timeout, doing: str = ""
    ) -> R:
        """Send a stream of requests and return the response; no retry: only the caller can repeat the requests."""
        deadline = self.deadline(timeout_s)
        with self._span(method) as (_, metadata), self._converted_errors(doing or method.name, deadline):
            left_s = self._left_s(deadline, doing or method.name)
            call = self._transport().stream(method, requests, timeout_s=left_s, metadata=metadata)
            try:
                responses = [response async for response in call]
            finally:
                call.cancel()
        if len(responses) != 1:
            raise Internal(f"{doing or method.name}: received {len(responses)} responses, expected 1")
        return responses[0]

    async def stream(
        self, method: Method[Q, R], request: Q, *, timeout_s: Timeout, doing: str = ""
    ) -> AsyncGenerator[R, None]:
        """Yield the responses to one request until the service ends the stream; no retry."""
        deadline = self.deadline(timeout_s)
        with self._span(method) as (_, metadata), self._converted_errors(doing or method.name, deadline):
            left_s = self._left_s(deadline, doing or method.name)
            call = self._transport().stream(method, request, timeout_s=left_s, metadata=metadata)
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
        timeout_s: Timeout,
        ended: Callable[[R], bool],
        doing: str = "",
    ) -> AsyncGenerator[R, None]:
        """Yield responses like `stream`, and reopen the stream when it breaks or ends early, until `ended(response)`.

        `request()` makes the request of each stream, so that a caller can continue from its last response.

        Raises:
            ShoalError: the stream cannot be reopened, or `timeout_s` has passed.
        """
        deadline = self.deadline(timeout_s)
        attempt, begun = 0, False
        while True:
            try:
                async with aclosing(self.stream(method, request(), timeout_s=deadline, doing=doing)) as responses:
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
                if self.clock() >= deadline.at:
                    raise timed_out(doing or method.name, deadline.timeout_s) from error
                raise error
            await self._sleep(wait)

    @contextmanager
    def bidi(
        self,
        method: Method[Q, R],
        requests: AsyncIterator[Q],
        *,
        timeout_s: Timeout,
        headers: Headers | None = None,
    ) -> Iterator[Bidi[R]]:
        """Open a bidirectional stream; leaving the block, also by an error, cancels the rest of the call."""
        deadline = self.deadline(timeout_s)
        with self._span(method, headers) as (_, metadata):
            left_s = self._left_s(deadline, method.name)
            call = self._transport().stream(method, requests, timeout_s=left_s, metadata=metadata)
            try:
                with self._converted_errors(method.name, deadline):
                    yield call
            finally:
                call.cancel()

    @contextmanager
    def _converted_errors(self, doing: str, deadline: Deadline) -> Iterator[None]:
        """Convert a failed call inside the block to its ShoalError."""
        try:
            yield
        except grpc.aio.AioRpcError as err:
            raise explain(err, address=self.url, doing=doing, timeout_s=deadline.timeout_s) from err

    def _transport(self) -> Transport:
        """Return the transport of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._last_used is not None and self._last_used[0] is loop:
            return self._last_used[1]
        if self._closed:
            raise FailedPrecondition("this client is closed: create a new one")
        transport = self._transports.get(loop)
        if transport is None:
            for ended in [other for other in list(self._transports) if other.is_closed()]:
                self._transports.pop(ended, None)
            transport = self._transports[loop] = self._new_transport()
        self._last_used = loop, transport
        return transport

    def _new_transport(self) -> Transport:
        """Return a transport; it connects at the first call, on the running event loop."""
        if self._is_near or is_local(self.address) or not grpc_aio.is_usable():
            # Imported here: the import takes 23 ms, which clients of other machines save.
            from shoal.client.transport.local_h2 import LocalH2

            return LocalH2(self.address, self._security)
        return grpc_aio.GrpcAio(self.address, self._security)

    @contextmanager
    def _span(
        self, method: Method[Any, Any], headers: Headers | None = None
    ) -> Iterator[tuple[Span, tuple[tuple[str, str], ...]]]:
        """Yield a client span and the metadata of its call; `headers` replace those of the client.

        The span is not made current: a stream may outlive the context.
        """
        sent = {**self._headers, **self._sendable(_validated(headers))} if headers else self._headers
        service, _, name = method.path.strip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "server.address": self.address}
        span = self._tracer.start_span(f"{service}/{name}", kind=SpanKind.CLIENT, attributes=attributes)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span))
        try:
            yield span, (*sent.items(), *carrier.items())
        except ShoalError as err:
            span.set_attribute("rpc.grpc.status_code", int(err.code))
            span.set_status(Status(StatusCode.ERROR, err.message))
            raise
        finally:
            span.end()


# Loops refer to their tasks weakly.
_closing: set[asyncio.Task[None]] = set()


def _close_on_its_loop(loop: asyncio.AbstractEventLoop, transport: Transport) -> None:
    task = loop.create_task(transport.close())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


def _validated_retries(retries: int) -> int:
    if not isinstance(retries, int) or retries < 0:
        raise InvalidArgument(f"retries={retries!r}: expected 0 or more, or None for the client's policy")
    return retries


def _validated_tenant(tenant: str) -> str:
    if not isinstance(tenant, str):
        raise InvalidArgument(f"tenant: expected text, got {tenant!r}")
    return tenant


def _validated_token(token: str) -> str:
    # The message never has the token.
    if not isinstance(token, str):
        raise InvalidArgument(f"token: expected text, got {type(token).__name__}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise InvalidArgument("the token has characters that no header carries: expected printable ASCII, no spaces")
    return token


def _validated(headers: Headers) -> Headers:
    if not isinstance(headers, Mapping):
        raise InvalidArgument(f"headers: expected a mapping of names to values, got {type(headers).__name__}")
    for key, value in headers.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidArgument(f"header {key!r}: expected text for name and value, got {value!r}")
        if not _HEADER.match(key):
            allowed = "lower-case letters, digits, `-`, `_`, `.`; not `grpc-...`, not `...-bin`"
            raise InvalidArgument(f"header {key!r}: use {allowed}")
        if not value.isascii() or not value.isprintable():
            raise InvalidArgument(f"header {key!r}: its value must be printable ASCII")
    return headers
