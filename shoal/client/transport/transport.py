"""What carries calls to a node: one of two ways, which look alike from here.

    Caller ──> Transport ──> lean      this machine: mesh.rpc.client, less processor time a call
                        └──> grpc_aio  everywhere else: names with several addresses, HTTP proxies, long networks

Either fails with grpc.aio.AioRpcError, which `failures` explains, and with Cancelled when it is closed meanwhile.
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
"""Largest message that is sent or accepted: what the services take, too."""

A = TypeVar("A", bound=Message)
"""The answers of a stream."""


class Bidi(ABC, Generic[A]):
    """A stream of answers. Iterate it, or `read`; one reader at a time."""

    @abstractmethod
    async def read(self) -> A | None:
        """The next answer; None at the end."""

    @abstractmethod
    def cancel(self) -> None:
        """Ends the call, if it has not ended. What has come and was not read is dropped."""

    def __aiter__(self) -> Bidi[A]:
        return self

    async def __anext__(self) -> A:
        answer = await self.read()
        if answer is None:
            raise StopAsyncIteration
        return answer


class Transport(Protocol):
    """A connection to one address, made when it is needed, and again after a loss."""

    async def unary(self, method: Method[Q, R], request: Q, *, timeout_s: float, metadata: Metadata) -> R:
        """One answer to one request."""

    def stream(
        self, method: Method[Q, R], requests: Q | AsyncIterator[Q], *, timeout_s: float | None, metadata: Metadata
    ) -> Bidi[R]:
        """The answers to one request, or to a stream of requests. `timeout_s` None: there is no deadline.

        Whoever calls this cancels what comes of it. What `requests` raises ends the call, and is not told: a source
        keeps its errors aside.
        """

    async def close(self) -> None:
        """Ends calls in flight, and the connection."""


def closed_meanwhile() -> Cancelled:
    """What a call in flight fails with when its client is closed."""
    return Cancelled("the client was closed while the call was in flight")


def serialized(message: Any) -> bytes:
    """The bytes of a protobuf message."""
    data: bytes = message.SerializeToString()
    return data
