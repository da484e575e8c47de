"""Progress of a connector: counts since its process started, and the status of its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from mesh.mongo_clock import Clock

_TEXT_CHARS = 500


@dataclass(frozen=True, slots=True)
class PartitionProgress:
    """Progress of one partition or shard."""

    name: str
    committed: str = ""
    """Committed position, at which a restart continues; empty: nothing is committed yet."""
    lag: int | None = None
    """Messages between the committed position and the end; None: unknown."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """Status of a source."""

    partitions: tuple[PartitionProgress, ...] = ()
    problem: str = ""
    """Error that the source retries at the moment; empty: none."""
    lag_ms: int | None = None
    """Lag behind the end in ms, for sources that report time instead of messages."""

    @property
    def lag(self) -> int | None:
        """Lag in messages of all partitions that are assigned here; None: unknown."""
        known = [partition.lag for partition in self.partitions if partition.lag is not None]
        return sum(known) if known else None


class Phase(StrEnum):
    """Phase of a connector."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """A dependency is unavailable or failed; the connector retries."""


class ConnectorProgress:
    """Progress of one connector: counts, phase and last error."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._status: Callable[[], SourceStatus] = SourceStatus
        self.phase = Phase.STARTING
        self.messages = 0
        self.answered = 0
        self.dead = 0
        self.in_flight = 0
        self.error = ""
        self.error_at: datetime | None = None

    @property
    def settled(self) -> int:
        return self.answered + self.dead

    def started(self, status: Callable[[], SourceStatus]) -> None:
        self._status = status
        self.phase = Phase.RUNNING

    def stopped(self) -> None:
        self._status = SourceStatus
        self.phase = Phase.WAITING

    def received(self) -> None:
        self.messages += 1
        self.in_flight += 1

    def left(self) -> None:
        self.in_flight -= 1

    def done(self, *, is_dead: bool) -> None:
        self.phase = Phase.RUNNING
        if is_dead:
            self.dead += 1
        else:
            self.answered += 1

    def record_error(self, text: str) -> bool:
        """Record an error. Return True when it differs from the last one, or the connector was running."""
        is_news = text != self.error or self.phase is not Phase.WAITING
        self.phase = Phase.WAITING
        self.error, self.error_at = text[:_TEXT_CHARS], self._clock()
        return is_news

    def status(self) -> SourceStatus:
        """Return the status of the source."""
        return self._status()
