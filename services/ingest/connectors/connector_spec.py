"""Specification of a connector, and the interfaces `Source` and `Sink` that every broker implements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.ingest.connectors.formats import Format
from services.ingest.connectors.message import Message, Outgoing
from services.ingest.connectors.progress import SourceStatus
from shoal.ingest.v1 import ingest_pb2 as pb


class Source(AbstractAsyncContextManager[Any], Protocol):
    """Source of messages. Open while its block lasts; leaving the block commits what is settled."""

    async def receive(self, limit: int) -> Sequence[Message]:
        """Wait for 1 to `limit` messages. Without calls, the broker is held back. Raises ShoalError."""

    def settle(self, message: Message) -> None:
        """Mark a message as done. The source may commit it once all before it in its partition are done."""

    def status(self) -> SourceStatus:
        """Return the lag of the source, by partition."""


class Sink(AbstractAsyncContextManager[Any], Protocol):
    """Destination of messages. Open while its block lasts."""

    async def send(self, message: Outgoing) -> None:
        """Send a message; return when it is durable at the broker.

        Raises:
            InvalidArgument: the broker rejects the message for good (too large, ...). ShoalError: retry later.
        """


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Source and sinks of a connector, made anew for each start."""

    source: Source
    dead_letters: Sink
    sink: Sink | None = None
    """None: the results are only in the store."""


@dataclass(frozen=True, slots=True)
class ConnectorSpec:
    """Specification of a connector."""

    name: str
    format: Format
    open: Callable[[], Endpoints]
    tenant: str = ""
    retry: pb.RetryPolicy = field(default_factory=pb.RetryPolicy)
    deadline_s: float | None = None
    labels: tuple[tuple[str, str], ...] = ()
    max_in_flight: int = 256
    max_bytes: int = 32 << 20
