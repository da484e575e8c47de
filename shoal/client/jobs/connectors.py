"""Status of the connectors of a node."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from shoal.client.models.registry import of_time
from shoal.ingest.v1 import ingest_pb2 as ingest


class ConnectorPhase(StrEnum):
    """Activity of a connector."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """The connector retries: a dependency is unavailable, or a step failed."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class ConnectorLane:
    """Status of one partition, shard or subscription of a source."""

    lane: str
    committed: str
    """Position from which a restarted connector continues."""
    lag: int | None
    """Messages between that position and the end; None: the source does not report it."""


@dataclass(frozen=True)
class Connector:
    """Status of a connector at one ingest instance. Counters start with that instance."""

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
    """True when the instance has not reported for 10 s."""
    lanes: tuple[ConnectorLane, ...]


def of_connector(message: ingest.Connector) -> Connector:
    """Return the Connector of a message."""
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
