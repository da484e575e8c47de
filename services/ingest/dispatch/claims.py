"""Who works on what: jobs are claimed, renewed, taken over and let go in bulk, each write fenced by its lease.

Several instances may do all of this at once. A claim is an update whose filter holds only for jobs that still wait, so
of two claimers the database lets one have a job; each then reads which ones carry its lease.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.clock import Clock
from services.ingest.documents import EVER, LIGHT, claiming, job_of, taking_over
from services.ingest.job import Job, Lease, claim, take_over

_CROWDED_SPREAD = 4
# Claimers that read the same head of the queue win a third of what they ask for; reading a head four times as long and
# picking from it at random lets two or three pass each other.


class Claims:
    """The leases of one instance. `process` is an id of this process, unlike that of any other with its name."""

    def __init__(
        self,
        jobs: AsyncCollection[Document],
        *,
        clock: Clock,
        new_id: Callable[[], str],
        owner: str,
        process: str,
        lease_ms: int,
    ) -> None:
        self._jobs = jobs
        self._clock = clock
        self._new_id = new_id
        self._owner = owner
        self._process = process
        self._lease_for = timedelta(milliseconds=lease_ms)
        self._spread = 1

    def lease(self, now: datetime) -> Lease:
        """A new lease from `now` on."""
        return Lease(self._new_id(), self._owner, self._process, now + self._lease_for)

    async def claim_due(self, limit: int, closed_models: Sequence[str]) -> tuple[list[Job], bool]:
        """Claims up to `limit` jobs that are due, the longest due first, with their requests.

        Also says whether more may be due than it saw.
        """
        now = self._clock()
        due: dict[str, Any] = {"due_at": {"$lte": now, "$gt": EVER}}
        if closed_models:
            due["model_name"] = {"$nin": list(closed_models)}
        with translated("claiming jobs"):
            cursor = self._jobs.find(due, {"_id": 1}).sort("due_at", 1).limit(limit * self._spread)
            seen = [document["_id"] async for document in cursor]
            ids = random.sample(seen, limit) if len(seen) > limit else seen
            if not ids:
                return [], False
            lease = self.lease(now)
            won = await self._jobs.update_many({"_id": {"$in": ids}, **due}, claiming(lease, now))
            self._spread = _CROWDED_SPREAD if won.modified_count * 2 < len(ids) else 1
            mine = await self._mine(ids, lease) if won.modified_count else []
            return mine, len(seen) >= limit

    async def claim_fresh(self, jobs: Sequence[Job]) -> list[Job]:
        """Claims jobs that this instance has just accepted and still has in memory: one write, and mostly no read."""
        now = self._clock()
        lease = self.lease(now)
        ids = [job.id for job in jobs]
        with translated("claiming fresh jobs"):
            untouched = {"_id": {"$in": ids}, "due_at": {"$gt": EVER}, "steps": 1}
            won = await self._jobs.update_many(untouched, claiming(lease, now))
            if won.modified_count == len(ids):
                return [claim(job, lease, now) for job in jobs]
            return await self._mine(ids, lease) if won.modified_count else []

    async def renew(self, held: Mapping[str, Lease]) -> set[str]:
        """Extends the leases `held` (by job id) and says which jobs were lost: another lease is on them, or none."""
        expires_at = self._clock() + self._lease_for
        ours = {"_id": {"$in": list(held)}, "lease.id": {"$in": list({lease.id for lease in held.values()})}}
        with translated("renewing leases"):
            renewed = await self._jobs.update_many(ours, {"$set": {"lease.expires_at": expires_at}})
            if renewed.matched_count == len(held):
                return set()
            cursor = self._jobs.find(ours, {"lease.id": 1})
            kept = {document["_id"] async for document in cursor if document["lease"]["id"] == held[document["_id"]].id}
        return held.keys() - kept

    async def take_lapsed(self, limit: int) -> list[tuple[Job, Lease]]:
        """Takes over up to `limit` jobs whose leases have lapsed; each with the lease that was lost."""
        now = self._clock()
        lapsed = {"lease.expires_at": {"$lte": now}}
        with translated("taking over jobs whose leases lapsed"):
            cursor = self._jobs.find(lapsed, LIGHT).sort("lease.expires_at", 1).limit(limit)
            before = {document["_id"]: job_of(document) async for document in cursor}
            if not before:
                return []
            lease = self.lease(now)
            await self._jobs.update_many({"_id": {"$in": list(before)}, **lapsed}, taking_over(lease))
            mine = await self._mine(list(before), lease, LIGHT)
        return [(job, lost) for job in mine if (lost := before[job.id].lease) is not None]

    async def take_expired(self, limit: int) -> list[Job]:
        """Takes up to `limit` jobs out of the queue whose deadlines have passed."""
        now = self._clock()
        expired = {"deadline": {"$lte": now, "$gt": EVER}, "due_at": {"$gt": EVER}}
        with translated("taking jobs past their deadline"):
            ids = [document["_id"] async for document in self._jobs.find(expired, {"_id": 1}).limit(limit)]
            if not ids:
                return []
            lease = self.lease(now)
            await self._jobs.update_many({"_id": {"$in": ids}, **expired}, taking_over(lease))
            return await self._mine(ids, lease, LIGHT)

    async def take_to_cancel(self, job_id: str, reason: str) -> Job | None:
        """Takes one job over, waiting or running, to end it as cancelled. None: it has ended, or is being cancelled."""
        lease = self.lease(self._clock())
        live = {
            "_id": job_id,
            "cancel": {"$exists": False},
            "$or": [{"due_at": {"$gt": EVER}}, {"lease.expires_at": {"$gt": EVER}}],
        }
        with translated("cancelling a job"):
            before = await self._jobs.find_one_and_update(live, taking_over(lease, reason), LIGHT)
        return None if before is None else take_over(job_of(before), lease, reason)

    async def inherit(self) -> int:
        """Lets the leases lapse that earlier processes of this instance's name left behind. Says how many."""
        left = {
            "lease.expires_at": {"$gt": EVER},
            "lease.owner": self._owner,
            "lease.process": {"$ne": self._process},
        }
        with translated("looking for leases of an earlier process"):
            lapsed = await self._jobs.update_many(left, {"$set": {"lease.expires_at": self._clock()}})
            return lapsed.modified_count

    async def _mine(self, ids: Sequence[str], lease: Lease, fields: Mapping[str, int] | None = None) -> list[Job]:
        cursor = self._jobs.find({"_id": {"$in": list(ids)}, "lease.id": lease.id}, fields)
        return [job_of(document) async for document in cursor]
