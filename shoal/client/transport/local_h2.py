"""Transport over mesh.h2, for nodes on this machine, where most of a call's time would be grpc.aio's own.

A forked child whose parent has used grpc.aio uses this transport for other machines, too.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from mesh.rpc.client.channel import Channel, Tls
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.client.stubs import cancel_if_failed, feed, parsed
from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.security import Security
from shoal.client.transport.transport import A, Bidi, Metadata, closed_in_flight, serialized

# The caller gets these warnings as errors: without this handler, Python also prints them to stderr.
logging.getLogger("mesh.h2").addHandler(logging.NullHandler())

# A silent node is pinged after 10 to 20 s and given up 20 s later. A grpc server with default settings counts more
# frequent pings as abuse (`too_many_pings`), and would end calls that are silent for 40 s.
_TICK_S = 10.0


class LocalH2:
    """Transport over a mesh.h2 channel."""

    def __init__(self, address: str, security: Security | None = None) -> None:
        # The authority that grpc sends for a Unix socket.
        authority = "localhost" if address.startswith("unix:") else address
        tls = None
        if security is not None:
            tls = Tls(security.context, security.name or address.rpartition(":")[0].strip("[]"))
        self._channel = Channel(address, authority=authority, sends_trace=False, tick_s=_TICK_S, tls=tls)
        self._is_closed = False
        # Without this, the loop would keep the connection of an unclosed client for as long as the loop runs.
        self._finalizer = weakref.finalize(self, _finalizer, asyncio.get_running_loop(), self._channel)
        self._finalizer.atexit = False

    async def unary(self, method: Method[Q, R], request: Q, *, timeout_s: float | None, metadata: Metadata) -> R:
        with self.closed_as_cancelled():
            data = await self._channel.unary(method.path, serialized(request), timeout_s=timeout_s, metadata=metadata)
        response: R = parsed(data, method.response.FromString)
        return response

    def stream(
        self, method: Method[Q, R], requests: Q | AsyncIterator[Q], *, timeout_s: float | None, metadata: Metadata
    ) -> Bidi[R]:
        call = self._channel.stream(method.path, timeout_s=timeout_s, metadata=metadata)
        return _Stream(self, call, method.response, requests)

    async def close(self) -> None:
        self._is_closed = True
        self._finalizer.detach()
        await self._channel.close()

    def leave_to_parent(self) -> None:
        self._finalizer.detach()
        self._channel.leave_to_parent()

    @contextmanager
    def closed_as_cancelled(self) -> Iterator[None]:
        """Raise Cancelled for calls that failed because the channel was closed, which must not be retried."""
        try:
            yield
        except grpc.aio.AioRpcError:
            if self._is_closed:
                raise closed_in_flight() from None
            raise


def _finalizer(loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
    # RuntimeError: the loop has ended, and the connection with it.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(channel.abort)


class _Stream(Bidi[A]):
    def __init__(self, owner: LocalH2, call: StreamCall, response: type[A], requests: Any) -> None:
        self._owner = owner
        self._call = call
        self._response = response
        self._feeding: asyncio.Task[None] | None = None
        if isinstance(requests, Message):
            call.write(serialized(requests))
            call.half_close()
        else:
            self._feeding = asyncio.create_task(feed(call, requests, serialized), name="requests of a call")
            self._feeding.add_done_callback(partial(cancel_if_failed, call))

    async def read(self) -> A | None:
        with self._owner.closed_as_cancelled():
            data = await anext(self._call, None)
        return None if data is None else parsed(data, self._response.FromString)

    def cancel(self) -> None:
        self._call.cancel()
        if self._feeding is not None:
            self._feeding.cancel()
