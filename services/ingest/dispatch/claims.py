"""Who works on what: jobs are claimed, renewed, taken over and let go in bulk, each write fenced by its lease.

Which jobs are next is decided in `lanes.py`; here the lanes are listed and read, and what was picked is claimed. All of
it costs by the number of jobs claimed and of lanes waiting, and not by how many jobs wait.

Several instances may do all of this at once: of two claimers the job store (`job_store.py`) lets one have a job.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta

from services.ingest.clock import earliest, latest
from services.ingest.dispatch.tenant_queues import TenantQueues
from services.ingest.documents import EPOCH
from services.ingest.instance import Instance
from services.ingest.job import Job, Lease
from services.ingest.job_store import Claimed, JobStore, Unknown

_CROWDED_SPREAD = 4
# Claimers that read the same head of the queue win a third of what they ask for; reading a head four times as long and
# picking from it at random lets two or three pass each other.
AGEING = timedelta(minutes=1)
_LIST_REST = 20
_SHORTEST_REST = timedelta(milliseconds=100)
# Ten thousand lanes are listed in 40 ms: listing takes at most a twentieth of the time, and what others submitted to a
# lane that nobody knew of here is seen within 100 ms.
_LISTED_MOST = 20_000
# Lanes known at a time, for memory's sake. With more, they take turns.
_UNCLEAR = 100
# Claims that MongoDB did not answer: one a second while it is away, if as many.


def _same(tenant: str) -> float:
    return 1.0


class Claims:
    """The leases of one instance."""

    def __init__(
        self,
        store: JobStore,
        instance: Instance,
        *,
        lease_ms: int,
        weight_of: Callable[[str], float] = _same,
        ageing: timedelta = AGEING,
    ) -> None:
        self._store = store
        self._instance = instance
        self._clock = instance.clock
        self._lease_for = timedelta(milliseconds=lease_ms)
        self._spread = 1
        self._lanes = TenantQueues(weight_of, ageing)
        self._listed_at = EPOCH
        self._list_again = timedelta()
        self._listed_to = ""
        self._unclear: deque[tuple[Lease, Sequence[str]]] = deque(maxlen=_UNCLEAR)
        """Claims whose outcome is unknown; none of their jobs has run."""

    def lease(self) -> Lease:
        """A new lease from now on."""
        here = self._instance
        return Lease(here.new_id(), here.name, here.process, latest(self._clock) + self._lease_for)

    def notice(self, jobs: Sequence[Job]) -> None:
        """Hears of jobs that were just put into the queue: their lanes need not be listed to be found."""
        for job in jobs:
            if job.due_at is not None:
                self._lanes.noticed(job.tenant_queue, job.due_at)

    async def claim_due(self, limit: int, closed_models: Sequence[str]) -> tuple[list[Job], bool]:
        """Claims up to `limit` jobs that are due, with their requests: fairly among tenants, the longest waiting first.

        Also says whether more may be due than it claimed.
        """
        closed = frozenset(closed_models)
        if self._unclear and (mine := await self._cleared_up()):
            return mine, True
        is_listed = await self._list_now_and_then()
        mine = await self._claim_known(limit, closed)
        # With nothing claimed, the known lanes are used up.
        if not mine and not is_listed:
            await self._list()
            mine = await self._claim_known(limit, closed)
        return mine, self._lanes.has_due(self._clock(), closed)

    def due_models(self) -> set[str]:
        """The models that a job may be due of, as far as is known here."""
        return self._lanes.due_models(self._clock())

    async def _claim_known(self, limit: int, closed: Collection[str]) -> list[Job]:
        now, spread = self._clock(), self._spread
        asks = self._lanes.asks(limit, now, closed, spread)
        if not asks:
            return []
        seen = await self._store.heads([(queue, ask.limit(spread)) for ask in asks for queue in ask.lanes], now)
        ids = self._lanes.pick(asks, seen, spread)
        mine = await self._claim(ids, now) if ids else []
        for tenant, jobs in Counter(job.tenant for job in mine).items():
            self._lanes.claimed(tenant, jobs)
        return mine

    async def _claim(self, ids: Sequence[str], now: datetime) -> list[Job]:
        lease = self.lease()
        claimed = self._known(await self._store.claim(ids, lease, now), lease, ids)
        self._spread = _CROWDED_SPREAD if len(claimed.jobs) * 2 < len(ids) else 1
        return [*claimed.jobs]

    def _known(self, outcome: Claimed | Unknown, lease: Lease, ids: Sequence[str]) -> Claimed:
        """Return the claim; one whose outcome is unknown is noted and raised."""
        if isinstance(outcome, Unknown):
            self._unclear.append((lease, ids))
            raise outcome.error
        return outcome

    async def _cleared_up(self) -> list[Job]:
        """Jobs that an earlier claim has taken after all: to be run, before they lapse."""
        mine: list[Job] = []
        while self._unclear and not mine:
            lease, ids = self._unclear[0]
            mine = await self._store.claimed_under(lease, ids)
            self._unclear.popleft()
        return mine

    async def _list_now_and_then(self) -> bool:
        if self._listed_at <= self._clock() < self._listed_at + self._list_again:
            return False
        await self._list()
        return True

    async def _list(self) -> None:
        started = time.monotonic()
        found = await self._store.tenant_queues(self._listed_to, _LISTED_MOST)
        self._lanes.listed(found)
        self._listed_to = found[-1][0].text if len(found) == _LISTED_MOST else ""
        self._listed_at = self._clock()
        self._list_again = max(_SHORTEST_REST, _LIST_REST * timedelta(seconds=time.monotonic() - started))

    async def claim_accepted(self, jobs: Sequence[Job]) -> list[Job]:
        """Claims jobs that this instance has just accepted and still has in memory: one write, and mostly no read."""
        lease = self.lease()
        outcome = await self._store.claim_accepted(jobs, lease, self._clock())
        return [*self._known(outcome, lease, [job.id for job in jobs]).jobs]

    async def renew(self, held: Mapping[str, Lease]) -> set[str]:
        """Extends the leases `held` (by job id) and says which jobs were lost: another lease is on them, or none."""
        return await self._store.renew(held, latest(self._clock) + self._lease_for)

    async def take_lapsed(self, limit: int, held: Collection[str] = ()) -> list[tuple[Job, Lease]]:
        """Takes over up to `limit` jobs whose leases have lapsed; each with the lease that was lost.

        Not those that are `held` here: nobody died, MongoDB was away, and the lease is renewed, or found to be lost.
        Nor those that a claim of here may have taken, which is cleared up.
        """
        return await self._store.take_lapsed(
            earliest(self._clock),
            self.lease(),
            limit,
            but_ids=held,
            but_leases=[lease.id for lease, _ in self._unclear],
        )

    async def take_expired(self, limit: int) -> list[Job]:
        """Takes up to `limit` jobs out of the queue whose deadlines have passed."""
        return await self._store.take_expired(self._clock(), self.lease(), limit)

    async def take_to_cancel(self, job_id: str, reason: str) -> Job | None:
        """Takes one job over, waiting or running, to end it as cancelled. None: it has ended, or is being cancelled."""
        return await self._store.take_to_cancel(job_id, reason, self.lease())

    async def expire_inherited(self) -> int:
        """Lets the leases lapse that earlier processes of this instance's name left behind. Says how many."""
        return await self._store.expire_leases(self._instance.name, self._instance.process, earliest(self._clock))

    async def add_tenant_queues(self) -> int:
        """Gives lanes to jobs that were put into the queue before there were any. Says how many."""
        return await self._store.add_tenant_queues()
