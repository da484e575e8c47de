"""The leader's duty: jobs that have stayed long enough are removed, with their requests.

    each final state ──by id, a page at a time──> whose time is over? ──> removed, as they were read
                         └─ from where the round before ended; once a day from the beginning

Ids rise with the time of submission, so what was submitted too late to be over needs no look. A job that was still
young when its page was read (it took long, or its tenant keeps it longer) is looked at again a day later. Two leaders
at once would do no harm: a removal demands that the job has ended so, so long ago. A dead letter that was requeued has
not. What another job still waits for stays too: that one is to see how it ended, however long nobody was there to look.
So does what a dead letter has waited for in vain, and would wait for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever
from services.ingest.clock import Clock, milliseconds
from services.ingest.dependencies.references import by_key
from services.ingest.documents import WITHOUT_REQUEST, job_of
from services.ingest.intake.payloads import Payloads
from services.ingest.job import FINAL, Job, State
from services.ingest.retention.retention_repository import RetentionRepository
from services.ingest.retention.rules import Rules
from services.ingest.ulid import floor

log = logging.getLogger(__name__)

PAGE_JOBS = 500
"""Read and removed at once: a few dozen milliseconds of MongoDB's time."""
ROUND_S = 30.0
_AGAIN = timedelta(days=1)
_UNAVAILABLE_WAIT_S = 5.0


class Sweep(Background):
    """Removes jobs while `leads()`, beside an `async with` block."""

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
    ) -> None:
        self._jobs = jobs
        self._payloads = payloads
        self._repository = repository
        self._leads = leads
        self._clock = clock
        self._ready = ready
        self._round_s = round_s
        self._swept_to: dict[State, str] = {}
        self._began_at: datetime | None = None
        self._rules: Rules | None = None

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("remove jobs that have stayed long enough", self._run_round, away_s=_UNAVAILABLE_WAIT_S, log=log)

    async def _run_round(self) -> float:
        if self._leads():
            await self.round()
        return self._round_s

    async def round(self) -> int:
        """Removes what is over, for as long as this instance leads. Says how many.

        Raises:
            ShoalError: MongoDB is away.
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
            log.info("removed %d jobs that had stayed long enough", removed)
        return removed

    async def _page(self, state: State, rules: Rules, now: datetime) -> tuple[bool, int]:
        """Whether there may be more to look at, and how many were removed."""
        shortest = rules.shortest(state)
        if shortest is None:
            return False, 0
        span = {"$gt": self._swept_to.get(state, ""), "$lt": floor(max(0, milliseconds(now - shortest)))}
        with translated("looking for jobs that have stayed long enough"):
            cursor = (
                self._jobs.find({"state": str(state), "_id": span}, WITHOUT_REQUEST).sort("_id", 1).limit(PAGE_JOBS)
            )
            jobs = [job_of(document) async for document in cursor]
        expired = await self._without_dependents([job for job in jobs if rules.is_expired(job, now)])
        if expired:
            await self._remove(expired, state, now - shortest)
        if jobs:
            self._swept_to[state] = jobs[-1].id
        return len(jobs) == PAGE_JOBS, len(expired)

    async def _without_dependents(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that no other job waits for any more, or would if it were requeued."""
        names = [*(job.id for job in jobs), *(by_key(job.key) for job in jobs if job.key)]
        awaited: set[tuple[str, str]] = set()
        with translated("looking for jobs that wait for others"):
            for field in ("waits_for", "unmet"):
                cursor = self._jobs.find({field: {"$in": names}}, {"tenant": 1, field: 1})
                awaited |= {(one["tenant"], reference) async for one in cursor for reference in one[field]}
        return [job for job in jobs if not awaited & {(job.tenant, job.id), (job.tenant, by_key(job.key))}]

    async def _remove(self, expired: Sequence[Job], state: State, before: datetime) -> None:
        ids = [job.id for job in expired]
        with translated("removing jobs that have stayed long enough"):
            await self._jobs.delete_many({"_id": {"$in": ids}, "state": str(state), "updated_at": {"$lt": before}})
            left = {document["_id"] async for document in self._jobs.find({"_id": {"$in": ids}}, {"_id": 1})}
        await self._payloads.drop([job.id for job in expired if job.is_apart and job.id not in left])
