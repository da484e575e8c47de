"""A channel to one peer of this machine: a connection at a time, made when a call needs it, and again after a loss.

    unary, stream ──> line takes it ──> it goes
                         └── no line, or no room: it waits, within its deadline ──connected, has_room──> it goes

While the peer cannot be reached, calls fail at once (nobody has seen them: `is_unprocessed`), and a new attempt is made
only after a pause that grows; one caller's patience is not the next one's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from types import TracebackType

import grpc

from mesh.process import sockets
from mesh.process.tasks import end
from mesh.rpc.client import request
from mesh.rpc.client.calls import Call, UnaryCall, deadline_exceeded, too_large
from mesh.rpc.client.connection import TICK_S, ClientConnection
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.client.request import Metadata
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.client.stubs import Stubbed
from mesh.rpc.interceptors import trace_metadata
from mesh.rpc.limits import MESSAGE_BYTES

log = logging.getLogger(__name__)

S = grpc.StatusCode

_CONNECT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
# Envoy comes back within a second or so of a restart.


class Channel(Stubbed):
    """Calls to whatever listens at `address` (`unix:/path` or `host:port`). Use as `async with`.

    Args:
        authority: of the calls.
        sends_trace: the current trace goes along with a call. Else it is the caller's to put into the metadata.
        tick_s: seconds between looks at a peer that says nothing.
        draw: a random number, 0 to 1.
    """

    def __init__(
        self,
        address: str,
        *,
        authority: str = "shoal",
        sends_trace: bool = True,
        tick_s: float = TICK_S,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._address = address
        self._authority = authority
        self._sends_trace = sends_trace
        self._tick_s = tick_s
        self._draw = draw
        self._line: ClientConnection | None = None
        self._lines: set[ClientConnection] = set()
        """Those that are not lost: beside the one in use, those whose last calls are under way."""
        self._waiting: deque[Call] = deque()
        # As many as there are callers: each has its deadline, and takes itself out.
        self._connecting: asyncio.Task[None] | None = None
        self._failed = 0
        self._not_before = 0.0
        self._why = ""
        self._is_closed = False

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the calls that are under way or wait, and the connections."""
        connecting = self._connecting
        self.abort()
        if connecting is not None:
            await end(connecting)

    def abort(self) -> None:
        """Like `close`, for who cannot wait."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self._fail_waiting("the channel is closed")
        for line in tuple(self._lines):
            line.abort("the channel is closed")

    # -- calls

    async def unary(self, path: str, message: bytes, *, timeout_s: float | None, metadata: Metadata = ()) -> bytes:
        """Calls the method `path` (`/package.Service/Method`) with a serialised message, and gives the answer's.

        Args:
            timeout_s: seconds until DEADLINE_EXCEEDED, the wait for a connection with it. None: no deadline.
            metadata: values of names that end with `-bin` are bytes.

        Raises:
            CallFailed: with the status that the call ended with.
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
                call.future.exception()  # It had just ended: nobody else hears of it.
            raise

    def stream(self, path: str, *, timeout_s: float | None, metadata: Metadata = ()) -> StreamCall:
        """Begins a call of messages both ways. Arguments and errors as `unary`, the latter where the call is used."""
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
        line = self._line
        if call.timeout_s is not None and call.timeout_s <= 0:
            call.end(deadline_exceeded(is_unprocessed=True))
        elif line is not None and not self._waiting and line.takes():
            line.begin(call, has_waited=False)
        else:
            self._wait(call)

    def _wait(self, call: Call) -> None:
        if self._is_closed:
            call.end(self._unreached("the channel is closed"))
            return
        if self._line is None and self._connecting is None and not self._connect():
            call.end(self._unreached(self._why))
            return
        call.owner = self
        self._waiting.append(call)

    def _unreached(self, why: str) -> CallFailed:
        return CallFailed(S.UNAVAILABLE, f"cannot reach {self._address}: {why}", is_unprocessed=True)

    def _fail_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.end(self._unreached(why))

    # -- as the owner of calls that wait

    def drop(self, call: Call) -> None:
        """It waits no longer."""
        self._waiting.remove(call)

    def open_window(self, call: Call) -> None:
        """Nothing has come for a call that waits."""

    # -- as the owner of lines

    def has_room(self) -> None:
        """Those who wait begin, as many as there is room for."""
        line = self._line
        while self._waiting and line is not None and line.takes():
            line.begin(self._waiting.popleft(), has_waited=True)

    def repeat(self, call: Call) -> None:
        """A call that nobody has begun begins again, ahead of those who wait."""
        if self._is_closed or (self._line is None and self._connecting is None and not self._connect()):
            call.end(self._unreached(self._why or "the channel is closed"))
            return
        call.owner, call.number = self, 0
        call.is_sent = False
        self._waiting.appendleft(call)
        self.has_room()

    def retire(self, line: ClientConnection) -> None:
        """It takes no more calls; those who wait get another."""
        if line is not self._line:
            return
        self._line = None
        if line.has_answered:
            self._failed = 0
        else:
            self._pause("it was lost before it answered anything")
        if self._waiting and not self._connect():
            self._fail_waiting(self._why)

    def lost(self, line: ClientConnection) -> None:
        """It has ended."""
        self._lines.discard(line)

    # -- connecting

    def _connect(self) -> bool:
        """Begins to connect. False when it is too early for that after an attempt that failed."""
        loop = asyncio.get_running_loop()
        if self._is_closed or loop.time() < self._not_before:
            return False
        self._connecting = loop.create_task(self._open(), name=f"connect {self._address}")
        return True

    async def _open(self) -> None:
        line = ClientConnection(self, self._address, self._tick_s)
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._dial(line)
                self._lines.add(line)
                await line.ready
                if line.is_retired:  # All of this may have come in one piece.
                    raise ConnectionError("it said goodbye at once")
        except Exception as err:
            if not isinstance(err, OSError):  # A fault of ours, or an address that is none: those who wait hear of it.
                log.exception("cannot connect to %s", self._address)
            self._connecting = None
            why = str(err) or f"no connection within {_CONNECT_S:.0f} s"
            self._pause(why)
            self._give_up(line, why)
            self._fail_waiting(why)
        except asyncio.CancelledError:
            self._connecting = None
            self._give_up(line, "the channel is closed")
            raise
        else:
            self._connecting = None
            self._line = line
            self.has_room()

    async def _dial(self, line: ClientConnection) -> None:
        loop = asyncio.get_running_loop()
        if (path := sockets.path_of(self._address)) is not None:
            await loop.create_unix_connection(lambda: line, str(path))
        else:
            host, _, port = self._address.rpartition(":")
            await loop.create_connection(lambda: line, host.strip("[]"), int(port))

    def _give_up(self, line: ClientConnection, why: str) -> None:
        if line in self._lines:
            line.abort(why)
            self._lines.discard(line)
        if line.ready.done() and not line.ready.cancelled():
            line.ready.exception()  # Nobody else hears of it.

    def _pause(self, why: str) -> None:
        """Sets when to try again: half of the pause is drawn."""
        self._why = why
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failed)
        self._failed = min(self._failed + 1, 10)
        self._not_before = asyncio.get_running_loop().time() + pause_s * (0.5 + self._draw() / 2)
