"""How a connector gets on: counts since its process started, and what its source says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from services.ingest.clock import Clock

_TEXT_CHARS = 500


@dataclass(frozen=True, slots=True)
class PartitionProgress:
    """Where one lane is."""

    lane: str
    committed: str = ""
    """Where it would go on after a restart; empty: nothing is committed yet."""
    lag: int | None = None
    """Messages between there and its end; None: the source does not know."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """Where a source is."""

    lanes: tuple[PartitionProgress, ...] = ()
    trouble: str = ""
    """What it cannot do just now."""
    lag_ms: int | None = None
    """How old the newest message that was read is behind the end, where the source tells time instead of messages."""

    @property
    def lag(self) -> int | None:
        """Messages that wait in all lanes held here; None: unknown."""
        known = [lane.lag for lane in self.lanes if lane.lag is not None]
        return sum(known) if known else None


class Phase(StrEnum):
    """What a connector does."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """Something is away, or failed: it tries again."""


class ConnectorProgress:
    """Counts of one connector."""

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

    def trouble(self, text: str) -> bool:
        """Something went wrong. Says whether that is news."""
        is_news = text != self.error or self.phase is not Phase.WAITING
        self.phase = Phase.WAITING
        self.error, self.error_at = text[:_TEXT_CHARS], self._clock()
        return is_news

    def status(self) -> SourceStatus:
        """Where the source is."""
        return self._status()
