"""Channel to one peer: one connection at a time, opened on demand, and again after a loss.

    unary, stream ──> connection accepts the call ──> begin
                         └── no connection, or no capacity: the call waits ──connected, has_capacity──> begin

A call waits at most until its deadline. While the peer is unreachable, calls fail immediately with `is_unprocessed`.
The channel reconnects with exponential backoff.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from ssl import SSLContext
from types import TracebackType

import grpc

from mesh.process import sockets
from mesh.process.tasks import end
from mesh.rpc.client import request
from mesh.rpc.client.calls import Call, UnaryCall, deadline_exceeded, too_large
from mesh.rpc.client.connection import TICK_S, ClientConnection
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.client.request import Metadata, trace_metadata
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.client.stubs import StubChannel
from mesh.rpc.limits import MESSAGE_BYTES

log = logging.getLogger(__name__)

S = grpc.StatusCode

NO_HTTP2 = "the peer does not agree to HTTP/2 over TLS"

_CONNECT_S = 5.0
# Envoy restarts within about a second.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0


@dataclass(frozen=True)
class Tls:
    """TLS of a channel's connections."""

    context: SSLContext
    """Client context; the channel makes it offer HTTP/2."""
    name: str
    """Name or address that the server's certificate must have."""


class Channel(StubChannel):
    """Channel to the server at `address` (`unix:/path` or `host:port`). Use as `async with`.

    Args:
        authority: value of `:authority`.
        sends_trace: the channel adds the current trace to each call's metadata. Otherwise the caller does.
        tick_s: seconds between checks of a silent peer.
        draw: returns a random number, 0 to 1.
        tls: None: plaintext.
    """

    def __init__(
        self,
        address: str,
        *,
        authority: str = "localhost",
        sends_trace: bool = True,
        tick_s: float = TICK_S,
        draw: Callable[[], float] = random.random,
        tls: Tls | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        if tls is not None:
            tls.context.set_alpn_protocols(["h2"])
        self._authority = authority
        self._sends_trace = sends_trace
        self._tick_s = tick_s
        self._draw = draw
        self._connection: ClientConnection | None = None
        self._connections: set[ClientConnection] = set()
        """Open connections: the one in use, and retired ones whose last calls are in flight."""
        # At most one entry for each caller: a call leaves the queue at its deadline.
        self._waiting: deque[Call] = deque()
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._last_error = ""
        self._is_closed = False

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls, waiting or in flight, and all connections."""
        connecting = self._connecting
        self.abort()
        if connecting is not None:
            await end(connecting)

    def abort(self) -> None:
        """Close without waiting; see `close`."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self._fail_waiting("the channel is closed")
        for connection in tuple(self._connections):
            connection.abort("the channel is closed")

    def leave_to_parent(self) -> None:
        """Give the connections up in a forked child, which shares their sockets with the parent; see ClientConnection.

        The child's event loop is another one, so nothing is cancelled or closed. The channel is not usable any more.
        """
        self._is_closed = True
        for connection in self._connections:
            connection.leave_to_parent()

    # -- calls

    async def unary(self, path: str, message: bytes, *, timeout_s: float | None, metadata: Metadata = ()) -> bytes:
        """Call the method `path` (`/package.Service/Method`) with a serialized message; return the response message.

        Args:
            timeout_s: seconds until DEADLINE_EXCEEDED, including the wait for a connection. None: no deadline.
            metadata: values of names that end with `-bin` are bytes.

        Raises:
            CallFailed: the call failed; the error has its status.
            ValueError: metadata that no header can carry.
        """
        if len(message) > MESSAGE_BYTES:
            raise too_large(len(message))
        call = UnaryCall(self, self._fields(path, metadata), timeout_s, message)
        self._start(call)
        try:
            return await call.future
        except asyncio.CancelledError:
            call.cancel()
            if not call.future.cancelled():
                # Retrieved, so that asyncio does not log it as unhandled.
                call.future.exception()
            raise

    def stream(self, path: str, *, timeout_s: float | None, metadata: Metadata = ()) -> StreamCall:
        """Begin a call with messages in both directions. Arguments as `unary`; the call raises its errors in use."""
        call = StreamCall(self, self._fields(path, metadata), timeout_s)
        self._start(call)
        return call

    def _fields(self, path: str, metadata: Metadata) -> bytes:
        fields = request.head(path, self._authority)
        if metadata:
            fields += request.metadata(metadata)
        if self._sends_trace and (traced := trace_metadata()):
            fields += request.metadata(traced.items())
        return fields

    def _start(self, call: Call) -> None:
        connection = self._connection
        if call.timeout_s is not None and call.timeout_s <= 0:
            call.end(deadline_exceeded(is_unprocessed=True))
        elif connection is not None and not self._waiting and connection.accepts_calls():
            connection.begin(call, has_waited=False)
        else:
            self._wait(call)

    def _wait(self, call: Call) -> None:
        if self._is_closed:
            call.end(self._unreached("the channel is closed"))
            return
        if self._connection is None and self._connecting is None and not self._connect():
            call.end(self._unreached(self._last_error))
            return
        call.owner = self
        self._waiting.append(call)

    def _unreached(self, why: str) -> CallFailed:
        return CallFailed(S.UNAVAILABLE, f"cannot reach {self._address}: {why}", is_unprocessed=True)

    def _fail_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.end(self._unreached(why))

    # -- owner of waiting calls

    def drop(self, call: Call) -> None:
        """Remove a waiting call."""
        self._waiting.remove(call)

    def open_window(self, call: Call) -> None:
        """Do nothing: a waiting call has received no data."""

    # -- owner of connections

    def has_capacity(self) -> None:
        """Begin waiting calls, as many as the connection accepts."""
        connection = self._connection
        while self._waiting and connection is not None and connection.accepts_calls():
            connection.begin(self._waiting.popleft(), has_waited=True)

    def repeat(self, call: Call) -> None:
        """Begin a call again that no server has processed, before the waiting calls."""
        if self._is_closed or (self._connection is None and self._connecting is None and not self._connect()):
            call.end(self._unreached(self._last_error or "the channel is closed"))
            return
        call.owner, call.number = self, 0
        call.is_sent = False
        self._waiting.appendleft(call)
        self.has_capacity()

    def retire(self, connection: ClientConnection) -> None:
        """Replace a connection that accepts no more calls; waiting calls get a new one."""
        if connection is not self._connection:
            return
        self._connection = None
        if connection.has_responded:
            self._failures = 0
        else:
            self._back_off("the connection was lost before its first response")
        if self._waiting and not self._connect():
            self._fail_waiting(self._last_error)

    def lost(self, connection: ClientConnection) -> None:
        """Remove a connection that has ended."""
        self._connections.discard(connection)

    # -- connecting

    def _connect(self) -> bool:
        """Begin to connect. Return False during the backoff after a failed attempt."""
        loop = asyncio.get_running_loop()
        if self._is_closed or loop.time() < self._retry_at:
            return False
        self._connecting = loop.create_task(self._open(), name=f"connect {self._address}")
        return True

    async def _open(self) -> None:
        connection = ClientConnection(self, self._address, self._tick_s)
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._connect_to(connection)
                self._connections.add(connection)
                await connection.ready
                # SETTINGS and GOAWAY may arrive in one piece.
                if connection.is_retired:
                    raise ConnectionError("the peer sent GOAWAY immediately")
        except Exception as err:
            # A bug here, or an invalid address: the waiting calls fail with it.
            if not isinstance(err, OSError):
                log.exception(
                    "cannot connect to %(address)s", {"event": "channel.connect_failed", "address": self._address}
                )
            self._connecting = None
            why = str(err) or f"no connection within {_CONNECT_S:.0f} s"
            self._back_off(why)
            self._abandon(connection, why)
            self._fail_waiting(why)
        except asyncio.CancelledError:
            self._connecting = None
            self._abandon(connection, "the channel is closed")
            raise
        else:
            self._connecting = None
            self._connection = connection
            self.has_capacity()

    async def _connect_to(self, connection: ClientConnection) -> None:
        loop = asyncio.get_running_loop()
        if (path := sockets.path_of(self._address)) is not None:
            await loop.create_unix_connection(lambda: connection, str(path))
        else:
            host, _, port = self._address.rpartition(":")
            host, tls = host.strip("[]"), self._tls
            context, name = (None, None) if tls is None else (tls.context, tls.name)
            transport, _ = await loop.create_connection(
                lambda: connection, host, int(port), ssl=context, server_hostname=name
            )
            if tls is not None and transport.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":
                transport.abort()
                raise ConnectionError(NO_HTTP2)

    def _abandon(self, connection: ClientConnection, why: str) -> None:
        if connection in self._connections:
            connection.abort(why)
            self._connections.discard(connection)
        if connection.ready.done() and not connection.ready.cancelled():
            # Retrieved, so that asyncio does not log it as unhandled.
            connection.ready.exception()

    def _back_off(self, why: str) -> None:
        """Set the time of the next attempt: exponential backoff, half of it random."""
        self._last_error = why
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._retry_at = asyncio.get_running_loop().time() + pause_s * (0.5 + self._draw() / 2)
