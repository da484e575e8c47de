"""Calls over the lean client of the mesh: to nodes on this machine, where grpc.aio's own time is most of a call's."""

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

from mesh.rpc.client.channel import Channel
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.client.stubs import fed, feed, parsed
from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.transport import A, Bidi, Metadata, closed_meanwhile, serialized

logging.getLogger("mesh.h2").addHandler(logging.NullHandler())
# What it warns of, a caller is told as an error: not on stderr too, where no logging was asked for.

_TICK_S = 10.0
# A node that hangs is asked after 10 to 20 s of silence, and given up 20 s later. More often is abuse to a server of
# grpc as it comes (`too_many_pings`): it would end calls that say nothing for 40 s.


class Lean:
    """A Transport."""

    def __init__(self, address: str) -> None:
        authority = "localhost" if address.startswith("unix:") else address  # As grpc has it.
        self._channel = Channel(address, authority=authority, sends_trace=False, tick_s=_TICK_S)
        self._is_closed = False
        # Of a client that nobody closed, the loop would keep the connection for as long as it runs.
        self._let_go = weakref.finalize(self, _let_go, asyncio.get_running_loop(), self._channel)
        self._let_go.atexit = False

    async def unary(self, method: Method[Q, R], request: Q, *, timeout_s: float, metadata: Metadata) -> R:
        with self.not_closed_meanwhile():
            data = await self._channel.unary(method.path, serialized(request), timeout_s=timeout_s, metadata=metadata)
        answer: R = parsed(data, method.response.FromString)
        return answer

    def stream(
        self, method: Method[Q, R], requests: Q | AsyncIterator[Q], *, timeout_s: float | None, metadata: Metadata
    ) -> Bidi[R]:
        call = self._channel.stream(method.path, timeout_s=timeout_s, metadata=metadata)
        return _Stream(self, call, method.response, requests)

    async def close(self) -> None:
        self._is_closed = True
        self._let_go.detach()
        await self._channel.close()

    @contextmanager
    def not_closed_meanwhile(self) -> Iterator[None]:
        """The end of the channel is not a loss of the connection, which would be tried again."""
        try:
            yield
        except grpc.aio.AioRpcError:
            if self._is_closed:
                raise closed_meanwhile() from None
            raise


def _let_go(loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
    with suppress(RuntimeError):  # The loop has ended, and the connection with it.
        loop.call_soon_threadsafe(channel.abort)


class _Stream(Bidi[A]):
    def __init__(self, owner: Lean, call: StreamCall, answer: type[A], requests: Any) -> None:
        self._owner = owner
        self._call = call
        self._answer = answer
        self._feeding: asyncio.Task[None] | None = None
        if isinstance(requests, Message):
            call.write(serialized(requests))
            call.half_close()
        else:
            self._feeding = asyncio.create_task(feed(call, requests, serialized), name="requests of a call")
            self._feeding.add_done_callback(partial(fed, call))

    async def read(self) -> A | None:
        with self._owner.not_closed_meanwhile():
            data = await anext(self._call, None)
        return None if data is None else parsed(data, self._answer.FromString)

    def cancel(self) -> None:
        self._call.cancel()
        if self._feeding is not None:
            self._feeding.cancel()
