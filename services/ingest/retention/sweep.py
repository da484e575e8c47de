"""Sweep of the leader: removes jobs past their retention, with their requests.

    each final state ──by id, a page at a time──> past retention? ──> removed, if unchanged
                         └─ from the end of the previous round; once a day from the beginning

Ids rise with the time of submission, so recently submitted jobs need no check. A job that was within its retention when
its page was read (it ran long, or its tenant keeps it longer) is checked again a day later. Two concurrent leaders do
no harm: a removal applies only to a job that ended in this state, this long ago, which excludes a requeued dead letter.
A job that another job waits for stays: the other job must be able to read its end, after any outage. So does an unmet
dependency of a dead letter, which a requeue would wait for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock, milliseconds
from mesh.process.tasks import Background, for_ever
from services.ingest.dependencies.references import by_key
from services.ingest.documents import LIGHT, job_of
from services.ingest.intake.payloads import Payloads
from services.ingest.job import FINAL, Job, State
from services.ingest.retention.retention_repository import RetentionRepository
from services.ingest.retention.rules import Rules
from services.ingest.ulid import floor

log = logging.getLogger(__name__)

PAGE_JOBS = 500
"""Jobs of one read and removal: a few dozen milliseconds of MongoDB's time."""
ROUND_S = 30.0
_AGAIN = timedelta(days=1)
_UNAVAILABLE_WAIT_S = 5.0


class JobSweep(Background):
    """Background removal of jobs while `leads()` returns True. Used as `async with`."""

    def __init__(
        self,
        jobs: AsyncCollection[Document],
        payloads: Payloads,
        repository: RetentionRepository,
        *,
        leads: Callable[[], bool],
        clock: Clock,
        ready: asyncio.Event,
        round_s: float = ROUND_S,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Store what a round needs; `check` runs before each round (mesh.removal_guard)."""
        self._jobs = jobs
        self._payloads = payloads
        self._repository = repository
        self._leads = leads
        self._clock = clock
        self._ready = ready
        self._round_s = round_s
        self._check = check
        self._swept_to: dict[State, str] = {}
        self._began_at: datetime | None = None
        self._rules: Rules | None = None

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("remove jobs past their retention", self._run_round, away_s=_UNAVAILABLE_WAIT_S, log=log)

    async def _run_round(self) -> float:
        # Also before this instance leads: the first check must precede what is recorded now.
        if self._check is not None:
            await self._check()
        if self._leads():
            await self.round()
        return self._round_s

    async def round(self) -> int:
        """Remove expired jobs while this instance leads; return their number.

        Raises:
            ShoalError: MongoDB is unavailable.
        """
        now = self._clock()
        rules = await self._repository.read()
        if self._began_at is None or now - self._began_at >= _AGAIN or rules != self._rules:
            self._began_at, self._rules = now, rules
            self._swept_to.clear()
        removed = 0
        for state in sorted(FINAL):
            while self._leads():
                page, many = await self._page(state, rules, now)
                removed += many
                if not page:
                    break
        if removed:
            log.info("removed %(jobs)d jobs past their retention", {"event": "jobs.removed", "jobs": removed})
        return removed

    async def _page(self, state: State, rules: Rules, now: datetime) -> tuple[bool, int]:
        """Remove the expired jobs of the next page; return True when there may be more, and the number removed."""
        shortest = rules.shortest(state)
        if shortest is None:
            return False, 0
        span = {"$gt": self._swept_to.get(state, ""), "$lt": floor(max(0, milliseconds(now - shortest)))}
        with translated("finding jobs past their retention"):
            cursor = self._jobs.find({"state": str(state), "_id": span}, LIGHT).sort("_id", 1).limit(PAGE_JOBS)
            jobs = [job_of(document) async for document in cursor]
        expired = await self._without_dependents([job for job in jobs if rules.is_expired(job, now)])
        if expired:
            await self._remove(expired, state, now - shortest)
        if jobs:
            self._swept_to[state] = jobs[-1].id
        return len(jobs) == PAGE_JOBS, len(expired)

    async def _without_dependents(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that no other job waits for, or would wait for after a requeue."""
        names = [*(job.id for job in jobs), *(by_key(job.key) for job in jobs if job.key)]
        awaited: set[tuple[str, str]] = set()
        with translated("finding jobs that wait for dependencies"):
            for field in ("waits_for", "unmet"):
                cursor = self._jobs.find({field: {"$in": names}}, {"tenant": 1, field: 1})
                awaited |= {(one["tenant"], reference) async for one in cursor for reference in one[field]}
        return [job for job in jobs if not awaited & {(job.tenant, job.id), (job.tenant, by_key(job.key))}]

    async def _remove(self, expired: Sequence[Job], state: State, before: datetime) -> None:
        ids = [job.id for job in expired]
        with translated("removing jobs past their retention"):
            await self._jobs.delete_many({"_id": {"$in": ids}, "state": str(state), "updated_at": {"$lt": before}})
            left = {document["_id"] async for document in self._jobs.find({"_id": {"$in": ids}}, {"_id": 1})}
        await self._payloads.drop([job.id for job in expired if job.is_apart and job.id not in left])
