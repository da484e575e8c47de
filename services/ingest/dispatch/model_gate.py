"""Gate per model: while no instance serves a model, its jobs stay in the queue.

    OPEN ──refused──> CLOSED until a time ──that time──> OPEN for a trial ──passed──> OPEN

A limit of the policy closes a model for the jobs of one tenant alone, for as long as the refusal says.

Without the gate, an outage would cycle the whole backlog at full speed, with two database writes per job, and delay the
jobs of models that are served.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import TypeAlias

ClosedQueue: TypeAlias = str | tuple[str, str]
"""Jobs that are not claimed now: those of a model, or of a tenant and a model."""


FIRST_MS = 100
LONGEST_MS = 2_000
"""Bounds of the doubling pause: short enough to notice the end of an outage soon, long enough to cost nothing."""
# Bound of the list that a claim excludes; further unserved models only cost some writes.
_MODELS_KEPT = 100
# Bound of the tenants' closed models; further ones only cost some writes, too.
_LIMITED_KEPT = 1_000


def is_closed(tenant: str, model: str, closed: Collection[ClosedQueue]) -> bool:
    """Return True when `closed` has the jobs of a tenant and a model."""
    return model in closed or (tenant, model) in closed


class ModelGate:
    """Closed models, each with the time at which it opens."""

    def __init__(self) -> None:
        self._closed: dict[str, tuple[datetime, float]] = {}
        self._limited: dict[tuple[str, str], datetime] = {}

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

    def limited(self, tenant: str, model: str, now: datetime, retry_after_ms: int) -> None:
        """Close `model` for the jobs of `tenant`, of which a limit of the policy has refused one."""
        if self._limited.get((tenant, model), now) > now:
            return
        self._limited = {key: until for key, until in self._limited.items() if until > now}
        if len(self._limited) < _LIMITED_KEPT:
            pause_ms = min(max(FIRST_MS, retry_after_ms), LONGEST_MS)
            self._limited[tenant, model] = now + timedelta(milliseconds=pause_ms)

    def closed(self, now: datetime) -> list[ClosedQueue]:
        """Return what is closed at `now`."""
        models = [model for model, (until, _) in self._closed.items() if until > now]
        return [*models, *(key for key, until in self._limited.items() if until > now)]
