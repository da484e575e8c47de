"""Repository of batches in MongoDB, with the leases of their duties."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock, earliest, milliseconds
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.ingest.batches.batch import FINAL, Batch, BatchState, BatchStep, Ending, Totals
from services.ingest.batches.chunk_repository import ChunkRepository
from services.ingest.batches.documents import batch_document, batch_of, step_document, totals_document
from services.ingest.batches.inputs.locations import Entry
from services.ingest.documents import EPOCH
from services.ingest.job_scan import PAGE_BYTES
from services.ingest.queries.jobs import Filter
from services.ingest.retention.rules import BATCHES, Rules
from services.ingest.ulid import floor, is_ulid
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

MAX_ACTIVE = 1_000
"""Limit on active batches, because every instance polls them all; further ones are rejected."""
# Ended batches that are read in one query, and removed when their retention is over.
_REMOVED_AT_ONCE = 200


class BatchRepository:
    """Reads and writes batches. Leases are made by the chunk repository."""

    def __init__(
        self, batches: AsyncCollection[Document], chunks: ChunkRepository, *, clock: Clock, instance: str
    ) -> None:
        self._batches = batches
        self._chunks = chunks
        self._clock = clock
        self._instance = instance

    async def add(self, batch: Batch) -> tuple[Batch, bool]:
        """Store a batch. Return it and False, or the earlier batch of its idempotency key and True.

        Raises:
            AlreadyExists: the key was used with another request. Unavailable: MongoDB is unavailable.
        """
        try:
            with translated("storing a batch"):
                await self._batches.insert_one(batch_document(batch))
        except AlreadyExists:
            earlier = await self.find_by_key(batch.tenant, batch.key) if batch.key else None
            if earlier is None:
                raise
            return check_same_request(earlier, batch.digest), True
        return batch, False

    async def find_by_key(self, tenant: str, key: str) -> Batch | None:
        """Return the batch of an idempotency key, or None."""
        with translated("reading a batch"):
            document = await self._batches.find_one({"tenant": tenant, "key": key})
        return None if document is None else batch_of(document)

    async def count_active(self, tenant: str = "") -> int:
        """Return the number of active batches, of a tenant or of all, at most MAX_ACTIVE."""
        query, hint = ({"tenant": tenant}, "active_of_tenant") if tenant else ({}, "active")
        with translated("counting batches"):
            return await self._batches.count_documents({**query, "is_active": True}, limit=MAX_ACTIVE, hint=hint)

    async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> Batch:
        """Return one batch of the scope.

        Raises:
            InvalidArgument: the id is empty. NotFound: no such batch. Unavailable: MongoDB is unavailable.
        """
        if not batch_id:
            raise InvalidArgument("id: required, and empty")
        if not is_ulid(batch_id):
            raise NotFound(f"no batch {batch_id[:64]!r}: a batch id is 26 characters, as SubmitBatch returned it")
        with translated("reading a batch"):
            document = await self._batches.find_one({"_id": batch_id, **scope.condition})
        if document is None:
            raise NotFound(f"no batch {batch_id!r}")
        return batch_of(document)

    async def page(self, requested: Filter, size: int, before: str) -> tuple[list[Batch], bool]:
        """Return up to `size` of the newest batches, and whether there are more.

        `before` limits them to older ones when it is set. The page ends early when it has more than PAGE_BYTES: a batch
        has up to 2 MB of URLs.
        """
        query = requested.query() | ({"_id": {"$lt": before}} if before else {})
        found: list[Batch] = []
        nbytes = 0
        with translated("listing batches"):
            async with self._batches.find(query).sort("_id", -1).limit(size + 1) as documents:
                async for document in documents:
                    if len(found) == size or nbytes > PAGE_BYTES:
                        return found, True
                    found.append(batch_of(document))
                    nbytes += _weight(document)
        return found, False

    async def active(self) -> list[Batch]:
        """Return the active batches, oldest first, without their inputs: up to 2 MB of URLs each."""
        with translated("reading active batches"):
            found = self._batches.find({"is_active": True}, {"inputs": 0}, hint="active")
            cursor = found.sort("_id", 1).limit(MAX_ACTIVE)
            return [batch_of(found) async for found in cursor]

    async def filter_active(self, batch_ids: Collection[str]) -> set[str]:
        """Return the ids among `batch_ids` whose batches are active."""
        with translated("reading active batches"):
            cursor = self._batches.find({"_id": {"$in": list(batch_ids)}, "is_active": True}, {"_id": 1})
            return {found["_id"] async for found in cursor}

    async def stopped(self, batch_ids: Sequence[str]) -> set[str]:
        """Return the ids among `batch_ids` whose batches are not running: paused, ending or ended."""
        running = {"state": str(BatchState.RUNNING), "ending": {"$exists": False}}
        with translated("reading the states of batches"):
            cursor = self._batches.find({"_id": {"$in": list(batch_ids)}, **running}, {"_id": 1})
            return set(batch_ids) - {found["_id"] async for found in cursor}

    async def claim_duty(self, batch_id: str) -> Batch | None:
        """Claim the duty of a batch and count the try. None: another instance holds it."""
        lease = self._chunks.lease()
        free = {"_id": batch_id, "is_active": True, "free_at": {"$lte": earliest(self._clock), "$gt": EPOCH}}
        update = {"$set": {"lease": asdict(lease), "free_at": lease.expires_at}, "$inc": {"tries": 1}}
        with translated("claiming the duty of a batch"):
            found = await self._batches.find_one_and_update(free, update, return_document=ReturnDocument.AFTER)
        return None if found is None else batch_of(found)

    async def renew(self, batch: Batch) -> bool:
        """Extend the lease of a duty. False: the lease was lost."""
        return await self._fenced(batch, {"$set": {"free_at": self._chunks.lease().expires_at}})

    async def record_listing(self, batch: Batch, listing: Entry, files: int) -> bool:
        """Record the listing of the pinned inputs, and release the duty. False: the lease was lost."""
        return await self._done(batch, {"listing": asdict(listing), "files": files})

    async def mark_planned(self, batch: Batch) -> bool:
        """Record that all chunks are planned, and release the duty."""
        return await self._done(batch, {"is_planned": True})

    async def record_totals(self, batch: Batch, totals: Totals) -> bool:
        """Record the final counts; the duty goes on."""
        set_ = {"totals": totals_document(totals), "ended_at": self._clock()}
        return await self._fenced(batch, {"$set": set_})

    async def end(self, batch: Batch, ending: Ending) -> bool:
        """Record the end of a batch whose files are all written."""
        step = BatchStep(ending.state, self._clock(), self._instance, ending.reason)
        update: Document = {
            "$set": {
                "state": str(ending.state),
                "message": "" if ending.state is BatchState.SUCCEEDED else ending.reason,
                "note": "",
                "updated_at": step.at,
            },
            "$unset": {"is_active": "", "free_at": "", "lease": "", "ending": ""},
            "$push": {"steps": step_document(step)},
        }
        return await self._fenced(batch, update)

    async def release(self, batch: Batch, *, until: Any = None, is_counted: bool = False, note: str = "") -> bool:
        """Release a duty; it may be claimed from `until` on, by default immediately."""
        update: Document = {
            "$set": {"free_at": until or self._clock(), "note": note},
            "$unset": {"lease": ""},
        }
        if not is_counted:
            update["$inc"] = {"tries": -1}
        return await self._fenced(batch, update)

    async def request_end(self, batch_id: str, ending: Ending) -> Batch | None:
        """Request that a batch ends as `ending` says. None: the batch is ending or has ended already."""
        live = {"_id": batch_id, "is_active": True, "ending": {"$exists": False}, "totals": {"$exists": False}}
        set_ = {"ending": {"state": str(ending.state), "reason": ending.reason}, "updated_at": self._clock()}
        with translated("ending a batch"):
            found = await self._batches.find_one_and_update(live, {"$set": set_}, return_document=ReturnDocument.AFTER)
        return None if found is None else batch_of(found)

    async def change_state(
        self, batch_id: str, before: BatchState, after: BatchState, reason: str, scope: TenantScope = EVERY_TENANT
    ) -> Batch | None:
        """Change a batch of the scope from state `before` to `after`.

        None: there is no such batch, its state is another, or it is ending.
        """
        step = BatchStep(after, self._clock(), self._instance, reason)
        live = {"_id": batch_id, "state": str(before), "ending": {"$exists": False}, "totals": {"$exists": False}}
        live |= scope.condition
        update: Mapping[str, Any] = {
            "$set": {"state": str(after), "updated_at": step.at},
            "$push": {"steps": {"$each": [step_document(step)], "$slice": -100}},
        }
        with translated("changing a batch"):
            found = await self._batches.find_one_and_update(live, update, return_document=ReturnDocument.AFTER)
        return None if found is None else batch_of(found)

    async def remove_ended(self, rules: Rules, now: datetime) -> int:
        """Remove the batches whose retention is over, in small groups. Return their number."""
        shortest = rules.shortest(BATCHES)
        if shortest is None:
            return 0
        return sum([await self._remove_ended(state, rules, now, now - shortest) for state in sorted(FINAL)])

    async def _remove_ended(self, state: BatchState, rules: Rules, now: datetime, before: datetime) -> int:
        """Remove batches of one state; no batch that was updated after `before` is due."""
        removed, after = 0, ""
        while True:
            # Ids rise with the time of submission: what was submitted later has not ended before then.
            span = {"$gt": after, "$lt": floor(max(0, milliseconds(before)))}
            old: Document = {"state": str(state), "_id": span, "updated_at": {"$lt": before}}
            with translated("removing batches whose retention is over"):
                found = self._batches.find(old, {"tenant": 1, "updated_at": 1}, hint="by_state").sort("_id", 1)
                page = await found.limit(_REMOVED_AT_ONCE).to_list()
                if not page:
                    return removed
                due = [
                    one["_id"]
                    for one in page
                    if rules.is_past_retention(one["tenant"], BATCHES, one["updated_at"], now)
                ]
                if due:
                    result = await self._batches.delete_many({"_id": {"$in": due}, "state": str(state)})
                    removed += result.deleted_count
            after = page[-1]["_id"]

    async def release_stale(self) -> int:
        """Release the duties that earlier processes of this instance left behind. Return their number."""
        lease = self._chunks.lease()
        left = {
            "is_active": True,
            "free_at": {"$gt": EPOCH},
            "lease.owner": lease.owner,
            "lease.process": {"$ne": lease.process},
        }
        with translated("releasing the duties of an earlier process"):
            return (await self._batches.update_many(left, {"$set": {"free_at": earliest(self._clock)}})).modified_count

    async def _done(self, batch: Batch, set_: Document) -> bool:
        update = {"$set": {**set_, "tries": 0, "note": "", "free_at": self._clock()}, "$unset": {"lease": ""}}
        return await self._fenced(batch, update)

    async def _fenced(self, batch: Batch, update: Document) -> bool:
        if batch.lease is None:
            raise FailedPrecondition(f"the duty of batch {batch.id} is not held")
        with translated("writing about a batch"):
            found = await self._batches.update_one({"_id": batch.id, "lease.id": batch.lease.id}, update)
            return bool(found.matched_count)


def check_same_request(earlier: Batch, digest: bytes) -> Batch:
    """Return the earlier batch of a key when its request was the same.

    Raises:
        AlreadyExists: the earlier batch of this key had a different request.
    """
    if earlier.digest != digest:
        raise AlreadyExists(f"idempotency_key {earlier.key!r} was used by batch {earlier.id} with another request")
    return earlier


def _weight(document: Document) -> int:
    """Return the approximate size of a batch's message in bytes."""
    steps = sum(100 + len(step.get("reason") or "") for step in document["steps"])
    return 1_000 + sum(map(len, document["inputs"])) + steps
