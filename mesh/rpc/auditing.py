"""Audit of a server's administrative acts: an entry before each, and another with its outcome.

    call of shoal.access.audit.AUDITED ──> entry `act` ──durable──> handler ──> entry `outcome`
                                             └──cannot be written──> UNAVAILABLE, and nothing is done

An act whose outcome is missing may have been done: its process, or the audit log, ended meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import fields, replace
from typing import Any, Protocol, TypeAlias

import grpc
from opentelemetry import trace

from mesh.process.config import ServiceConfig
from mesh.process.tasks import end, log_failure
from mesh.rpc.access import Access, caller_in
from mesh.rpc.channel import AnyChannel
from mesh.rpc.client.channel import Channel
from mesh.rpc.interceptors import status_of, translated
from shoal.access.audit import ACT, AUDITED, OUTCOME, Event, target_of
from shoal.errors import ShoalError, Unavailable
from shoal.store.v1 import store_pb2, store_pb2_grpc

log = logging.getLogger(__name__)

_RECORD_S = 5.0
_OUTCOMES_S = 1.0
ADDRESS = "x-envoy-external-address"
"""Header with the caller's address, which Envoy sets whatever the caller sends."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AuditLog(Protocol):
    """Writes events to the audit log, and returns their ids once they are durable."""

    async def record(self, events: Sequence[Event]) -> Sequence[str]:
        """Write `events`. Raises ShoalError when they may not have been written."""


class RemoteAuditLog:
    """The audit log of the service that keeps it, called over `channel`."""

    def __init__(self, channel: AnyChannel) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)

    async def record(self, events: Sequence[Event]) -> Sequence[str]:
        messages = [
            store_pb2.AuditEvent(**{field.name: getattr(event, field.name) for field in fields(event)})
            for event in events
        ]
        with translated("writing the audit log"):
            response = await self._stub.RecordAudit(store_pb2.RecordAuditRequest(events=messages), timeout=_RECORD_S)
        return list(response.ids)


class Auditing:
    """Audits the acts among a server's methods. Use as `async with`: leaving waits for outcomes to be written."""

    def __init__(self, audit_log: AuditLog, access: Access, origin: str) -> None:
        """Write to `audit_log` who called, by `access`. `origin` names this instance."""
        self.log = audit_log
        self._access = access
        self._origin = origin
        self._writing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Auditing:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writing:
            await asyncio.wait(self._writing, timeout=_OUTCOMES_S)
        await end(*self._writing)

    def wrap(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """Return `behaviour` with its entries, for an act; else `behaviour` itself."""
        if method not in AUDITED:
            return behaviour
        return (
            self._stream(method, behaviour)
            if inspect.isasyncgenfunction(behaviour)
            else self._single(method, behaviour)
        )

    def _single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> Any:
            async with self._act(method, request, ctx):
                return await behaviour(request, ctx)

        return call

    def _stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> AsyncIterator[Any]:
            async with self._act(method, request, ctx):
                async for response in behaviour(request, ctx):
                    yield response

        return call

    def _act(self, method: str, request: Any, ctx: Context) -> AbstractAsyncContextManager[None]:
        headers = ctx.invocation_metadata() or ()
        address = next((str(value) for key, value in headers if key == ADDRESS), "")
        return self.act(method, caller_in(ctx), address, target_of(request))

    @asynccontextmanager
    async def act(self, rpc: str, caller: bytes | None, address: str, target: str) -> AsyncIterator[None]:
        """Audit the block as an act: its entry is durable before the block begins, and its outcome follows.

        Calls of other services are no acts: they belong to a call that was audited.

        Raises:
            Unavailable: the audit log cannot be written.
        """
        known = self._access.check(rpc, caller)
        if known is None:
            yield
            return
        span = trace.get_current_span().get_span_context()
        event = Event(
            kind=ACT,
            tenant=known.tenant,
            subject=known.subject,
            key=known.key,
            role=known.role,
            address=address,
            rpc=rpc,
            target=target,
            trace_id=f"{span.trace_id:032x}" if span.is_valid else "",
            origin=self._origin,
        )
        try:
            async with asyncio.timeout(_RECORD_S):
                (written,) = await self.log.record([event])
        except (ShoalError, TimeoutError) as err:
            raise Unavailable(f"the audit log cannot be written, so nothing was done: {_cause(err)}") from err
        outcome = replace(event, kind=OUTCOME, of=written)
        try:
            yield
        except BaseException as err:
            self._end(outcome, err)
            raise
        self._end(outcome, None)

    def _end(self, outcome: Event, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            code, reason = grpc.StatusCode.CANCELLED, "the caller has left, or this instance stops"
        elif error is not None:
            code, reason, _ = status_of(error)
        else:
            code, reason = grpc.StatusCode.OK, ""
        task = asyncio.create_task(self._write(replace(outcome, code=code.value[0], reason=reason)), name="outcome")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        task.add_done_callback(log_failure)

    async def _write(self, outcome: Event) -> None:
        try:
            async with asyncio.timeout(_RECORD_S):
                await self.log.record([outcome])
        except (ShoalError, TimeoutError) as err:
            log.warning("the outcome of %s is missing in the audit log: %s", outcome.of, _cause(err))


def _cause(error: Exception) -> str:
    # A TimeoutError has no text.
    return str(error) or f"no answer in {_RECORD_S:g} s"


@asynccontextmanager
async def auditing_of(config: ServiceConfig, access: Access | None) -> AsyncIterator[Auditing | None]:
    """Yield the audit of a service's acts, by way of the mesh; None where callers need no authentication.

    Without a mesh (a server on its own), there is no audit log either.
    """
    if access is None or config.mesh is None:
        yield None
        return
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(Channel(config.mesh))
        origin = f"{config.node}/{config.instance}"
        yield await stack.enter_async_context(Auditing(RemoteAuditLog(channel), access, origin))
