"""Calls over grpc.aio: to nodes on other machines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.transport import MESSAGE_BYTES, A, Bidi, Metadata, closed_meanwhile, serialized

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # A node that vanished without a word is noticed within 25 s of a call, not after the kernel's minutes.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A node that restarts is back within seconds; grpc's own backoff would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class GrpcAio:
    """A Transport."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self.is_closed = False

    async def unary(self, method: Method[Q, R], request: Q, *, timeout_s: float, metadata: Metadata) -> R:
        call = self._channel.unary_unary(method.path, serialized, method.response.FromString)
        with self.not_closed_meanwhile():
            answer: R = await call(request, timeout=timeout_s, metadata=grpc.aio.Metadata(*metadata))
        return answer

    def stream(
        self, method: Method[Q, R], requests: Q | AsyncIterator[Q], *, timeout_s: float | None, metadata: Metadata
    ) -> Bidi[R]:
        channel = self._channel
        make = channel.unary_stream if isinstance(requests, Message) else channel.stream_stream
        call: Any = make(method.path, serialized, method.response.FromString)
        return _Stream(self, call(requests, timeout=timeout_s, metadata=grpc.aio.Metadata(*metadata)))

    async def close(self) -> None:
        self.is_closed = True
        await self._channel.close()

    @contextmanager
    def not_closed_meanwhile(self) -> Iterator[None]:
        """grpc cancels what is in flight when the channel is closed; that must not look like a cancelled task."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.is_closed and task is not None and not task.cancelling():
                raise closed_meanwhile() from None
            raise


class _Stream(Bidi[A]):
    def __init__(self, owner: GrpcAio, call: Any) -> None:
        self._owner = owner
        self._call = call

    async def read(self) -> A | None:
        with self._owner.not_closed_meanwhile():
            answer: Any = await self._call.read()
        return None if answer is grpc.aio.EOF else answer

    def cancel(self) -> None:
        self._call.cancel()
