"""The gRPC server under every service: health and reflection, errors and spans, and a stop that cuts no call.

    STARTING ──serve()──> SERVING ──exit──> DRAINING (health NOT_SERVING, calls in flight finish) ──> STOPPED

Deregistration comes before: in each service's `app`, the Registration starts after the server, so it ends before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from mesh import sockets
from mesh.health import Health
from mesh.interceptors import ServerInterceptor
from mesh.limits import MESSAGE_BYTES
from mesh.tasks import end

log = logging.getLogger(__name__)

_CHECK_S = 0.1
# How soon it is noticed that a server has ended by itself.

IDLE_STREAM_S = 0.25
"""While stopping: a stream that sent nothing for so long has nothing in flight."""


@dataclass(frozen=True)
class Rpc:
    """One gRPC service: its descriptor, and what adds its servicer to a server."""

    descriptor: ServiceDescriptor
    add: Callable[[grpc.aio.Server], None]


class Served:
    """The services of one server, with health, reflection, and the interceptor that every call passes.

    Args:
        with_health: health is served too; else it is somebody else's.
    """

    def __init__(self, rpcs: Sequence[Rpc], *, with_health: bool = True) -> None:
        self._rpcs = tuple(rpcs)
        self._names = [rpc.descriptor.full_name for rpc in self._rpcs]
        self._health = Health() if with_health else None
        self.interceptor = ServerInterceptor()
        self.say(is_serving=False)

    def add_to(self, server: Any) -> None:
        """Adds all of it to a grpc server, or to what takes handlers as one does."""
        for rpc in self._rpcs:
            rpc.add(server)
        if self._health is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        # Not `enable_server_reflection`: that takes anything but a grpc.aio.Server for a server with threads.
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), server)

    def say(self, *, is_serving: bool) -> None:
        """Says SERVING or NOT_SERVING to health checks: for the server as a whole and for each of its services."""
        if self._health is not None:
            self._health.say(self._names, is_serving=is_serving)

    def end_idle_streams(self) -> None:
        """While stopping: ends the streams that have nothing in flight."""
        self.interceptor.end_idle_streams(IDLE_STREAM_S)


class GrpcServer:
    """Serves `rpcs` at `listen` for as long as the block lasts.

    Use as `async with`: entering binds and starts with health NOT_SERVING; `serve()` says SERVING; leaving says
    NOT_SERVING, lets calls in flight finish for `drain_ms`, and stops. With `share_port` other processes may listen at
    the same TCP port.

    Raises (on entering):
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        listen: str,
        rpcs: Sequence[Rpc],
        *,
        drain_ms: int,
        share_port: bool = False,
        message_bytes: int = MESSAGE_BYTES,
        generic: Sequence[grpc.GenericRpcHandler] = (),
        with_health: bool = True,
    ) -> None:
        self._listen = listen
        self._served = Served(rpcs, with_health=with_health)
        self._drain_s = drain_ms / 1000
        self._share_port = share_port
        self._message_bytes = message_bytes
        self._generic = tuple(generic)
        self.address = listen
        """Where it really listens: with port 0, the port that was free."""

    async def __aenter__(self) -> GrpcServer:
        sockets.make_way(self._listen)
        self._server = await self._started()
        self._stopping: set[asyncio.Future[None]] = set()
        self._watch = asyncio.create_task(self._start_again(), name="grpc-server-watch")
        return self

    async def _started(self) -> grpc.aio.Server:
        """A server at `address`. Raises OSError when that cannot be bound."""
        server = grpc.aio.server(
            interceptors=[self._served.interceptor],
            options=[
                ("grpc.max_send_message_length", self._message_bytes),
                ("grpc.max_receive_message_length", self._message_bytes),
                ("grpc.so_reuseport", int(self._share_port)),
                # Envoy pings coord every 2 s: what comes more often than this is taken for abuse, and the stream cut.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # From 1,000 calls that wait for the loop on, the library would cancel one here and one there, without a
                # word. How much may wait is decided by the services.
                ("grpc.server.max_pending_requests", 20_000),
                ("grpc.server.max_pending_requests_hard_limit", 20_000),
            ],
        )
        self._served.add_to(server)
        if self._generic:
            server.add_generic_rpc_handlers(self._generic)
        try:
            port = server.add_insecure_port(self.address)
        except RuntimeError as err:
            raise OSError(errno.EADDRINUSE, "is it in use?") from err
        if not self._listen.startswith("unix:"):
            self.address = f"{self._listen.rpartition(':')[0]}:{port}"
        await server.start()
        return server

    async def _start_again(self) -> None:
        """Puts another server in the place of one that has ended by itself, until it is cancelled.

        One request is enough for that: grpc.aio's server takes no more when a call's path is not UTF-8. What it has in
        flight may finish.
        """
        while True:
            try:
                await self._server.wait_for_termination(_CHECK_S)
            except Exception as err:
                log.error("the server has ended and is started again: %s", err)
                stopping = asyncio.ensure_future(self._server.stop(self._drain_s))
                self._stopping.add(stopping)
                stopping.add_done_callback(self._stopping.discard)
                self._server = await self._started_at_last()

    async def _started_at_last(self) -> grpc.aio.Server:
        while True:
            try:
                return await self._started()
            except OSError as err:
                log.error("cannot listen on %s again: %s", self.address, err)
                await asyncio.sleep(_CHECK_S)

    async def serve(self) -> None:
        """Says SERVING to health checks: for the server as a whole and for each of its services."""
        self._served.say(is_serving=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._served.say(is_serving=False)
        await end(self._watch)
        stopped = asyncio.gather(self._server.stop(self._drain_s), *self._stopping)
        while not stopped.done():
            await asyncio.wait([stopped], timeout=IDLE_STREAM_S)
            self._served.end_idle_streams()
        sockets.remove(self._listen)


def on_loop_signals(take: Callable[[int], None]) -> None:
    """Calls `take(number)` on the running loop for SIGTERM and SIGINT. For the main thread's loop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, take, number)


async def until_stopped(on_signals: Callable[[Callable[[int], None]], None] = on_loop_signals) -> None:
    """Waits for SIGTERM or SIGINT. A second one ends the process at once. `on_signals` subscribes to them.

    Also ends when the process that started this one is gone (SHOAL_PARENT_PID), so that no orphan keeps a socket or a
    lease.
    """
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        log.info("stopping on %s", signal.Signals(number).name)
        stop.set()

    on_signals(on_signal)
    parent = os.environ.get("SHOAL_PARENT_PID")
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
        if parent and os.getppid() != int(parent) and not stop.is_set():
            log.warning("the launcher (pid %s) is gone: stopping", parent)
            stop.set()
