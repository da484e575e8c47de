"""Channel interface for generated stubs: each kind of method is a function of request, `timeout` and `metadata`.

    StoreServiceStub(channel).PutResults(request, timeout=10)

Calls of grpc.aio are objects; these are coroutines (one response) or async generators (several). `timeout` is required.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias

import grpc

from mesh.process.tasks import end, log_failure
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.client.request import Metadata
from mesh.rpc.client.streams import StreamCall

Write: TypeAlias = Callable[[Any], bytes] | None
Read: TypeAlias = Callable[[bytes], Any] | None
One: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]
Many: TypeAlias = Callable[..., AsyncGenerator[Any, None]]


def _identity(value: Any) -> Any:
    return value


class StubChannel(ABC):
    """Base class of a channel, with the methods that generated stubs use."""

    @abstractmethod
    async def unary(self, path: str, message: bytes, *, timeout_s: float | None, metadata: Metadata = ()) -> bytes:
        """Call a unary method."""

    @abstractmethod
    def stream(self, path: str, *, timeout_s: float | None, metadata: Metadata = ()) -> StreamCall:
        """Begin a call with messages in both directions."""

    def unary_unary(
        self, path: str, request_serializer: Write = None, response_deserializer: Read = None, **_: Any
    ) -> One:
        write, read = request_serializer or _identity, response_deserializer or _identity

        async def call(request: Any, *, timeout: float, metadata: Metadata = ()) -> Any:
            return parsed(await self.unary(path, write(request), timeout_s=timeout, metadata=metadata), read)

        return call

    def unary_stream(
        self, path: str, request_serializer: Write = None, response_deserializer: Read = None, **_: Any
    ) -> Many:
        write, read = request_serializer or _identity, response_deserializer or _identity

        async def call(request: Any, *, timeout: float, metadata: Metadata = ()) -> AsyncGenerator[Any, None]:
            async with self.stream(path, timeout_s=timeout, metadata=metadata) as stream:
                stream.write(write(request))
                stream.half_close()
                async for message in stream:
                    yield parsed(message, read)

        return call

    def stream_unary(
        self, path: str, request_serializer: Write = None, response_deserializer: Read = None, **_: Any
    ) -> One:
        write, read = request_serializer or _identity, response_deserializer or _identity

        async def call(requests: AsyncIterator[Any], *, timeout: float, metadata: Metadata = ()) -> Any:
            async with self.stream(path, timeout_s=timeout, metadata=metadata) as stream:
                await feed(stream, requests, write)
                return parsed(await stream.only(), read)

        return call

    def stream_stream(
        self, path: str, request_serializer: Write = None, response_deserializer: Read = None, **_: Any
    ) -> Many:
        write, read = request_serializer or _identity, response_deserializer or _identity

        async def call(
            requests: AsyncIterator[Any], *, timeout: float, metadata: Metadata = ()
        ) -> AsyncGenerator[Any, None]:
            async with self.stream(path, timeout_s=timeout, metadata=metadata) as stream:
                feeding = asyncio.create_task(feed(stream, requests, write), name="requests of a call")
                feeding.add_done_callback(partial(cancel_if_failed, stream))
                try:
                    async for message in stream:
                        yield parsed(message, read)
                finally:
                    await end(feeding)

        return call


def parsed(message: bytes, read: Callable[[bytes], Any]) -> Any:
    """Return a response parsed by `read`. Raises CallFailed for a response that cannot be parsed."""
    try:
        return read(message)
    except Exception as err:
        raise CallFailed(grpc.StatusCode.INTERNAL, f"the response is no message of the expected type: {err}") from err


async def feed(stream: StreamCall, requests: AsyncIterator[Any], write: Callable[[Any], bytes]) -> None:
    """Send all requests, as fast as flow control allows. Raises the call's failure, and errors of `requests`."""
    async for request in requests:
        stream.write(write(request))
        await stream.drain()
        # The response ended before the requests.
        if stream.is_over:
            return
    stream.half_close()


def cancel_if_failed(stream: StreamCall, feeding: asyncio.Task[None]) -> None:
    """Cancel the call when iterating over its requests has failed; a done callback of the task of `feed`."""
    if not feeding.cancelled() and feeding.exception() is not None and not isinstance(feeding.exception(), CallFailed):
        log_failure(feeding)
        stream.cancel()
