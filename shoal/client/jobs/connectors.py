"""Connectors, as an operator sees them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from shoal.client.models.registry import of_time
from shoal.ingest.v1 import ingest_pb2 as ingest


class ConnectorPhase(StrEnum):
    """What a connector does."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """Something is away, or failed: it tries again."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class ConnectorLane:
    """A partition, a shard, a subscription."""

    lane: str
    committed: str
    """Where it would go on after a restart."""
    lag: int | None
    """Messages between there and its end; None: the source does not know."""


@dataclass(frozen=True)
class Connector:
    """A connector at one ingest instance. Counts are since that instance started."""

    name: str
    instance: str
    phase: ConnectorPhase
    source: str
    sink: str
    dead_letters: str
    model_name: str
    model_version: str
    tenant: str
    messages: int
    answered: int
    dead: int
    in_flight: int
    lag: int | None
    lag_ms: int | None
    last_error: str
    last_error_at: datetime | None
    updated_at: datetime | None
    stale: bool
    """The instance has not been heard of for 10 s."""
    lanes: tuple[ConnectorLane, ...]


def of_connector(message: ingest.Connector) -> Connector:
    """The value of the message."""
    phases = {ingest.ConnectorPhase.Value(f"CONNECTOR_PHASE_{phase.name}"): phase for phase in list(ConnectorPhase)[:3]}
    return Connector(
        name=message.name,
        instance=message.instance,
        phase=phases.get(message.phase, ConnectorPhase.UNKNOWN),
        source=message.source,
        sink=message.sink,
        dead_letters=message.dead_letters,
        model_name=message.model_name,
        model_version=message.model_version,
        tenant=message.tenant,
        messages=message.messages,
        answered=message.answered,
        dead=message.dead,
        in_flight=message.in_flight,
        lag=message.lag if message.HasField("lag") else None,
        lag_ms=message.lag_ms if message.HasField("lag_ms") else None,
        last_error=message.last_error,
        last_error_at=of_time(message, "last_error_at"),
        updated_at=of_time(message, "updated_at"),
        stale=message.stale,
        lanes=tuple(
            ConnectorLane(lane.lane, lane.committed, lane.lag if lane.HasField("lag") else None)
            for lane in message.lanes
        ),
    )
