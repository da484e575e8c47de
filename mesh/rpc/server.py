"""The server of every service: gRPC methods with health and reflection, and a stop that cuts no call.

    STARTING ──serve()──> SERVING ──exit──> DRAINING (health NOT_SERVING, GOAWAY, calls in flight finish) ──> STOPPED

A service leaves the membership before its server drains: its Registration starts after the server, so it ends first.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from mesh.h2.listener import Listener
from mesh.h2.memory_account import BODY_BYTES, UNREAD_BYTES, Holder
from mesh.h2.server_connection import Memory, ServerConnection
from mesh.h2.stream import Application
from mesh.http1.connection import Http1Connection
from mesh.metrics.families import Source
from mesh.process import telemetry
from mesh.process.exits import cut_s
from mesh.process.freed_memory import FreedMemory
from mesh.process.stall_watch import StallWatch
from mesh.rpc.access import Access
from mesh.rpc.auditing import Auditing
from mesh.rpc.fast_call import FastHandler
from mesh.rpc.fast_spans import FastTracer
from mesh.rpc.grpc_app import GrpcApp, MethodTable
from mesh.rpc.health import Health
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.interceptors import Context, ServerInterceptor
from mesh.rpc.parsing import Parser
from shoal import __version__

# A stream that has sent nothing for so long has nothing in flight: a drain ends it.
_IDLE_STREAM_S = 0.25

_HEALTH_CHECK = f"/{health.SERVICE_NAME}/Check"

STALLS_KEY = "shoal-event-loop"
"""Trailing metadata of a health check: the stalls of this process's event loop (`StallWatch.report`)."""

# Memory of requests and responses below which a server has freed what it held at its peak.
_QUIET_BYTES = 8 << 20

# Longest wait, after the drain, for the cancelled handlers of calls that did not finish in it.
_CANCEL_S = 1.0


@dataclass(frozen=True)
class Rpc:
    """One gRPC service: its descriptor, and the function that adds its servicer to a server."""

    descriptor: ServiceDescriptor
    add: Callable[[grpc.aio.Server], None]
    parsers: Mapping[str, Parser[Any]] = field(default_factory=dict)
    """Parsers of requests by the path of their method, instead of plain ones."""


class Server:
    """Serves `rpcs` at `listen` for as long as the block lasts.

    Use as `async with`. Entering binds, with health NOT_SERVING; `serve()` sets SERVING. Leaving sets NOT_SERVING, lets
    calls in flight finish, and stops. Calls are cut in time for the process to end within `drain_ms`.

    Args:
        fast_methods: handlers of methods that are served on the fast path, by path. The methods are in `rpcs`, too.
        methods: grpc.RpcMethodHandler by path, of methods that have no descriptor; reflection does not list them.
        share_port: other processes may listen at the same TCP port.
        serves_health: the server itself serves health checks; otherwise one of `rpcs` does.
        body_bytes: limit of what all connections may hold of requests whose body is not whole, or not read.
        unread_bytes: limit of what all connections may hold of responses that their clients do not read.
        access: admits calls; None: every caller may call every method. Fast methods must ask it themselves.
        auditing: audits the calls that are administrative acts; none of them is a fast method.
        http: returns the application of requests that are not gRPC, over HTTP/1.1 and HTTP/2; None: only gRPC.
        http_listen: a second address, for HTTP clients that get one of their own.
        heavy: the process's turns for heavy work, if others use them, too.
        metrics: address of the page of metrics, beside those of `sources` with what every process has; None: no page.
        holders: what holds memory for requests beside the connections, in the same account.
        exports_as: service and instance that metrics are exported as over OTLP, where the environment names a
            collector; None: they are not exported.
        shrink: frees memory that the service keeps for reuse. Called by a thread, when memory has grown and little is
            held.

    Raises (on entering):
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        listen: str,
        rpcs: Sequence[Rpc],
        *,
        drain_ms: int,
        fast_methods: Mapping[str, FastHandler] = MappingProxyType({}),
        methods: Mapping[str, Any] = MappingProxyType({}),
        share_port: bool = False,
        serves_health: bool = True,
        body_bytes: int = BODY_BYTES,
        unread_bytes: int = UNREAD_BYTES,
        access: Access | None = None,
        auditing: Auditing | None = None,
        http: Callable[[GrpcApp], Application] | None = None,
        http_listen: str | None = None,
        heavy: HeavyWork | None = None,
        metrics: str | None = None,
        sources: Sequence[Source] = (),
        holders: Sequence[Holder] = (),
        exports_as: tuple[str, str] | None = None,
        shrink: Callable[[], None] | None = None,
    ) -> None:
        self._listen = listen
        self._rpcs = tuple(rpcs)
        self._names = [rpc.descriptor.full_name for rpc in self._rpcs]
        self._drain_s = cut_s(drain_ms / 1000)
        self._fast_methods = fast_methods
        self._methods = methods
        self._share_port = share_port
        self._access = access
        self._http = http
        self._http_listen = http_listen
        self._heavy = heavy
        self._metrics = metrics
        self._sources = tuple(sources)
        self._holders = tuple(holders)
        self._exports_as = exports_as
        self._exports = AsyncExitStack()
        self._health = Health() if serves_health else None
        self._interceptor = ServerInterceptor(auditing.wrap if auditing is not None else None, access)
        self._stalls = StallWatch()
        self._freed_memory = FreedMemory(self._is_quiet, shrink)
        self.memory = Memory(body_bytes, unread_bytes)
        """Accounts of what the connections hold."""
        self.address = listen
        """The address it listens at, with the port that was chosen for port 0."""
        self.http_address = http_listen or listen
        """The second address, or the only one."""

    async def __aenter__(self) -> Server:
        self._set_health(is_serving=False)
        tracer = FastTracer.of_process()
        self._app = GrpcApp(
            self._method_table(), self._fast_methods, tracer=tracer, access=self._access, heavy=self._heavy
        )
        connect: Any = ServerConnection
        if self._http is not None:
            self._app.http = self._http(self._app)
            connect = partial(Http1Connection, self._app.http)
        addresses = [self._listen, *([self._http_listen] if self._http_listen else [])]
        self._listeners = [
            Listener(listen, self._app, share_port=self._share_port, memory=self.memory, connect=connect)
            for listen in addresses
        ]
        self.address, *others = [await listener.start() for listener in self._listeners]
        self.http_address = others[0] if others else self.address
        self._stalls.start()
        self._freed_memory.start()
        await self._export_metrics()
        return self

    async def _export_metrics(self) -> None:
        """Begin to export metrics: a page, and points over OTLP. The libraries are imported only for that."""
        is_exported = self._exports_as is not None and telemetry.collector(os.environ, "METRICS") is not None
        if self._metrics is None and not is_exported:
            return
        from mesh.metrics import process, spans

        accounts = {"requests": self.memory.bodies, "responses": self.memory.unread}
        listeners = (listener.held_by_tenant for listener in self._listeners)
        holders = [self.memory.held_by_tenant, *listeners, *self._holders]
        sources = (process.source(__version__, self._stalls, accounts, holders), *self._sources)
        if self._metrics is not None:
            from mesh.metrics.exposition import metrics_endpoint

            kept = telemetry.kept_spans()
            pages = {} if kept is None else {spans.PAGE: spans.SpansPage(kept)}
            await self._exports.enter_async_context(metrics_endpoint(self._metrics, sources, pages=pages))
        if is_exported and self._exports_as is not None:
            from mesh.metrics.otlp import exported

            await self._exports.enter_async_context(exported(sources, telemetry.resource_of(*self._exports_as)))

    def _is_quiet(self) -> bool:
        return self.memory.bodies.held + self.memory.unread.held < _QUIET_BYTES

    def _method_table(self) -> Mapping[str, Any]:
        table: Any = MethodTable(self._interceptor.wrap)
        for rpc in self._rpcs:
            rpc.add(table)
        for path, handler in self._methods.items():
            table.add(path, handler)
        if self._health is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, table)
        # coord has a health service of its own.
        names = {*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME}
        # `enable_server_reflection` would treat the table as a server with threads.
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), table)
        found: dict[str, Any] = table.by_path
        for rpc in self._rpcs:
            for path, parser in rpc.parsers.items():
                found[path] = found[path]._replace(request_deserializer=parser)
        # Without `serves_health`, the server may have no health checks.
        if (check := found.get(_HEALTH_CHECK)) is not None:
            found[_HEALTH_CHECK] = self._with_stalls(check)
        return found

    def _with_stalls(self, handler: Any) -> Any:
        async def call(request: Any, ctx: Context) -> Any:
            ctx.set_trailing_metadata(((STALLS_KEY, self._stalls.report()),))
            return await handler.unary_unary(request, ctx)

        return grpc.unary_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)

    async def serve(self) -> None:
        """Set the health to SERVING, for the server as a whole and for each of its services."""
        self._set_health(is_serving=True)

    def _set_health(self, *, is_serving: bool) -> None:
        if self._health is not None:
            self._health.set_status(self._names, is_serving=is_serving)

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._set_health(is_serving=False)
        await asyncio.gather(
            *(
                listener.drain(self._drain_s, lambda: self._interceptor.end_idle_streams(_IDLE_STREAM_S))
                for listener in self._listeners
            )
        )
        if self._app.tasks:
            await asyncio.wait(self._app.tasks, timeout=_CANCEL_S)
        # The last points have the calls that ended in the drain.
        await self._exports.aclose()
        self._app.threads.close()
        self._app.heavy.close()
        self._stalls.stop()
        self._freed_memory.stop()
