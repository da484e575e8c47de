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
        with self.closed_as_cancelled():
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
    def closed_as_cancelled(self) -> Iterator[None]:
        """Raise Cancelled for calls that ended because the channel was closed, not because their task was cancelled."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.is_closed and task is not None and not task.cancelling():
                raise closed_in_flight() from None
            raise


class _Stream(Bidi[A]):
    def __init__(self, owner: GrpcAio, call: Any, feeding: asyncio.Task[None] | None = None) -> None:
        self._owner = owner
        self._call = call
        self._feeding = feeding

    async def read(self) -> A | None:
        try:
            with self._owner.closed_as_cancelled():
                response: Any = await self._call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._has_failed_requests() and task is not None and not task.cancelling():
                empty = grpc.aio.Metadata()
                raise grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, empty, empty, "its requests failed") from None
            raise
        return None if response is grpc.aio.EOF else response

    def cancel(self) -> None:
        self._call.cancel()
        if self._feeding is not None:
            self._feeding.cancel()

    def _has_failed_requests(self) -> bool:
        feeding = self._feeding
        return feeding is not None and feeding.done() and not feeding.cancelled() and feeding.exception() is not None


async def _feed(call: Any, requests: AsyncIterator[Message]) -> None:
    """Send all requests. Raises the errors of `requests`.

    Neither by grpc.aio's iteration over requests nor by its `write`: when the call ends meanwhile, the first cancels
    it, the second replaces its status by INTERNAL.
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
