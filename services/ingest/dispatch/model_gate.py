"""A gate per model: while nobody is there to run a model, its jobs stay in the queue and are not churned through.

    OPEN ──refused──> CLOSED until a moment ──that moment──> OPEN again (a few are tried) ──passed──> OPEN, forgotten

Without it an outage would send the whole backlog to a dead end, two database writes a job, at full speed; and jobs of
models that are there would wait behind.
"""

from __future__ import annotations

from datetime import datetime, timedelta

FIRST_MS = 100
LONGEST_MS = 2_000
"""Pauses double between these: short enough to see the end of an outage soon, long enough to cost nothing."""
_MODELS_KEPT = 100
# Bounds the list that a claim excludes; more models than this refusing at once are only churned a little.


class ModelGate:
    """Which models are closed, and until when."""

    def __init__(self) -> None:
        self._closed: dict[str, tuple[datetime, float]] = {}

    def refused(self, model: str, now: datetime, retry_after_ms: int = 0) -> None:
        """A job of `model` found nobody: no claims for a while. Refusals during that while are one with the first."""
        until, pause_ms = self._closed.get(model, (now, FIRST_MS / 2))
        if until > now:
            return
        pause_ms = min(pause_ms * 2, LONGEST_MS)
        self._closed.pop(model, None)
        if len(self._closed) >= _MODELS_KEPT:
            self._closed.pop(next(iter(self._closed)))
        self._closed[model] = (now + timedelta(milliseconds=max(pause_ms, retry_after_ms)), pause_ms)

    def passed(self, model: str) -> None:
        """A job of `model` reached it."""
        self._closed.pop(model, None)

    def closed(self, now: datetime) -> list[str]:
        """Models that are not to be claimed now."""
        return [model for model, (until, _) in self._closed.items() if until > now]
