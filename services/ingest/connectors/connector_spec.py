"""What a connector does, and the two kinds of ends that every broker has."""

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
    """Where messages come from. Open while its block lasts; leaving it commits what is settled."""

    async def receive(self, limit: int) -> Sequence[Message]:
        """Waits for messages, 1 to `limit`. Not to call it holds the broker back. Raises ShoalError."""

    def settle(self, message: Message) -> None:
        """The message is done with: the source may forget it, once all before it in its lane are done with too."""

    def status(self) -> SourceStatus:
        """How far it is behind, by lane."""


class Sink(AbstractAsyncContextManager[Any], Protocol):
    """Where messages go. Open while its block lasts."""

    async def send(self, message: Outgoing) -> None:
        """Returns when the message is durable there.

        Raises:
            InvalidArgument: it will never take this one (too large, ...). ShoalError: not now.
        """


@dataclass(frozen=True, slots=True)
class Endpoints:
    """A connector's ends, fresh for each start."""

    source: Source
    dead_letters: Sink
    sink: Sink | None = None
    """None: the results only lie in the store."""


@dataclass(frozen=True, slots=True)
class ConnectorSpec:
    """What a connector does."""

    name: str
    format: Format
    open: Callable[[], Endpoints]
    tenant: str = ""
    retry: pb.RetryPolicy = field(default_factory=pb.RetryPolicy)
    deadline_s: float | None = None
    labels: tuple[tuple[str, str], ...] = ()
    max_in_flight: int = 256
    max_bytes: int = 32 << 20
