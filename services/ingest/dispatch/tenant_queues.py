"""Which jobs are claimed next: of the tenants furthest behind, the longest waiting, priorities counted in.

    heads (lane -> its earliest due job) ──asks(room)──> so many of these lanes ──read──> pick ──claim──> claimed
      ^ listed now and then, noticed on submit                                                    │
      └──────────────────────── heads move on, clocks advance <───────────────────────────────────┘

Plain decisions; `claims.py` asks and claims. What is known of the heads may be old: a claim that finds less than it
expected forgets the lane until it is listed again, and jobs that turned up meanwhile are seen with the next listing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.ingest.dispatch.fairness import Clocks
from services.ingest.job_store import Waiting
from services.ingest.tenant_queue import TenantQueueKey

LANES_PER_CLAIM = 64
"""Lanes that one claim reads: a tenth of a millisecond each. With more tenants waiting, each claim serves the 64 that
are furthest behind, with more jobs each."""
_LANES_PER_TENANT = 8
# Of one tenant's lanes the longest waiting; more models and priorities take turns as these advance.


@dataclass(frozen=True, slots=True)
class Ask:
    """Up to `jobs` of `tenant` are wanted, from whichever of `lanes` has waited longest."""

    tenant: str
    jobs: int
    lanes: tuple[TenantQueueKey, ...]

    def limit(self, spread: int) -> int:
        """How many jobs of each lane are looked at: one more than may be taken, which will be the lane's next head."""
        return self.jobs * spread + 1


class TenantQueues:
    """What is known of the lanes that have jobs, and the order among them."""

    def __init__(self, weight_of: Callable[[str], float], ageing: timedelta) -> None:
        self._clocks = Clocks(weight_of)
        self._ageing = ageing
        self._heads: dict[str, dict[TenantQueueKey, datetime]] = {}
        self._news: set[TenantQueueKey] = set()
        # Noticed since the last `asks`: what that claim read is older than these.

    def listed(self, heads: Iterable[tuple[TenantQueueKey, datetime]]) -> None:
        """These are all lanes that have jobs, with the earliest due time of each."""
        self._heads = {}
        for lane, due_at in heads:
            self._heads.setdefault(lane.tenant, {})[lane] = due_at

    def noticed(self, lane: TenantQueueKey, due_at: datetime) -> None:
        """A job was put into `lane`."""
        lanes = self._heads.setdefault(lane.tenant, {})
        lanes[lane] = min(due_at, lanes.get(lane, due_at))
        self._news.add(lane)

    def has_due(self, now: datetime, closed: Collection[str]) -> bool:
        """Whether a job may be due whose model is not among `closed`."""
        return any(True for lanes in self._heads.values() for _ in self._due(lanes, now, closed))

    def due_models(self, now: datetime) -> set[str]:
        """The models that a job may be due of."""
        return {lane.model for lanes in self._heads.values() for lane, due_at in lanes.items() if due_at <= now}

    def asks(self, room: int, now: datetime, closed: Collection[str], spread: int = 1) -> list[Ask]:
        """What to look for, to claim up to `room` jobs.

        With a `spread` above 1, others claim at the same time: not all take the first in line.
        """
        self._news.clear()
        due = {tenant: lanes for tenant, known in self._heads.items() if (lanes := list(self._due(known, now, closed)))}
        most = min(room, LANES_PER_CLAIM)
        line = self._clocks.behind(due, most * spread)
        if len(line) > most:
            line = random.sample(line, most)
        each = min(_LANES_PER_TENANT, max(1, LANES_PER_CLAIM // len(line))) if line else 0
        shares = self._clocks.allot(line, room)
        return [Ask(tenant, jobs, self._oldest(tenant, due[tenant])[:each]) for tenant, jobs in shares.items()]

    def pick(self, asks: Sequence[Ask], seen: Mapping[TenantQueueKey, Sequence[Waiting]], spread: int = 1) -> list[str]:
        """The ids to claim. `seen` is the beginning of each lane, `Ask.limit` long unless it has less."""
        picked: list[str] = []
        for ask in asks:
            lanes = {lane: seen.get(lane, ()) for lane in ask.lanes}
            ordered = sorted((lane.age(due, self._ageing), id_) for lane, jobs in lanes.items() for due, id_ in jobs)
            first = [id_ for _, id_ in ordered[: ask.jobs * spread]]
            taken = random.sample(first, ask.jobs) if len(first) > ask.jobs else first
            picked += taken
            for lane, jobs in lanes.items():
                self._advance(lane, jobs, frozenset(taken))
        return picked

    def claimed(self, tenant: str, jobs: int) -> None:
        """So many jobs of `tenant` were claimed."""
        self._clocks.charge(tenant, jobs)

    def _due(
        self, lanes: Mapping[TenantQueueKey, datetime], now: datetime, closed: Collection[str]
    ) -> Iterable[TenantQueueKey]:
        return (lane for lane, due_at in lanes.items() if due_at <= now and lane.model not in closed)

    def _oldest(self, tenant: str, lanes: list[TenantQueueKey]) -> tuple[TenantQueueKey, ...]:
        if len(lanes) > 1:
            heads = self._heads[tenant]
            lanes.sort(key=lambda lane: lane.age(heads[lane], self._ageing))
        return tuple(lanes)

    def _advance(self, lane: TenantQueueKey, seen: Sequence[Waiting], taken: Collection[str]) -> None:
        lanes = self._heads.setdefault(lane.tenant, {})
        left = next((due_at for due_at, id_ in seen if id_ not in taken), None)
        if left is not None:
            lanes[lane] = left
        elif lane not in self._news:  # One more than is taken was asked for: that was all of it.
            lanes.pop(lane, None)
        if not lanes:
            del self._heads[lane.tenant]
