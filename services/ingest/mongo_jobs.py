"""Storage of jobs in MongoDB: a JobStore (`job_store.py`).

A claim is an update whose filter matches only unclaimed jobs, so the database gives each job to one claimer. Each
claimer then reads the jobs that have its lease.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from pymongo import UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import BulkWriteError

from mesh.mongo import Document, decoded, translate, translated
from services.ingest.documents import (
    EACH_TENANT_QUEUE,
    EPOCH,
    LIGHT,
    WAITING,
    WITHOUT_REQUEST,
    claiming,
    deciding_end,
    difference,
    document_of,
    fenced_updates,
    job_of,
    purging,
    requeueing,
    taking_over,
    unleased,
)
from services.ingest.job import End, Job, Lease, State, claim, take_over
from services.ingest.job_scan import ID_ALONE, scan
from services.ingest.job_store import (
    Change,
    Claimed,
    DeadFilter,
    DependencyState,
    Inserted,
    Key,
    KeyTaken,
    StatesWritten,
    UnknownOutcome,
    Waiting,
)
from services.ingest.tenant_queue import TenantQueueKey, tenant_queue_of
from shoal.errors import DataLoss, ShoalError

_DUPLICATE_KEY = 11000
_MIGRATED_AT_ONCE = 1_000
# Jobs with long histories, of which this has 15, take 10 ms; large requests next to nothing.
_DECODED_AT_ONCE = 1 << 20
_TENANT_QUEUE_FIELDS = {"tenant": 1, "model_name": 1}
_DEPENDENCY_FIELDS = {"state": 1, "key": 1, "last_message": 1}
# This form is counted in an index, without reading the jobs.
_DEPENDENTS: Document = {"waits_for": {"$gt": ""}}
_FREE_DEPENDENTS: Document = {"waits_for": {"$exists": True}, "lease": {"$exists": False}}


class MongoJobs:
    """Jobs in a collection (`documents.py`)."""

    def __init__(self, jobs: AsyncCollection[Document]) -> None:
        self._jobs = jobs

    async def insert(self, jobs: Sequence[Job]) -> Inserted | UnknownOutcome:
        try:
            with translated("storing submitted jobs"):
                try:
                    await self._jobs.insert_many([document_of(job) for job in jobs], ordered=False)
                except BulkWriteError as err:
                    # The documents are not on a majority in time, so nothing may be acknowledged.
                    if err.details.get("writeConcernErrors"):
                        raise
                    refused = {jobs[entry["index"]].id: _refusal(entry) for entry in err.details["writeErrors"]}
                    return Inserted([job for job in jobs if job.id not in refused], refused)
        except ShoalError as err:
            return UnknownOutcome(err)
        return Inserted(jobs)

    async def by_key(self, keys: Collection[Key]) -> dict[Key, Job]:
        if not keys:
            return {}
        either = [{"tenant": tenant, "key": key} for tenant, key in keys]
        with translated("finding jobs by their idempotency keys"):
            found = await self._all(self._jobs.find_raw_batches({"$or": either}, WITHOUT_REQUEST))
        return {(job.tenant, job.key): job for job in found}

    async def dependency_states(
        self, tenant: str, ids: Collection[str], keys: Collection[str]
    ) -> list[DependencyState]:
        found: list[DependencyState] = []
        with translated("reading the states of dependencies"):
            for name, values in (("_id", ids), ("key", keys)):
                if values:
                    query = {name: {"$in": list(values)}, "tenant": tenant}
                    found += [
                        _dependency_state(document) async for document in self._jobs.find(query, _DEPENDENCY_FIELDS)
                    ]
        return found

    async def count_waiting(self, limit: int) -> int:
        with translated("counting queued jobs"):
            waiting = await self._jobs.count_documents(WAITING, limit=limit, hint="lanes")
            if waiting < limit:
                waiting += await self._jobs.count_documents(_DEPENDENTS, limit=limit - waiting)
            return waiting

    async def tenant_queues(self, after: str, limit: int) -> list[tuple[TenantQueueKey, datetime]]:
        pipeline: list[Document] = [
            {"$match": {**WAITING, "lane": {"$gt": after}}},
            *EACH_TENANT_QUEUE,
            {"$sort": {"_id": 1}},
            {"$limit": limit},
        ]
        with translated("listing the tenant queues of queued jobs"):
            found = await self._jobs.aggregate(pipeline, hint="lanes")
            return [(tenant_queue_of(document["_id"]), document["due_at"]) async for document in found]

    async def heads(
        self, limits: Sequence[tuple[TenantQueueKey, int]], now: datetime
    ) -> dict[TenantQueueKey, list[Waiting]]:
        # One round trip; the index alone suffices.
        pipeline, *others = [_head(queue, limit, now) for queue, limit in limits]
        pipeline += [{"$unionWith": {"coll": self._jobs.name, "pipeline": other}} for other in others]
        seen: dict[TenantQueueKey, list[Waiting]] = {}
        with translated("finding due jobs"):
            async for found in await self._jobs.aggregate(pipeline):
                seen.setdefault(tenant_queue_of(found["lane"]), []).append((found["due_at"], found["_id"]))
        return seen

    async def claim(self, ids: Sequence[str], lease: Lease, now: datetime) -> Claimed | UnknownOutcome:
        due = {"_id": {"$in": ids}, "due_at": {"$lte": now, "$gt": EPOCH}}
        try:
            with translated("claiming jobs"):
                won = await self._jobs.update_many(due, claiming(lease, now))
                return Claimed(await self._held_by(lease, ids) if won.modified_count else [])
        except ShoalError as err:
            return UnknownOutcome(err)

    async def claim_accepted(self, jobs: Sequence[Job], lease: Lease, now: datetime) -> Claimed | UnknownOutcome:
        ids = [job.id for job in jobs]
        untouched = {"_id": {"$in": ids}, "due_at": {"$gt": EPOCH}, "steps": 1}
        try:
            with translated("claiming accepted jobs"):
                won = await self._jobs.update_many(untouched, claiming(lease, now))
                if won.modified_count == len(ids):
                    return Claimed([claim(job, lease, now) for job in jobs])
                return Claimed(await self._held_by(lease, ids) if won.modified_count else [])
        except ShoalError as err:
            return UnknownOutcome(err)

    async def claimed_under(self, lease: Lease, ids: Sequence[str]) -> list[Job]:
        with translated("reading the jobs of an earlier claim"):
            return await self._held_by(lease, ids)

    async def renew(self, held: Mapping[str, Lease], expires_at: datetime) -> set[str]:
        ours = {"_id": {"$in": list(held)}, "lease.id": {"$in": list({lease.id for lease in held.values()})}}
        with translated("renewing leases"):
            renewed = await self._jobs.update_many(ours, {"$set": {"lease.expires_at": expires_at}})
            if renewed.matched_count == len(held):
                return set()
            cursor = self._jobs.find(ours, {"lease.id": 1})
            kept = {document["_id"] async for document in cursor if document["lease"]["id"] == held[document["_id"]].id}
        return held.keys() - kept

    async def take_lapsed(
        self, lapsed_at: datetime, lease: Lease, limit: int, *, but_ids: Collection[str], but_leases: Collection[str]
    ) -> list[tuple[Job, Lease]]:
        lapsed: Document = {"lease.expires_at": {"$lte": lapsed_at}}
        if but_ids:
            lapsed["_id"] = {"$nin": list(but_ids)}
        if but_leases:
            lapsed["lease.id"] = {"$nin": list(but_leases)}
        with translated("taking over jobs whose leases lapsed"):
            cursor = self._jobs.find_raw_batches(lapsed, WITHOUT_REQUEST).sort("lease.expires_at", 1).limit(limit)
            before = {job.id: job for job in await self._all(cursor)}
            if not before:
                return []
            await self._jobs.update_many({**lapsed, "_id": {"$in": list(before)}}, taking_over(lease))
            taken_over = await self._held_by(lease, list(before), WITHOUT_REQUEST)
        return [(job, lost) for job in taken_over if (lost := before[job.id].lease) is not None]

    async def take_expired(self, now: datetime, lease: Lease, limit: int) -> list[Job]:
        expired = {"deadline": {"$lte": now, "$gt": EPOCH}, "due_at": {"$gt": EPOCH}}
        with translated("taking over jobs past their deadlines"):
            ids = [document["_id"] async for document in self._jobs.find(expired, {"_id": 1}).limit(limit)]
            if not ids:
                return []
            await self._jobs.update_many({"_id": {"$in": ids}, **expired}, taking_over(lease))
            return await self._held_by(lease, ids, WITHOUT_REQUEST)

    async def take_to_cancel(self, job_id: str, reason: str, lease: Lease) -> Job | None:
        live = {
            "_id": job_id,
            "cancel": {"$exists": False},
            "$or": [{"due_at": {"$gt": EPOCH}}, {"lease.expires_at": {"$gt": EPOCH}}, {"waits_for": {"$exists": True}}],
        }
        with translated("cancelling a job"):
            before = await self._jobs.find_one_and_update(live, taking_over(lease, reason), WITHOUT_REQUEST)
        return None if before is None else take_over(job_of(before), lease, reason)

    async def expire_leases(self, owner: str, but_process: str, at: datetime) -> int:
        left = {"lease.expires_at": {"$gt": EPOCH}, "lease.owner": owner, "lease.process": {"$ne": but_process}}
        with translated("expiring the leases of an earlier process"):
            lapsed = await self._jobs.update_many(left, {"$set": {"lease.expires_at": at}})
            return lapsed.modified_count

    async def add_tenant_queues(self) -> int:
        migrated = 0
        without = {"lane": None, "due_at": {"$gt": EPOCH}}
        with translated("setting the tenant queues of jobs of an earlier version"):
            while found := await self._jobs.find(without, _TENANT_QUEUE_FIELDS).to_list(_MIGRATED_AT_ONCE):
                lanes = [(one["_id"], TenantQueueKey(one["tenant"], one["model_name"], 0).text) for one in found]
                await self._jobs.bulk_write(
                    [UpdateOne({"_id": id_}, {"$set": {"lane": queue}}) for id_, queue in lanes]
                )
                migrated += len(found)
        return migrated

    async def write_states(self, changes: Sequence[Change]) -> StatesWritten | UnknownOutcome:
        updates = fenced_updates(changes)
        try:
            with translated("writing the states of jobs"):
                written = await self._jobs.bulk_write(updates, ordered=False)
        except ShoalError as err:
            return UnknownOutcome(err)
        return StatesWritten(written.matched_count)

    async def read(self, ids: Collection[str], tenant: str | None = None) -> dict[str, Job]:
        return await self._letters({} if tenant is None else {"tenant": tenant}, ids)

    async def dead_letters(self, filter_: DeadFilter, limit: int, after: str = "") -> tuple[list[Job], str]:
        with translated("finding dead letters"):
            page = await scan(self._jobs, filter_.query(), limit, after=after, order=1, fields=ID_ALONE)
        ids = [document["_id"] for document in page.documents]
        found = await self._letters(filter_.query(), ids) if ids else {}
        return [found[job_id] for job_id in ids if job_id in found], page.end or ""

    async def _letters(self, query: Document, ids: Collection[str]) -> dict[str, Job]:
        with translated("reading dead letters"):
            cursor = self._jobs.find({**query, "_id": {"$in": list(ids)}}, LIGHT)
            return {document["_id"]: job_of(document) async for document in cursor}

    async def requeue(self, changes: Sequence[Change]) -> None:
        with translated("requeueing dead letters"):
            await self._jobs.bulk_write([requeueing(before, after) for before, after in changes], ordered=False)

    async def purge(self, letters: Sequence[Job]) -> None:
        with translated("purging dead letters"):
            await self._jobs.bulk_write([purging(letter) for letter in letters], ordered=False)

    async def dependents(self, ended: Collection[str], limit: int) -> list[Job]:
        with translated("finding jobs that wait for dependencies"):
            query = {**_FREE_DEPENDENTS, "waits_for": {"$in": list(ended)}}
            return await self._all(self._jobs.find_raw_batches(query, WITHOUT_REQUEST).limit(limit))

    async def dependents_of(self, ended: str, after: str, limit: int) -> list[Job]:
        query = {**_FREE_DEPENDENTS, "waits_for": ended, "_id": {"$gt": after}}
        with translated("listing jobs that wait for a job"):
            cursor = self._jobs.find_raw_batches(query, WITHOUT_REQUEST).sort("_id", 1).limit(limit)
            return await self._all(cursor)

    async def dependents_among(self, ids: Collection[str]) -> list[Job]:
        with translated("finding jobs that wait for dependencies"):
            query = {**_FREE_DEPENDENTS, "_id": {"$in": list(ids)}}
            return await self._all(self._jobs.find_raw_batches(query, WITHOUT_REQUEST))

    async def dependents_page(self, after: str, limit: int) -> list[Job]:
        query = {**_FREE_DEPENDENTS, "state": str(State.QUEUED), "_id": {"$gt": after}}
        with translated("listing jobs that wait for dependencies"):
            cursor = self._jobs.find_raw_batches(query, WITHOUT_REQUEST).sort("_id", 1).limit(limit)
            return await self._all(cursor.hint("all_dependents"))

    async def release_dependents(self, changes: Sequence[Change]) -> None:
        writes = [UpdateOne(unleased(before), difference(before, after)) for before, after in changes]
        with translated("unblocking jobs whose dependencies succeeded"):
            await self._jobs.bulk_write(writes, ordered=False)

    async def take_to_end(self, dooms: Sequence[tuple[Job, End, Sequence[str]]], lease: Lease) -> list[Job]:
        writes = [UpdateOne(unleased(job), deciding_end(lease, how, left)) for job, how, left in dooms]
        with translated("ending jobs whose dependencies failed"):
            await self._jobs.bulk_write(writes, ordered=False)
            return await self._held_by(lease, [job.id for job, _, _ in dooms], WITHOUT_REQUEST)

    async def _held_by(self, lease: Lease, ids: Sequence[str], fields: Mapping[str, int] | None = None) -> list[Job]:
        return await self._all(self._jobs.find_raw_batches({"_id": {"$in": list(ids)}, "lease.id": lease.id}, fields))

    async def _all(self, batches: AsyncIterable[Any]) -> list[Job]:
        return [job_of(document) async for document in decoded(batches, self._jobs, at_once=_DECODED_AT_ONCE)]


def _head(queue: TenantQueueKey, limit: int, now: datetime) -> list[Document]:
    return [
        {"$match": {"lane": queue.text, "due_at": {"$lte": now, "$gt": EPOCH}}},
        {"$sort": {"due_at": 1, "_id": 1}},
        {"$limit": limit},
        {"$project": {"_id": 1, "lane": 1, "due_at": 1}},
    ]


def _refusal(entry: Mapping[str, Any]) -> ShoalError:
    if entry.get("code") == _DUPLICATE_KEY:
        if "key" in entry.get("keyPattern", {}):
            return KeyTaken("the idempotency key is in use")
        # Ids have 80 random bits, so this does not happen; if it does, it must be visible.
        return DataLoss("two jobs have the same id")
    return translate(BulkWriteError({"writeErrors": [entry], "writeConcernErrors": []}), "storing a submitted job")


def _dependency_state(document: Document) -> DependencyState:
    state = State(document["state"])
    message: str = document.get("last_message", "") if state is not State.SUCCEEDED else ""
    return DependencyState(document["_id"], state, message, document.get("key", ""))
