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
from contextlib import AsyncExitStack, asynccontextmanager
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
# Set by Envoy, whatever the caller sends.
_ADDRESS = "x-envoy-external-address"

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
            act = await self._begin(method, request, ctx)
            try:
                response = await behaviour(request, ctx)
            except BaseException as err:
                self._end(act, err)
                raise
            self._end(act, None)
            return response

        return call

    def _stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> AsyncIterator[Any]:
            act = await self._begin(method, request, ctx)
            try:
                async for response in behaviour(request, ctx):
                    yield response
            except BaseException as err:
                self._end(act, err)
                raise
            self._end(act, None)

        return call

    async def _begin(self, method: str, request: Any, ctx: Context) -> Event | None:
        """Write the entry of an act; None for a call of another service, whose own caller was audited."""
        caller = self._access.check(method, caller_in(ctx))
        if caller is None:
            return None
        span = trace.get_current_span().get_span_context()
        act = Event(
            kind=ACT,
            tenant=caller.tenant,
            subject=caller.subject,
            key=caller.key,
            role=caller.role,
            address=_address(ctx),
            rpc=method,
            target=target_of(request),
            trace_id=f"{span.trace_id:032x}" if span.is_valid else "",
            origin=self._origin,
        )
        try:
            async with asyncio.timeout(_RECORD_S):
                (written,) = await self.log.record([act])
        except (ShoalError, TimeoutError) as err:
            raise Unavailable(f"the audit log cannot be written, so nothing was done: {err or 'no answer'}") from err
        return replace(act, kind=OUTCOME, of=written)

    def _end(self, outcome: Event | None, error: BaseException | None) -> None:
        if outcome is None:
            return
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            code, reason = grpc.StatusCode.CANCELLED, "the caller has left, or this instance stops"
        elif error is not None:
            code, reason, _ = status_of(error)
        else:
            code, reason = grpc.StatusCode.OK, ""
        ended = replace(outcome, code=code.value[0], reason=reason)
        task = asyncio.create_task(self._write(ended), name="audit outcome")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        task.add_done_callback(log_failure)

    async def _write(self, outcome: Event) -> None:
        try:
            async with asyncio.timeout(_RECORD_S):
                await self.log.record([outcome])
        except (ShoalError, TimeoutError) as err:
            log.warning("the outcome of %s is missing in the audit log: %s", outcome.of, err or "no answer")


def _address(ctx: Context) -> str:
    return next((str(value) for key, value in ctx.invocation_metadata() or () if key == _ADDRESS), "")


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
