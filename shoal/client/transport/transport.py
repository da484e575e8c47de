"""Transport interface: the connection that carries calls to a node, with two implementations.

    Caller ──> Transport ──> local_h2  this machine: mesh.rpc.client, less processor time a call
                        └──> grpc_aio  other machines: names with several addresses, HTTP proxies, long networks

Both raise grpc.aio.AioRpcError, which `failures` converts, and Cancelled when the transport is closed meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message

from shoal.client.transport.methods import Method, Q, R
from shoal.errors import Cancelled

Metadata: TypeAlias = Iterable[tuple[str, str]]

MESSAGE_BYTES = 128 << 20
"""Size limit of messages sent and accepted; the services have the same."""

A = TypeVar("A", bound=Message)
"""Type of a stream's responses."""


class Bidi(ABC, Generic[A]):
    """Stream of responses. Iterate it or call `read`; one reader at a time."""

    @abstractmethod
    async def read(self) -> A | None:
        """Return the next response; None at the end."""

    @abstractmethod
    def cancel(self) -> None:
        """End the call, if it has not ended. Received responses that were not read are dropped."""

    def __aiter__(self) -> Bidi[A]:
        return self

    async def __anext__(self) -> A:
        response = await self.read()
        if response is None:
            raise StopAsyncIteration
        return response


class Transport(Protocol):
    """Connection to one address, opened when it is needed and reopened after a loss. Used by one event loop."""

    async def unary(self, method: Method[Q, R], request: Q, *, timeout_s: float | None, metadata: Metadata) -> R:
        """Return the response to one request. `timeout_s` None: no deadline."""

    def stream(
        self, method: Method[Q, R], requests: Q | AsyncIterator[Q], *, timeout_s: float | None, metadata: Metadata
    ) -> Bidi[R]:
        """Return the responses to one request, or to a stream of requests. `timeout_s` None: no deadline.

        The caller of this method cancels the returned stream. An error of `requests` ends the call and is not reported:
        the source must keep its error.
        """

    async def close(self) -> None:
        """Cancel the calls in flight and close the connection."""

    def leave_to_parent(self) -> None:
        """Give the connection up in a forked child: send nothing on it, and do not keep it open."""


def closed_in_flight() -> Cancelled:
    """Return the error of a call in flight whose client is closed."""
    return Cancelled("the client was closed while the call was in flight")


def serialized(message: Any) -> bytes:
    """Return the bytes of a protobuf message."""
    data: bytes = message.SerializeToString()
    return data
