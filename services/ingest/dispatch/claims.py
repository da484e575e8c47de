"""Claims and leases of jobs: claimed, renewed and taken over in bulk; each write is fenced by a lease.

`tenant_queues.py` selects the next jobs. This module lists and reads the tenant queues, and claims the selected jobs.
The cost depends on the number of claimed jobs and of tenant queues, not on the number of queued jobs.

Several instances may claim concurrently: the job store (`job_store.py`) gives each job to one of them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta

from mesh.mongo_clock import earliest, latest
from services.ingest.dispatch.model_gate import ClosedQueue
from services.ingest.dispatch.tenant_queues import TenantQueues
from services.ingest.documents import EPOCH
from services.ingest.instance import Instance
from services.ingest.job import Job, Lease
from services.ingest.job_store import Claimed, JobStore, UnknownOutcome

# Concurrent claimers that read the same head of a queue win a third of the jobs they try. With heads four times as long
# and a random pick, two or three claimers rarely collide.
_CROWDED_SPREAD = 4
AGEING = timedelta(minutes=1)
# Ten thousand queues are listed in 40 ms: listing takes at most a twentieth of the time, and a job of another instance
# in an unknown queue is found within 100 ms.
_LIST_REST = 20
_SHORTEST_REST = timedelta(milliseconds=100)
# Bound of the queues known at a time, for memory. Beyond it, successive listings cover successive parts.
_LISTED_MOST = 20_000
# Bound of the claims with unknown outcome: at most one a second while MongoDB is unavailable.
_MAX_UNKNOWN = 100


def _equal_weight(tenant: str) -> float:
    return 1.0


class Claims:
    """Claims and leases of one instance."""

    def __init__(
        self,
        store: JobStore,
        instance: Instance,
        *,
        lease_ms: int,
        weight_of: Callable[[str], float] = _equal_weight,
        ageing: timedelta = AGEING,
    ) -> None:
        self._store = store
        self._instance = instance
        self._clock = instance.clock
        self._lease_for = timedelta(milliseconds=lease_ms)
        self._spread = 1
        self._queues = TenantQueues(weight_of, ageing)
        self._listed_at = EPOCH
        self._list_again = timedelta()
        self._listed_to = ""
        self._unknown_claims: deque[tuple[Lease, Sequence[str]]] = deque(maxlen=_MAX_UNKNOWN)
        """Claims with unknown outcome; none of their jobs has run."""

    def lease(self) -> Lease:
        """Return a new lease that starts now."""
        instance = self._instance
        return Lease(instance.new_id(), instance.name, instance.process, latest(self._clock) + self._lease_for)

    def note_queued(self, jobs: Sequence[Job]) -> None:
        """Note newly queued jobs, so that their tenant queues are known before the next listing."""
        for job in jobs:
            if job.due_at is not None:
                self._queues.add_head(job.tenant_queue, job.due_at)

    def take_turn(self, tenant: str) -> bool:
        """Charge a tenant without queued jobs for one job and return True, when it is next among all tenants."""
        return self._queues.take_turn(tenant)

    async def claim_due(self, limit: int, closed_queues: Collection[ClosedQueue]) -> tuple[list[Job], bool]:
        """Claim up to `limit` due jobs with their requests: fair among tenants, the longest waiting first.

        Return the jobs, and True when more jobs may be due.
        """
        closed = frozenset(closed_queues)
        if self._unknown_claims and (claimed := await self._resolve_unknown()):
            return claimed, True
        is_listed = await self._list_if_due()
        claimed = await self._claim_known(limit, closed)
        # Without a claimed job, the known queues are exhausted.
        if not claimed and not is_listed:
            await self._list()
            claimed = await self._claim_known(limit, closed)
        return claimed, self._queues.has_due(self._clock(), closed)

    def next_due(self) -> datetime | None:
        """Return the earliest due time that is to come, as far as this instance knows."""
        return self._queues.next_due(self._clock())

    def due_queues(self, closed: Collection[ClosedQueue]) -> set[ClosedQueue]:
        """Return the queues of jobs that may be due, as far as this instance knows (`TenantQueues.due_queues`)."""
        return self._queues.due_queues(self._clock(), closed)

    async def _claim_known(self, limit: int, closed: Collection[ClosedQueue]) -> list[Job]:
        now, spread = self._clock(), self._spread
        shares = self._queues.plan(limit, now, closed, spread)
        if not shares:
            return []
        seen = await self._store.heads(
            [(queue, share.limit(spread)) for share in shares for queue in share.queues], now
        )
        ids = self._queues.pick(shares, seen, spread)
        claimed = await self._claim(ids, now) if ids else []
        for tenant, jobs in Counter(job.tenant for job in claimed).items():
            self._queues.charge(tenant, jobs)
        return claimed

    async def _claim(self, ids: Sequence[str], now: datetime) -> list[Job]:
        lease = self.lease()
        claimed = self._checked(await self._store.claim(ids, lease, now), lease, ids)
        self._spread = _CROWDED_SPREAD if len(claimed.jobs) * 2 < len(ids) else 1
        return [*claimed.jobs]

    def _checked(self, outcome: Claimed | UnknownOutcome, lease: Lease, ids: Sequence[str]) -> Claimed:
        """Return the claim. When its outcome is unknown, remember it and raise its error."""
        if isinstance(outcome, UnknownOutcome):
            self._unknown_claims.append((lease, ids))
            raise outcome.error
        return outcome

    async def _resolve_unknown(self) -> list[Job]:
        """Return jobs that an earlier claim with unknown outcome has won: to be run before they lapse."""
        claimed: list[Job] = []
        while self._unknown_claims and not claimed:
            lease, ids = self._unknown_claims[0]
            claimed = await self._store.claimed_under(lease, ids)
            self._unknown_claims.popleft()
        return claimed

    async def _list_if_due(self) -> bool:
        if self._listed_at <= self._clock() < self._listed_at + self._list_again:
            return False
        await self._list()
        return True

    async def _list(self) -> None:
        started = time.monotonic()
        found = await self._store.tenant_queues(self._listed_to, _LISTED_MOST)
        self._queues.set_heads(found)
        self._listed_to = found[-1][0].text if len(found) == _LISTED_MOST else ""
        self._listed_at = self._clock()
        self._list_again = max(_SHORTEST_REST, _LIST_REST * timedelta(seconds=time.monotonic() - started))

    async def claim_accepted(self, jobs: Sequence[Job]) -> list[Job]:
        """Claim jobs that this instance has just accepted. They are in memory, so one write is enough in most cases."""
        lease = self.lease()
        outcome = await self._store.claim_accepted(jobs, lease, self._clock())
        return [*self._checked(outcome, lease, [job.id for job in jobs]).jobs]

    async def renew(self, held: Mapping[str, Lease]) -> set[str]:
        """Extend the leases `held`, by job id; return the ids of the jobs that these leases no longer hold."""
        return await self._store.renew(held, latest(self._clock) + self._lease_for)

    async def take_lapsed(self, limit: int, held: Collection[str] = ()) -> list[tuple[Job, Lease]]:
        """Take over up to `limit` jobs with lapsed leases; return each job with its former lease.

        Jobs in `held` are left out: this instance is alive, MongoDB was unavailable, and the renewal decides. Jobs of
        claims with unknown outcome are left out too: `claim_due` resolves these.
        """
        return await self._store.take_lapsed(
            earliest(self._clock),
            self.lease(),
            limit,
            but_ids=held,
            but_leases=[lease.id for lease, _ in self._unknown_claims],
        )

    async def take_expired(self, limit: int) -> list[Job]:
        """Take over up to `limit` queued jobs past their deadlines."""
        return await self._store.take_expired(self._clock(), self.lease(), limit)

    async def take_to_cancel(self, job_id: str, reason: str) -> Job | None:
        """Take over a queued or running job for cancellation. None: the job has ended or is being cancelled."""
        return await self._store.take_to_cancel(job_id, reason, self.lease())

    async def expire_inherited(self) -> int:
        """Expire the leases of earlier processes of this instance's name; return their number."""
        return await self._store.expire_leases(self._instance.name, self._instance.process, earliest(self._clock))

    async def add_tenant_queues(self) -> int:
        """Set the tenant queue of jobs that an earlier version queued; return their number."""
        return await self._store.add_tenant_queues()
