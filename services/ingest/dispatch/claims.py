"""Who works on what: jobs are claimed, renewed, taken over and let go in bulk, each write fenced by its lease.

Which jobs are next is decided in `lanes.py`; here the lanes are listed and read, and what was picked is claimed. All of
it costs by the number of jobs claimed and of lanes waiting, and not by how many jobs wait.

Several instances may do all of this at once. A claim is an update whose filter holds only for jobs that still wait, so
of two claimers the database lets one have a job; each then reads which ones carry its lease.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

from pymongo import UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError

from mesh.mongo import Document, translated
from services.ingest.clock import Clock, earliest, latest
from services.ingest.dispatch.lanes import Ask, Lanes, Waiting
from services.ingest.documents import EACH_LANE, EVER, LIGHT, WAITING, claiming, job_of, taking_over
from services.ingest.job import Job, Lease, claim, take_over
from services.ingest.lane import Lane, lane_of

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
_LINED_UP = 1_000
_UNCLEAR = 100
# Claims that MongoDB did not answer: one a second while it is away, if as many.
_LANED = {"tenant": 1, "model_name": 1}


def _same(tenant: str) -> float:
    return 1.0


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
        weight_of: Callable[[str], float] = _same,
        ageing: timedelta = AGEING,
    ) -> None:
        self._jobs = jobs
        self._clock = clock
        self._new_id = new_id
        self._owner = owner
        self._process = process
        self._lease_for = timedelta(milliseconds=lease_ms)
        self._spread = 1
        self._lanes = Lanes(weight_of, ageing)
        self._listed_at = EVER
        self._list_again = timedelta()
        self._listed_to = ""
        self._unclear: deque[tuple[Lease, Sequence[str]]] = deque(maxlen=_UNCLEAR)
        """Claims of which MongoDB did not say whether they were made: no job of theirs has run."""

    def lease(self) -> Lease:
        """A new lease from now on."""
        return Lease(self._new_id(), self._owner, self._process, latest(self._clock) + self._lease_for)

    def notice(self, jobs: Sequence[Job]) -> None:
        """Hears of jobs that were just put into the queue: their lanes need not be listed to be found."""
        for job in jobs:
            if job.due_at is not None:
                self._lanes.noticed(job.lane, job.due_at)

    async def claim_due(self, limit: int, closed_models: Sequence[str]) -> tuple[list[Job], bool]:
        """Claims up to `limit` jobs that are due, with their requests: fairly among tenants, the longest waiting first.

        Also says whether more may be due than it claimed.
        """
        closed = frozenset(closed_models)
        with translated("claiming jobs"):
            if self._unclear and (mine := await self._cleared_up()):
                return mine, True
            is_listed = await self._list_now_and_then()
            mine = await self._claim_known(limit, closed)
            if not mine and not is_listed:  # What was known is used up.
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
        ids = self._lanes.pick(asks, await self._seen(asks, now, spread), spread)
        mine = await self._claim(ids, now) if ids else []
        for tenant, jobs in Counter(job.tenant for job in mine).items():
            self._lanes.claimed(tenant, jobs)
        return mine

    async def _claim(self, ids: Sequence[str], now: datetime) -> list[Job]:
        lease = self.lease()
        due = {"_id": {"$in": ids}, "due_at": {"$lte": now, "$gt": EVER}}
        with self._unclear_when_broken(lease, ids):
            won = await self._jobs.update_many(due, claiming(lease, now))
            self._spread = _CROWDED_SPREAD if won.modified_count * 2 < len(ids) else 1
            return await self._mine(ids, lease) if won.modified_count else []

    @contextmanager
    def _unclear_when_broken(self, lease: Lease, ids: Sequence[str]) -> Iterator[None]:
        try:
            yield
        except PyMongoError:
            self._unclear.append((lease, ids))
            raise

    async def _cleared_up(self) -> list[Job]:
        """Jobs that an earlier claim has taken after all: to be run, before they lapse."""
        mine: list[Job] = []
        while self._unclear and not mine:
            lease, ids = self._unclear[0]
            mine = await self._mine(ids, lease)
            self._unclear.popleft()
        return mine

    async def _seen(self, asks: Sequence[Ask], now: datetime, spread: int) -> dict[Lane, list[Waiting]]:
        """The beginning of each lane that is asked for: one round trip, and no document is read."""
        pipeline, *others = [_head(lane, ask.limit(spread), now) for ask in asks for lane in ask.lanes]
        for other in others:
            pipeline.append({"$unionWith": {"coll": self._jobs.name, "pipeline": other}})
        seen: dict[Lane, list[Waiting]] = {}
        async for found in await self._jobs.aggregate(pipeline):
            seen.setdefault(lane_of(found["lane"]), []).append((found["due_at"], found["_id"]))
        return seen

    async def _list_now_and_then(self) -> bool:
        if self._listed_at <= self._clock() < self._listed_at + self._list_again:
            return False
        await self._list()
        return True

    async def _list(self) -> None:
        started = time.monotonic()
        lanes: Document = {**WAITING, "lane": {"$gt": self._listed_to}}
        heads: list[Document] = [
            {"$match": lanes},
            *EACH_LANE,
            {"$sort": {"_id": 1}},
            {"$limit": _LISTED_MOST},
        ]
        found = [
            (document["_id"], document["due_at"]) async for document in await self._jobs.aggregate(heads, hint="lanes")
        ]
        self._lanes.listed((lane_of(text), due_at) for text, due_at in found)
        self._listed_to = found[-1][0] if len(found) == _LISTED_MOST else ""
        self._listed_at = self._clock()
        self._list_again = max(_SHORTEST_REST, _LIST_REST * timedelta(seconds=time.monotonic() - started))

    async def claim_fresh(self, jobs: Sequence[Job]) -> list[Job]:
        """Claims jobs that this instance has just accepted and still has in memory: one write, and mostly no read."""
        now = self._clock()
        lease = self.lease()
        ids = [job.id for job in jobs]
        with translated("claiming fresh jobs"):
            untouched = {"_id": {"$in": ids}, "due_at": {"$gt": EVER}, "steps": 1}
            with self._unclear_when_broken(lease, ids):
                won = await self._jobs.update_many(untouched, claiming(lease, now))
                if won.modified_count == len(ids):
                    return [claim(job, lease, now) for job in jobs]
                return await self._mine(ids, lease) if won.modified_count else []

    async def renew(self, held: Mapping[str, Lease]) -> set[str]:
        """Extends the leases `held` (by job id) and says which jobs were lost: another lease is on them, or none."""
        expires_at = latest(self._clock) + self._lease_for
        ours = {"_id": {"$in": list(held)}, "lease.id": {"$in": list({lease.id for lease in held.values()})}}
        with translated("renewing leases"):
            renewed = await self._jobs.update_many(ours, {"$set": {"lease.expires_at": expires_at}})
            if renewed.matched_count == len(held):
                return set()
            cursor = self._jobs.find(ours, {"lease.id": 1})
            kept = {document["_id"] async for document in cursor if document["lease"]["id"] == held[document["_id"]].id}
        return held.keys() - kept

    async def take_lapsed(self, limit: int, held: Collection[str] = ()) -> list[tuple[Job, Lease]]:
        """Takes over up to `limit` jobs whose leases have lapsed; each with the lease that was lost.

        Not those that are `held` here: nobody died, MongoDB was away, and the lease is renewed, or found to be lost.
        Nor those that a claim of here may have taken, which is cleared up.
        """
        lapsed: Document = {"lease.expires_at": {"$lte": earliest(self._clock)}}
        if held:
            lapsed["_id"] = {"$nin": list(held)}
        if self._unclear:
            lapsed["lease.id"] = {"$nin": [lease.id for lease, _ in self._unclear]}
        with translated("taking over jobs whose leases lapsed"):
            cursor = self._jobs.find(lapsed, LIGHT).sort("lease.expires_at", 1).limit(limit)
            before = {document["_id"]: job_of(document) async for document in cursor}
            if not before:
                return []
            lease = self.lease()
            await self._jobs.update_many({**lapsed, "_id": {"$in": list(before)}}, taking_over(lease))
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
            lease = self.lease()
            await self._jobs.update_many({"_id": {"$in": ids}, **expired}, taking_over(lease))
            return await self._mine(ids, lease, LIGHT)

    async def take_to_cancel(self, job_id: str, reason: str) -> Job | None:
        """Takes one job over, waiting or running, to end it as cancelled. None: it has ended, or is being cancelled."""
        lease = self.lease()
        live = {
            "_id": job_id,
            "cancel": {"$exists": False},
            "$or": [{"due_at": {"$gt": EVER}}, {"lease.expires_at": {"$gt": EVER}}, {"waits_for": {"$exists": True}}],
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
            lapsed = await self._jobs.update_many(left, {"$set": {"lease.expires_at": earliest(self._clock)}})
            return lapsed.modified_count

    async def line_up(self) -> int:
        """Gives lanes to jobs that were put into the queue before there were any. Says how many."""
        lined_up = 0
        with translated("lining up jobs of an earlier version"):
            while found := await self._jobs.find({"lane": None, "due_at": {"$gt": EVER}}, _LANED).to_list(_LINED_UP):
                lanes = [(one["_id"], Lane(one["tenant"], one["model_name"], 0).text) for one in found]
                await self._jobs.bulk_write([UpdateOne({"_id": id_}, {"$set": {"lane": lane}}) for id_, lane in lanes])
                lined_up += len(found)
        return lined_up

    async def _mine(self, ids: Sequence[str], lease: Lease, fields: Mapping[str, int] | None = None) -> list[Job]:
        cursor = self._jobs.find({"_id": {"$in": list(ids)}, "lease.id": lease.id}, fields)
        return [job_of(document) async for document in cursor]


def _head(lane: Lane, limit: int, now: datetime) -> list[Document]:
    return [
        {"$match": {"lane": lane.text, "due_at": {"$lte": now, "$gt": EVER}}},
        {"$sort": {"due_at": 1, "_id": 1}},
        {"$limit": limit},
        {"$project": {"_id": 1, "lane": 1, "due_at": 1}},
    ]
