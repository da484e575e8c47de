"""The batches in MongoDB: which there are, and who has the duty of which."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.batches.batch import FINAL, Batch, BatchState, BatchStep, Ending, Totals
from services.ingest.batches.chunk_repository import ChunkRepository
from services.ingest.batches.documents import batch_document, batch_of, step_document, totals_document
from services.ingest.batches.inputs.locations import Entry
from services.ingest.clock import Clock, earliest, milliseconds
from services.ingest.documents import EVER
from services.ingest.reading.jobs import Filter
from services.ingest.retention.rules import BATCHES, Rules
from services.ingest.ulid import floor, is_ulid
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

MAX_ACTIVE = 1_000
"""Batches under way at once, which every instance looks at again and again; more than these are refused."""
_REMOVED_AT_ONCE = 200
# Looked at, and removed when their time is over.


class BatchRepository:
    """The batches. Leases are the ledger's."""

    def __init__(
        self, batches: AsyncCollection[Document], chunks: ChunkRepository, *, clock: Clock, instance: str
    ) -> None:
        self._batches = batches
        self._chunks = chunks
        self._clock = clock
        self._instance = instance

    async def add(self, batch: Batch) -> tuple[Batch, bool]:
        """Makes a batch durable, and says whether its key was known: then the earlier one is given.

        Raises:
            AlreadyExists: the key was used with another request. Unavailable: MongoDB is away.
        """
        try:
            with translated("storing a batch"):
                await self._batches.insert_one(batch_document(batch))
        except AlreadyExists:
            earlier = await self.find_by_key(batch.tenant, batch.key) if batch.key else None
            if earlier is None:
                raise
            return same(earlier, batch.digest), True
        return batch, False

    async def find_by_key(self, tenant: str, key: str) -> Batch | None:
        """The batch that was submitted with a key."""
        with translated("reading a batch"):
            document = await self._batches.find_one({"tenant": tenant, "key": key})
        return None if document is None else batch_of(document)

    async def count_active(self) -> int:
        """How many are under way."""
        with translated("counting batches"):
            return await self._batches.count_documents({"is_active": True}, limit=MAX_ACTIVE, hint="active")

    async def get(self, batch_id: str) -> Batch:
        """One batch.

        Raises:
            InvalidArgument: no id. NotFound: no such batch. Unavailable: MongoDB is away.
        """
        if not batch_id:
            raise InvalidArgument("id: required, and empty")
        if not is_ulid(batch_id):
            raise NotFound(f"no batch {batch_id[:64]!r}: a batch id is 26 characters, as SubmitBatch returned it")
        with translated("reading a batch"):
            document = await self._batches.find_one({"_id": batch_id})
        if document is None:
            raise NotFound(f"no batch {batch_id!r}")
        return batch_of(document)

    async def page(self, requested: Filter, size: int, before: str) -> list[Batch]:
        """The newest batches, of those older than `before` when that is set."""
        query = requested.query() | ({"_id": {"$lt": before}} if before else {})
        with translated("listing batches"):
            return [batch_of(found) async for found in self._batches.find(query).sort("_id", -1).limit(size)]

    async def active(self) -> list[Batch]:
        """Those under way, the oldest first."""
        with translated("looking for batches"):
            cursor = self._batches.find({"is_active": True}, hint="active").sort("_id", 1).limit(MAX_ACTIVE)
            return [batch_of(found) async for found in cursor]

    async def filter_active(self, batch_ids: Collection[str]) -> set[str]:
        """Those among `batch_ids` that are under way."""
        with translated("looking at batches"):
            cursor = self._batches.find({"_id": {"$in": list(batch_ids)}, "is_active": True}, {"_id": 1})
            return {found["_id"] async for found in cursor}

    async def stopped(self, batch_ids: Sequence[str]) -> set[str]:
        """Those among `batch_ids` whose chunks are not to be run now: paused, or about to end."""
        running = {"state": str(BatchState.RUNNING), "ending": {"$exists": False}}
        with translated("looking at batches"):
            cursor = self._batches.find({"_id": {"$in": list(batch_ids)}, **running}, {"_id": 1})
            return set(batch_ids) - {found["_id"] async for found in cursor}

    async def claim_duty(self, batch_id: str) -> Batch | None:
        """Takes up the duty of a batch; None: somebody has it. Counts the try."""
        lease = self._chunks.lease()
        free = {"_id": batch_id, "is_active": True, "free_at": {"$lte": earliest(self._clock), "$gt": EVER}}
        update = {"$set": {"lease": asdict(lease), "free_at": lease.expires_at}, "$inc": {"tries": 1}}
        with translated("taking up a batch"):
            found = await self._batches.find_one_and_update(free, update, return_document=ReturnDocument.AFTER)
        return None if found is None else batch_of(found)

    async def renew(self, batch: Batch) -> bool:
        """Extends the lease of a duty. False: it is lost."""
        return await self._fenced(batch, {"$set": {"free_at": self._chunks.lease().expires_at}})

    async def record_listing(self, batch: Batch, listing: Entry, files: int) -> bool:
        """The inputs are pinned. The duty is done."""
        return await self._done(batch, {"listing": asdict(listing), "files": files})

    async def mark_planned(self, batch: Batch) -> bool:
        """All chunks are planned. The duty is done."""
        return await self._done(batch, {"is_planned": True})

    async def record_totals(self, batch: Batch, totals: Totals) -> bool:
        """Nothing can change any more. The duty goes on."""
        set_ = {"totals": totals_document(totals), "ended_at": self._clock()}
        return await self._fenced(batch, {"$set": set_})

    async def end(self, batch: Batch, ending: Ending) -> bool:
        """The batch has ended, and everything is written."""
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
        """Gives a duty back, at once or from `until` on."""
        update: Document = {
            "$set": {"free_at": until or self._clock(), "note": note},
            "$unset": {"lease": ""},
        }
        if not is_counted:
            update["$inc"] = {"tries": -1}
        return await self._fenced(batch, update)

    async def request_end(self, batch_id: str, ending: Ending) -> Batch | None:
        """Sees to it that a batch ends so, whoever works on it. None: it ends, or has ended, already."""
        live = {"_id": batch_id, "is_active": True, "ending": {"$exists": False}, "totals": {"$exists": False}}
        set_ = {"ending": {"state": str(ending.state), "reason": ending.reason}, "updated_at": self._clock()}
        with translated("ending a batch"):
            found = await self._batches.find_one_and_update(live, {"$set": set_}, return_document=ReturnDocument.AFTER)
        return None if found is None else batch_of(found)

    async def change_state(self, batch_id: str, before: BatchState, after: BatchState, reason: str) -> Batch | None:
        """From one live state to another. None: it is not in the first, or about to end."""
        step = BatchStep(after, self._clock(), self._instance, reason)
        live = {"_id": batch_id, "state": str(before), "ending": {"$exists": False}, "totals": {"$exists": False}}
        update: Mapping[str, Any] = {
            "$set": {"state": str(after), "updated_at": step.at},
            "$push": {"steps": {"$each": [step_document(step)], "$slice": -100}},
        }
        with translated("changing a batch"):
            found = await self._batches.find_one_and_update(live, update, return_document=ReturnDocument.AFTER)
        return None if found is None else batch_of(found)

    async def remove_ended(self, rules: Rules, now: datetime) -> int:
        """Removes the batches that have stayed as long as the rules say, some at a time. Says how many."""
        shortest = rules.shortest(BATCHES)
        if shortest is None:
            return 0
        return sum([await self._remove_ended(state, rules, now, now - shortest) for state in sorted(FINAL)])

    async def _remove_ended(self, state: BatchState, rules: Rules, now: datetime, before: datetime) -> int:
        """Of those in one state. None is over that ended after `before`."""
        removed, after = 0, ""
        while True:
            # Ids rise with the time of submission: what was submitted later has not ended before then.
            span = {"$gt": after, "$lt": floor(max(0, milliseconds(before)))}
            old: Document = {"state": str(state), "_id": span, "updated_at": {"$lt": before}}
            with translated("removing batches that have stayed long enough"):
                found = self._batches.find(old, {"tenant": 1, "updated_at": 1}, hint="by_state").sort("_id", 1)
                page = await found.limit(_REMOVED_AT_ONCE).to_list()
                if not page:
                    return removed
                over = [one["_id"] for one in page if rules.has_stayed(one["tenant"], BATCHES, one["updated_at"], now)]
                if over:
                    gone = await self._batches.delete_many({"_id": {"$in": over}, "state": str(state)})
                    removed += gone.deleted_count
            after = page[-1]["_id"]

    async def release_stale(self) -> int:
        """Frees the duties that earlier processes of this instance's name have left behind. Says how many."""
        lease = self._chunks.lease()
        left = {
            "is_active": True,
            "free_at": {"$gt": EVER},
            "lease.owner": lease.owner,
            "lease.process": {"$ne": lease.process},
        }
        with translated("looking for batches of an earlier process"):
            return (await self._batches.update_many(left, {"$set": {"free_at": earliest(self._clock)}})).modified_count

    async def _done(self, batch: Batch, set_: Document) -> bool:
        update = {"$set": {**set_, "tries": 0, "note": "", "free_at": self._clock()}, "$unset": {"lease": ""}}
        return await self._fenced(batch, update)

    async def _fenced(self, batch: Batch, update: Document) -> bool:
        if batch.lease is None:
            raise FailedPrecondition(f"nobody has the duty of batch {batch.id}")
        with translated("writing about a batch"):
            found = await self._batches.update_one({"_id": batch.id, "lease.id": batch.lease.id}, update)
            return bool(found.matched_count)


def same(earlier: Batch, digest: bytes) -> Batch:
    """The earlier batch of a key, when it is the same.

    Raises:
        AlreadyExists: it is another.
    """
    if earlier.digest != digest:
        raise AlreadyExists(f"idempotency_key {earlier.key!r} was used by batch {earlier.id} with another request")
    return earlier
