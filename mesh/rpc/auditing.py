"""Audit of a server's administrative acts: an entry before each, and another with its outcome; of sign-ins; of reads.

    call of shoal.access.audit.AUDITED ──> entry `act` ──durable──> handler ──> entry `outcome`, of the same trace
                                             └──cannot be written──> UNAVAILABLE, and nothing is done
    call of CONTENT_READS, by a tenant that the policy names ──> handler ──> counted, and written each second
    first call of a key or token from an address ──> counted, and written each second

An act whose outcome is missing may have been done: its process, or the audit log, ended meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import trace
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from mesh.process.config import ServiceConfig
from mesh.process.tasks import end, log_failure
from mesh.rpc.access import ADDRESS, Access, caller_in
from mesh.rpc.audit_log import AuditLog, CountedEvents
from mesh.rpc.channel import AnyChannel
from mesh.rpc.client.channel import Channel
from mesh.rpc.interceptors import attached, status_of, translated
from shoal.access.audit import (
    ACT,
    AUDITED,
    AUDITED_AFTER,
    CONTENT_READS,
    OUTCOME,
    READ,
    SIGN_IN,
    Event,
    asked_for,
    delivered,
    made_by,
    target_of,
)
from shoal.access.caller_header import CALLER_HEADER, LAUNCHER
from shoal.access.decision import Caller
from shoal.errors import ShoalError, Unavailable
from shoal.inference.v2 import trial_pb2
from shoal.store.v1 import store_pb2, store_pb2_grpc

log = logging.getLogger(__name__)

_RECORD_S = 5.0
_OUTCOMES_S = 1.0
_RETRY_S = 0.1
# Subject of the process that has started the node.
_LAUNCHER = "launcher"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Q = TypeVar("Q")
R = TypeVar("R")
Respond: TypeAlias = Callable[[Q, Mapping[bytes, bytes]], Coroutine[Any, Any, R]]

_CALLER = CALLER_HEADER.encode()
_ADDRESS = ADDRESS.decode()
_IDS = RandomIdGenerator()
_FURTHER_READS = Event(kind=READ, reason="further reads, more than are told apart")
_FURTHER_SIGN_INS = Event(kind=SIGN_IN, reason="further sign-ins, more than are told apart")
_FURTHER_ADDRESSES = "further addresses, more than are told apart"


@dataclass
class Act:
    """An act in progress."""

    made: str = ""
    """Name of what it has made, set by its end."""


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
    """Audits the acts and reads among a server's methods. Use as `async with`: leaving waits for the last entries."""

    def __init__(self, audit_log: AuditLog, access: Access, origin: str) -> None:
        """Write to `audit_log` who called, by `access`. `origin` names this instance."""
        self.log = audit_log
        self._access = access
        self._origin = origin
        self._writing: set[asyncio.Task[None]] = set()
        self._reads = CountedEvents(audit_log, replace(_FURTHER_READS, origin=origin), "reads")
        self._sign_ins = CountedEvents(audit_log, replace(_FURTHER_SIGN_INS, origin=origin), "sign-ins")
        access.on_sign_in = self._sign_in

    async def __aenter__(self) -> Auditing:
        for counted in (self._reads, self._sign_ins):
            await counted.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._access.on_sign_in = None
        for counted, what in ((self._reads, "reads"), (self._sign_ins, "sign-ins")):
            await counted.__aexit__(*exc)
            self._start(self._write_last(counted, what), what)
        if self._writing:
            await asyncio.wait(self._writing, timeout=_OUTCOMES_S)
        await end(*self._writing)

    def wrap(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """Return `behaviour` with its entries, for an act or a read of content; else `behaviour` itself."""
        if method in CONTENT_READS:
            is_stream = inspect.isasyncgenfunction(behaviour)
            return (self._counted_stream if is_stream else self._counted_single)(method, behaviour)
        if method not in AUDITED:
            return behaviour
        return (
            self._stream(method, behaviour)
            if inspect.isasyncgenfunction(behaviour)
            else self._single(method, behaviour)
        )

    def _single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> Any:
            async with self._act(method, request, ctx) as act:
                response = await behaviour(request, ctx)
                act.made = made_by(method, response)
                return response

        return call

    def _stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> AsyncIterator[Any]:
            async with self._act(method, request, ctx):
                async for response in behaviour(request, ctx):
                    yield response
                    del response

        return call

    def _counted_single(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> Any:
            response = await behaviour(request, ctx)
            self._count(method, caller_in(ctx), _address_in(ctx), request, response)
            return response

        return call

    def _counted_stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, ctx: Context) -> AsyncIterator[Any]:
            caller, address = caller_in(ctx), _address_in(ctx)
            async for response in behaviour(request, ctx):
                self._count(method, caller, address, request, response)
                yield response
                del response

        return call

    def counted(self, method: str, respond: Respond[Q, R]) -> Respond[Q, R]:
        """Return a handler of the fast path whose reads of content are counted."""

        async def call(request: Q, headers: Mapping[bytes, bytes]) -> R:
            response = await respond(request, headers)
            address = headers.get(ADDRESS, b"").decode("latin-1")
            self._count(method, headers.get(_CALLER), address, request, response)
            return response

        return call

    def _count(self, method: str, caller: bytes | None, address: str, request: Any, response: Any) -> None:
        known = self._access.audited_reader(caller)
        if known is not None and (number := delivered(response)):
            event = self._event(READ, method, known, address, _target_of(request))
            self._reads.add(replace(event.checked(), count=number))

    def _sign_in(self, rpc: str, caller: Caller, address: bytes) -> None:
        event = self._event(SIGN_IN, rpc, caller, address.decode("latin-1"), "")
        self._sign_ins.add((event if address else replace(event, reason=_FURTHER_ADDRESSES)).checked())

    async def _write_last(self, counted: CountedEvents, what: str) -> None:
        try:
            await counted.write()
        except ShoalError as err:
            log.warning(
                "the last %(counted)s are missing in the audit log: %(error)s",
                {"event": "audit.events_missing", "counted": what, "error": err},
            )

    def _act(self, method: str, request: Any, ctx: Context) -> AbstractAsyncContextManager[Act]:
        return self.act(method, caller_in(ctx), _address_in(ctx), _target_of(request), asked_for(method, request))

    @asynccontextmanager
    async def act(
        self, rpc: str, caller: bytes | None, address: str, target: str, asked: str = ""
    ) -> AsyncIterator[Act]:
        """Audit the block as an act: its entry is durable before the block begins, and its outcome follows.

        `asked` is the reason in the entries of an act that does not fail.

        Calls of other services are no acts: they belong to a call that was audited. The node's launcher, which makes a
        key at the start, does so without an entry where the log cannot be written: the node may have no store. Acts of
        `AUDITED_AFTER` have an outcome only, then: they may be needed before the log can be written.

        Raises:
            Unavailable: the audit log cannot be written.
        """
        known, act = self._access.check(rpc, caller), Act()
        is_launcher = caller == LAUNCHER
        if known is None and not is_launcher:
            yield act
            return
        with _traced():
            event = replace(self._event(ACT, rpc, known, address, target), reason=asked)
            try:
                written = await self._written(event, may_retry=is_launcher)
            except (ShoalError, TimeoutError) as err:
                if not is_launcher and rpc not in AUDITED_AFTER:
                    raise Unavailable(f"the audit log cannot be written, so nothing was done: {_cause(err)}") from err
                log.warning(
                    "a call of %(method)s by %(subject)s has no entry in the audit log before it is done: %(error)s",
                    {"event": "audit.call_missing", "method": rpc, "subject": event.subject, "error": _cause(err)},
                )
                if is_launcher:
                    yield act
                    return
                written, event = "", replace(event, reason="done while the audit log could not be written")
            outcome = replace(event, kind=OUTCOME, of=written)
            try:
                yield act
            except BaseException as err:
                self._end(outcome, err)
                raise
            self._end(replace(outcome, target=act.made or target), None)

    async def _written(self, event: Event, *, may_retry: bool) -> str:
        async with asyncio.timeout(_RECORD_S):
            while True:
                try:
                    (id,) = await self.log.record([event])
                    return id
                except ShoalError:
                    if not may_retry:
                        raise
                await asyncio.sleep(_RETRY_S)

    def _event(self, kind: str, rpc: str, known: Caller | None, address: str, target: str) -> Event:
        span = trace.get_current_span().get_span_context()
        event = Event(
            kind=kind,
            subject=_LAUNCHER,
            address=address,
            rpc=rpc,
            target=target,
            trace_id=f"{span.trace_id:032x}" if span.is_valid else "",
            origin=self._origin,
        )
        if known is None:
            return event
        return replace(event, tenant=known.tenant, subject=known.subject, key=known.key, role=known.role)

    def _end(self, outcome: Event, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            code, reason = grpc.StatusCode.CANCELLED, "the caller has left, or this instance stops"
        elif error is not None:
            code, reason, _ = status_of(error)
        else:
            code, reason = grpc.StatusCode.OK, outcome.reason
        self._start(self._write(replace(outcome, code=code.value[0], reason=reason)), "outcome")

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        task.add_done_callback(log_failure)

    async def _write(self, outcome: Event) -> None:
        try:
            await self._written(outcome, may_retry=not outcome.of)
        except (ShoalError, TimeoutError) as err:
            log.warning(
                "the outcome of %(entry)s is missing in the audit log: %(error)s",
                {"event": "audit.outcome_missing", "entry": outcome.of or outcome.rpc, "error": _cause(err)},
            )


@contextmanager
def _traced() -> Iterator[None]:
    """Run the block in a new trace when there is none, so that its logs and its calls of other services have one id.

    The new trace is not sampled: nobody has asked for its spans.
    """
    if trace.get_current_span().get_span_context().is_valid:
        yield
        return
    begun = trace.SpanContext(_IDS.generate_trace_id(), _IDS.generate_span_id(), is_remote=False)
    with attached(trace.set_span_in_context(trace.NonRecordingSpan(begun))):
        yield


def _target_of(request: Any) -> str:
    """Return the name of what a request is about; that of a trial has its model in serialised form."""
    if isinstance(request, trial_pb2.TryModelRequest):
        try:
            return store_pb2.ModelVersion.FromString(request.model).name
        except DecodeError:
            return ""
    return target_of(request)


def _address_in(ctx: Context) -> str:
    return next((str(value) for key, value in ctx.invocation_metadata() or () if key == _ADDRESS), "")


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
