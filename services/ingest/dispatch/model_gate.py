"""Gate per model: while no instance serves a model, its jobs stay in the queue.

    OPEN ──refused──> CLOSED until a time ──that time──> OPEN for a trial ──passed──> OPEN

Without the gate, an outage would cycle the whole backlog at full speed, with two database writes per job, and delay the
jobs of models that are served.
"""

from __future__ import annotations

from datetime import datetime, timedelta

FIRST_MS = 100
LONGEST_MS = 2_000
"""Bounds of the doubling pause: short enough to notice the end of an outage soon, long enough to cost nothing."""
# Bound of the list that a claim excludes; further unserved models only cost some writes.
_MODELS_KEPT = 100


class ModelGate:
    """Closed models, each with the time at which it opens."""

    def __init__(self) -> None:
        self._closed: dict[str, tuple[datetime, float]] = {}

    def refused(self, model: str, now: datetime, retry_after_ms: int = 0) -> None:
        """Close `model` for a while after a job reached no instance. Refusals while it is closed have no effect."""
        until, pause_ms = self._closed.get(model, (now, FIRST_MS / 2))
        if until > now:
            return
        pause_ms = min(pause_ms * 2, LONGEST_MS)
        self._closed.pop(model, None)
        if len(self._closed) >= _MODELS_KEPT:
            self._closed.pop(next(iter(self._closed)))
        self._closed[model] = (now + timedelta(milliseconds=max(pause_ms, retry_after_ms)), pause_ms)

    def passed(self, model: str) -> None:
        """Open `model` after a job reached an instance."""
        self._closed.pop(model, None)

    def closed(self, now: datetime) -> list[str]:
        """Return the models that are closed at `now`."""
        return [model for model, (until, _) in self._closed.items() if until > now]
