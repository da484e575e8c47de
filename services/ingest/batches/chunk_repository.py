"""Repository of chunks in MongoDB: their leases, their results, and the sums over a batch.

Each write about a running chunk names the lease of its writer. A chunk is claimed by one conditional write, so of two
instances that claim the same chunk, only one succeeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from pymongo import ReturnDocument, UpdateOne
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock, earliest, latest
from services.ingest.batches.batch import Chunk, ChunkState, Totals
from services.ingest.batches.documents import chunk_document, chunk_of
from services.ingest.batches.outputs.part_summary import PartSummary
from services.ingest.documents import EPOCH, RESTORES
from services.ingest.job import Lease
from shoal.errors import AlreadyExists

_FREE = {"$gt": EPOCH}


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """Row counts of a running chunk, and the cause for which it waits."""

    ok: int = 0
    failed: int = 0
    note: str = ""


class ChunkRepository:
    """Reads and writes chunks; makes the leases of chunks and duties."""

    def __init__(
        self,
        chunks: AsyncCollection[Document],
        *,
        clock: Clock,
        new_id: Callable[[], str],
        owner: str,
        process: str,
        lease_ms: int,
    ) -> None:
        self._chunks = chunks
        self._clock = clock
        self._new_id = new_id
        self._owner = owner
        self._process = process
        self._lease_for = timedelta(milliseconds=lease_ms)

    def lease(self) -> Lease:
        """Return a new lease, valid from now on."""
        return Lease(self._new_id(), self._owner, self._process, latest(self._clock) + self._lease_for)

    async def append(self, chunks: Sequence[Chunk]) -> bool:
        """Add chunks to the plan, in their order. False: another instance has planned one of their numbers."""
        now = self._clock()
        documents = [chunk_document(chunk) | {"free_at": now} for chunk in chunks]
        try:
            with translated("planning chunks"):
                await self._chunks.insert_many(documents, ordered=True)
        except AlreadyExists:
            return False
        return True

    async def last_chunk(self, batch: str) -> Chunk | None:
        """Return the last chunk of a plan, or None when no chunk is planned."""
        with translated("reading a plan"):
            document = await self._chunks.find_one({"batch": batch}, sort=[("number", -1)])
        return None if document is None else chunk_of(document)

    async def claim(self, batch: str, *, only_staged: bool = False) -> Chunk | None:
        """Claim the first free chunk of a batch; with `only_staged`, the first whose part waits to be published."""
        lease = self.lease()
        free: Document = {"batch": batch, "free_at": {"$lte": earliest(self._clock), "$gt": EPOCH}}
        if only_staged:
            free["state"] = str(ChunkState.STAGED)
        claim = [
            {
                "$set": {
                    "lease": {"$literal": asdict(lease)},
                    "free_at": lease.expires_at,
                    "attempts": {"$add": ["$attempts", 1]},
                    "state": {"$cond": [{"$eq": ["$state", "staged"]}, "staged", str(ChunkState.RUNNING)]},
                }
            }
        ]
        with translated("claiming a chunk"):
            found = await self._chunks.find_one_and_update(
                free, claim, sort=[("number", 1)], hint="undone", return_document=ReturnDocument.AFTER
            )
        return None if found is None else chunk_of(found)

    async def renew(self, held: Mapping[str, tuple[Lease, ChunkCounts]]) -> set[str]:
        """Extend the leases of chunks (by id) and record their counts. Return the ids whose lease was lost."""
        free_at = latest(self._clock) + self._lease_for
        writes = [
            UpdateOne(
                {"_id": chunk_id, "lease.id": lease.id, "free_at": _FREE},
                {"$set": {"free_at": free_at, "so_far": {"ok": now.ok, "failed": now.failed, "note": now.note}}},
            )
            for chunk_id, (lease, now) in held.items()
        ]
        ids = {lease.id for lease, _ in held.values()}
        with translated("renewing the leases of chunks"):
            if (await self._chunks.bulk_write(writes, ordered=False)).matched_count == len(held):
                return set()
            ours = {"_id": {"$in": list(held)}, "lease.id": {"$in": list(ids)}, "free_at": _FREE}
            kept = {document["_id"] async for document in self._chunks.find(ours, {"_id": 1})}
        return held.keys() - kept

    async def stage(self, chunk: Chunk, name: str, summary: PartSummary, versions: Sequence[str]) -> bool:
        """Record the result of a chunk, whose staged part is `name`. False: the lease was lost."""
        done = {
            "ok": summary.rows,
            "failed": summary.failed,
            "nbytes": summary.nbytes,
            "codes": [[code, count] for code, count in summary.codes.items()],
            "versions": list(versions),
        }
        set_ = {"state": str(ChunkState.STAGED), "staged": name, "done": done}
        return await self._fenced(chunk, {"$set": set_, "$unset": {"so_far": ""}})

    async def mark_done(self, chunk: Chunk) -> bool:
        """Record that the part of a chunk is published. False: the lease was lost."""
        unset = {"free_at": "", "lease": "", "so_far": ""}
        return await self._fenced(chunk, {"$set": {"state": str(ChunkState.DONE)}, "$unset": unset})

    async def release(self, chunk: Chunk, *, until: datetime | None = None, is_counted: bool, note: str = "") -> bool:
        """Release a chunk; it may be claimed from `until` on, by default immediately. False: the lease was lost."""
        update: Document = {
            "$set": {"free_at": until or self._clock(), "so_far": {"ok": 0, "failed": 0, "note": note}},
            "$unset": {"lease": ""},
        }
        if chunk.state is not ChunkState.STAGED:
            update["$set"]["state"] = str(ChunkState.WAITING)
            update["$unset"] |= {"done": "", "staged": ""}
        if not is_counted:
            update["$inc"] = {"attempts": -1}
        return await self._fenced(chunk, update)

    async def is_busy(self, batch: str) -> bool:
        """Return True while an instance runs a chunk of the batch, or a part waits to be published."""
        running = {"state": str(ChunkState.RUNNING), "free_at": {"$gt": earliest(self._clock)}}
        staged = {"state": str(ChunkState.STAGED), "free_at": _FREE}
        with translated("reading running chunks"):
            return await self._chunks.find_one({"batch": batch, "$or": [running, staged]}, {"_id": 1}) is not None

    async def has_unfinished(self, batch: str) -> bool:
        """Return True while the batch has chunks that are not done."""
        with translated("reading unfinished chunks"):
            found = await self._chunks.find_one({"batch": batch, "free_at": _FREE}, {"_id": 1}, hint="undone")
        return found is not None

    async def drop_unfinished(self, batch: str) -> None:
        """Drop the unfinished chunks of a batch for good: no instance can claim or stage them any more."""
        with translated("dropping chunks"):
            await self._chunks.update_many(
                {"batch": batch, "free_at": _FREE},
                {"$set": {"state": str(ChunkState.DROPPED)}, "$unset": {"free_at": "", "lease": "", "so_far": ""}},
            )

    async def totals(self, batch: str) -> Totals:
        """Return the counts of a batch so far, summed over its chunks."""
        ok, failed = ({"$ifNull": [f"$done.{name}", f"$so_far.{name}"]} for name in ("ok", "failed"))
        is_done = {"$in": ["$state", [str(ChunkState.STAGED), str(ChunkState.DONE)]]}
        summing: list[Mapping[str, Any]] = [
            {"$match": {"batch": batch}},
            {
                "$group": {
                    "_id": {"codes": "$done.codes", "versions": "$done.versions", "note": "$so_far.note"},
                    "rows": {"$sum": "$span.rows"},
                    "ok": {"$sum": ok},
                    "failed": {"$sum": failed},
                    "nbytes": {"$sum": "$done.nbytes"},
                    "chunks": {"$sum": 1},
                    "chunks_done": {"$sum": {"$cond": [is_done, 1, 0]}},
                }
            },
        ]
        with translated("summing up a batch"):
            found = await (await self._chunks.aggregate(summing)).to_list()
        return _added(found)

    async def done(self, batch: str) -> AsyncIterator[Document]:
        """Yield the documents of the chunks that are done, in their order."""
        with translated("reading the chunks that are done"):
            async for document in self._chunks.find({"batch": batch, "state": str(ChunkState.DONE)}).sort("number", 1):
                yield document

    async def forget(self, batch: str) -> None:
        """Delete the chunks of a batch."""
        with translated("deleting chunks"):
            await self._chunks.delete_many({"batch": batch})

    async def batch_ids(self) -> set[str]:
        """Return the ids of batches that have chunks; none while a backup is restored, because a restore writes chunks
        before their batches."""
        with translated("reading the batches that have chunks"):
            if await self._chunks.database[RESTORES].find_one({}, {"_id": 1}) is not None:
                return set()
            return set(await self._chunks.distinct("batch"))

    async def release_stale(self) -> int:
        """Release the chunks that earlier processes of this instance left behind. Return their number."""
        left = {
            "free_at": _FREE,
            "lease.owner": self._owner,
            "lease.process": {"$ne": self._process},
        }
        with translated("releasing the chunks of an earlier process"):
            freed = await self._chunks.update_many(left, {"$set": {"free_at": earliest(self._clock)}})
            return freed.modified_count

    async def _fenced(self, chunk: Chunk, update: Document) -> bool:
        assert chunk.lease is not None
        fence = {"_id": chunk.id, "lease.id": chunk.lease.id, "attempts": chunk.attempts, "free_at": _FREE}
        with translated("writing about a chunk"):
            return bool((await self._chunks.update_one(fence, update)).matched_count)


def _added(groups: Sequence[Document]) -> Totals:
    def total(name: str) -> int:
        return sum(group[name] for group in groups)

    codes: Counter[str] = Counter()
    for group in groups:
        # Chunks with equal codes form one group.
        for code, count in group["_id"].get("codes") or ():
            codes[code] += count * group["chunks"]
    return Totals(
        rows=total("rows"),
        ok=total("ok"),
        failed=total("failed"),
        chunks=total("chunks"),
        chunks_done=total("chunks_done"),
        nbytes=total("nbytes"),
        codes=dict(sorted(codes.items())),
        versions=tuple(sorted({version for group in groups for version in group["_id"].get("versions") or ()})),
        note=next((note for group in groups if (note := group["_id"].get("note"))), ""),
    )
