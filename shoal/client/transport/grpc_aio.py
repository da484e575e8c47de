"""Transport over grpc.aio, for nodes on other machines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from shoal.client.transport import forks
from shoal.client.transport.methods import Method, Q, R
from shoal.client.transport.security import Security
from shoal.client.transport.transport import MESSAGE_BYTES, A, Bidi, Metadata, closed_in_flight, serialized

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # A node that vanished silently is noticed within 25 s, not after the kernel's timeout of minutes.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A restarting node is back within seconds; grpc's default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_has_channels = False
_is_lost = False


def is_usable() -> bool:
    """Return False in a forked child whose parent has used grpc.aio.

    grpc's threads do not survive the fork: every call of the child would wait for ever, on a new channel, too.
    """
    return not _is_lost


def _after_fork() -> None:
    global _is_lost
    if _has_channels:
        _is_lost = True
        forks.leave_garbage()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class GrpcAio:
    """Transport over a grpc.aio channel."""

    def __init__(self, address: str, security: Security | None = None) -> None:
        global _has_channels
        _has_channels = True
        if security is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            named = (("grpc.ssl_target_name_override", security.name),) if security.name else ()
            self._channel = grpc.aio.secure_channel(address, security.grpc_credentials(), options=(*_OPTIONS, *named))
        self.is_closed = False

    async def unary(self, method: Method[Q, R], request: Q, *, timeout_s: float | None, metadata: Metadata) -> R:
        call = self._channel.unary_unary(method.path, serialized, method.response.FromString)
        with self.cancelled_as_error():
            response: R = await call(request, timeout=timeout_s, metadata=grpc.aio.Metadata(*metadata))
        return response

    def stream(
        self, method: Method[Q, R], requests: Q | AsyncIterator[Q], *, timeout_s: float | None, metadata: Metadata
    ) -> Bidi[R]:
        parse, sent = method.response.FromString, grpc.aio.Metadata(*metadata)
        if isinstance(requests, Message):
            call: Any = self._channel.unary_stream(method.path, serialized, parse)
            return _Stream(self, call(requests, timeout=timeout_s, metadata=sent))
        call = self._channel.stream_stream(method.path, None, parse)(timeout=timeout_s, metadata=sent)
        feeding = asyncio.create_task(_feed(call, requests), name="requests of a call")
        feeding.add_done_callback(partial(_cancel_if_failed, call))
        return _Stream(self, call, feeding)

    async def close(self) -> None:
        self.is_closed = True
        await self._channel.close()

    def leave_to_parent(self) -> None:
        """Do nothing: the child keeps the channel untouched, and uses none of its own (`is_usable`)."""

    @contextmanager
    def cancelled_as_error(self) -> Iterator[None]:
        """Raise CancelledError only when this task was cancelled: grpc.aio raises it also when the call was.

        Raises:
            Cancelled: the channel was closed.
            grpc.aio.AioRpcError: the call was cancelled, as when its requests fail.
        """
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            if self.is_closed:
                raise closed_in_flight() from None
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, empty, empty, "the call was cancelled") from None


class _Stream(Bidi[A]):
    def __init__(self, owner: GrpcAio, call: Any, feeding: asyncio.Task[None] | None = None) -> None:
        self._owner = owner
        self._call = call
        self._feeding = feeding

    async def read(self) -> A | None:
        with self._owner.cancelled_as_error():
            response: Any = await self._call.read()
        return None if response is grpc.aio.EOF else response

    def cancel(self) -> None:
        self._call.cancel()
        if self._feeding is not None:
            self._feeding.cancel()


async def _feed(call: Any, requests: AsyncIterator[Message]) -> None:
    """Send all requests. Raises the errors of `requests`.

    grpc.aio can do this itself, but cancels a call that ends while it iterates, and its `write` replaces the status of
    a call that ends meanwhile by INTERNAL. So the requests go to the layer below `write`, where this grpc.aio has it.
    """
    try:
        await call.wait_for_connection()
    except grpc.aio.AioRpcError:
        return
    send = getattr(getattr(call, "_cython_call", None), "send_serialized_message", call.write)
    async for request in requests:
        data = serialized(request)
        # An error: the call has ended, and its reader gets the status.
        try:
            await send(data)
        except Exception:
            return
    with suppress(Exception):
        await call.done_writing()


def _cancel_if_failed(call: Any, feeding: asyncio.Task[None]) -> None:
    if feeding.cancelled() or feeding.exception() is None:
        return
    # Imported here: the import takes 40 ms.
    from mesh.rpc.client.stubs import cancel_if_failed

    cancel_if_failed(call, feeding)
