"""Selection of the next jobs to claim: of the tenants furthest behind, the longest waiting, weighted by priority.

    heads (tenant queue -> earliest due time) ──plan(capacity)──> shares ──read──> pick ──claim──> charge
      ^ set by listings, added on submit                                                    │
      └──────────────────────── heads and clocks advance <──────────────────────────────────┘

Pure decisions; `claims.py` reads and claims. The heads may be stale. A claim that finds fewer jobs than expected drops
the queue until the next listing, which also finds jobs that other instances have added.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.ingest.dispatch.fairness import TenantClocks
from services.ingest.dispatch.model_gate import ClosedQueue, is_closed
from services.ingest.job_store import Waiting
from services.ingest.tenant_queue import TenantQueueKey

QUEUES_PER_CLAIM = 64
"""Maximum tenant queues that one claim reads, a tenth of a millisecond each. With more tenants waiting, each claim
serves the 64 that are furthest behind, with more jobs each."""
# The longest waiting queues of one tenant; further models and priorities follow as these advance.
_QUEUES_PER_TENANT = 8


@dataclass(frozen=True, slots=True)
class QueueShare:
    """Share of one tenant in a claim: up to `jobs`, the longest waiting in `queues`."""

    tenant: str
    jobs: int
    spare: int
    """Number of further jobs that it may have of what other tenants leave."""
    queues: tuple[TenantQueueKey, ...]

    def limit(self, spread: int) -> int:
        """Return the number of jobs to read from each queue: one more than may be claimed, the queue's next head."""
        return (self.jobs + self.spare) * spread + 1


class TenantQueues:
    """Known tenant queues that have jobs, and the order among them."""

    def __init__(self, weight_of: Callable[[str], float], ageing: timedelta) -> None:
        self._clocks = TenantClocks(weight_of)
        self._ageing = ageing
        self._heads: dict[str, dict[TenantQueueKey, datetime]] = {}
        # Queues added since the last `plan`, whose reads are older.
        self._recent: set[TenantQueueKey] = set()

    def set_heads(self, heads: Iterable[tuple[TenantQueueKey, datetime]]) -> None:
        """Replace the known queues by `heads`: all queues that have jobs, with their earliest due times."""
        self._heads = {}
        for queue, due_at in heads:
            self._heads.setdefault(queue.tenant, {})[queue] = due_at

    def add_head(self, queue: TenantQueueKey, due_at: datetime) -> None:
        """Note a new job in `queue`."""
        queues = self._heads.setdefault(queue.tenant, {})
        queues[queue] = min(due_at, queues.get(queue, due_at))
        self._recent.add(queue)

    def has_due(self, now: datetime, closed: Collection[ClosedQueue]) -> bool:
        """Return True when a job may be due whose queue is not closed."""
        return any(True for queues in self._heads.values() for _ in self._due(queues, now, closed))

    def next_due(self, now: datetime) -> datetime | None:
        """Return the earliest due time after `now`; None when no known queue has one."""
        return min((at for queues in self._heads.values() for at in queues.values() if at > now), default=None)

    def due_queues(self, now: datetime, closed: Collection[ClosedQueue]) -> set[ClosedQueue]:
        """Return the models of jobs that may be due; of jobs that are closed for their tenant alone, both."""
        queues = {queue for heads in self._heads.values() for queue, due_at in heads.items() if due_at <= now}
        return {
            (queue.tenant, queue.model)
            if queue.model not in closed and (queue.tenant, queue.model) in closed
            else queue.model
            for queue in queues
        }

    def plan(self, capacity: int, now: datetime, closed: Collection[ClosedQueue], spread: int = 1) -> list[QueueShare]:
        """Return the shares of tenants in a claim of up to `capacity` jobs.

        A `spread` above 1 is for concurrent claimers: the claim then picks randomly among more jobs.
        """
        self._recent.clear()
        due = {
            tenant: queues for tenant, known in self._heads.items() if (queues := list(self._due(known, now, closed)))
        }
        most = min(capacity, QUEUES_PER_CLAIM)
        tenants = self._clocks.furthest_behind(due, most * spread)
        if len(tenants) > most:
            tenants = random.sample(tenants, most)
        each = min(_QUEUES_PER_TENANT, max(1, QUEUES_PER_CLAIM // len(tenants))) if tenants else 0
        shares = self._clocks.allot(tenants, capacity)
        spare = capacity // len(shares) if len(shares) > 1 else 0
        return [
            QueueShare(tenant, jobs, min(spare, capacity - jobs), self._oldest(tenant, due[tenant])[:each])
            for tenant, jobs in shares.items()
        ]

    def pick(
        self, shares: Sequence[QueueShare], seen: Mapping[TenantQueueKey, Sequence[Waiting]], spread: int = 1
    ) -> list[str]:
        """Return the ids to claim. `seen` has the first jobs of each queue, `QueueShare.limit` of them if there are."""
        picked: list[str] = []
        counts = [sum(len(seen.get(queue, ())) for queue in share.queues) for share in shares]
        left = sum(max(0, share.jobs - count) for share, count in zip(shares, counts, strict=True))
        for share, count in zip(shares, counts, strict=True):
            more = max(0, min(left, share.spare, count - share.jobs))
            most, left = share.jobs + more, left - more
            if count < most and len(share.queues) >= len(self._heads.get(share.tenant, ())):
                self._clocks.becomes_idle(share.tenant)
            queues = {queue: seen.get(queue, ()) for queue in share.queues}
            ordered = sorted((queue.age(due, self._ageing), id_) for queue, jobs in queues.items() for due, id_ in jobs)
            first = [id_ for _, id_ in ordered[: most * spread]]
            picked_here = random.sample(first, most) if len(first) > most else first
            picked += picked_here
            for queue, jobs in queues.items():
                self._advance(queue, jobs, frozenset(picked_here))
        return picked

    def charge(self, tenant: str, jobs: int) -> None:
        """Charge `tenant` for claimed jobs."""
        self._clocks.charge(tenant, jobs)

    def take_turn(self, tenant: str) -> bool:
        """Charge a tenant without queued jobs for one job and return True, when it is next among all tenants."""
        return tenant not in self._heads and self._clocks.take_turn(tenant)

    def _due(
        self, queues: Mapping[TenantQueueKey, datetime], now: datetime, closed: Collection[ClosedQueue]
    ) -> Iterable[TenantQueueKey]:
        return (
            queue
            for queue, due_at in queues.items()
            if due_at <= now and not is_closed(queue.tenant, queue.model, closed)
        )

    def _oldest(self, tenant: str, queues: list[TenantQueueKey]) -> tuple[TenantQueueKey, ...]:
        if len(queues) > 1:
            heads = self._heads[tenant]
            queues.sort(key=lambda queue: queue.age(heads[queue], self._ageing))
        return tuple(queues)

    def _advance(self, queue: TenantQueueKey, seen: Sequence[Waiting], picked_here: Collection[str]) -> None:
        queues = self._heads.setdefault(queue.tenant, {})
        left = next((due_at for due_at, id_ in seen if id_ not in picked_here), None)
        if left is not None:
            queues[queue] = left
        # The read asked for one job more than the claim takes, so the queue is empty now.
        elif queue not in self._recent:
            queues.pop(queue, None)
        if not queues:
            del self._heads[queue.tenant]
