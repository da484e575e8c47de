"""Checkpoints of shards in MongoDB, with leases: one instance at a time reads a shard and advances its checkpoint.

Collection `checkpoints`: a document for each shard, and one for each participating instance, by which the others know
it. A lease has a unique id; every write names it (the fence), so that an instance with a lost lease writes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock, earliest, latest
from services.ingest.connectors.shards import Checkpoint

CHECKPOINTS = "checkpoints"
VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "stream", "kind"],
        "properties": {
            "stream": {"bsonType": "string"},
            "kind": {"enum": ["shard", "instance"]},
            "sequence": {"bsonType": "string"},
            "lease": {"bsonType": "string"},
            "expires_at": {"bsonType": "date"},
            "began_at": {"bsonType": "date"},
        },
    }
}


class CheckpointRepository:
    """Checkpoints of one stream of one connector, as seen by instance `me`."""

    def __init__(
        self, collection: AsyncCollection[Document], stream: str, *, me: str, clock: Clock, lease_ms: int
    ) -> None:
        self._collection = collection
        self._stream = stream
        self._me = me
        self._clock = clock
        self._lease = timedelta(milliseconds=lease_ms)

    async def all(self) -> dict[str, Checkpoint]:
        """Return the checkpoints by shard."""
        with translated("reading checkpoints"):
            found = await self._collection.find(self._prefix("shard")).to_list()
        return {document["shard"]: _checkpoint_of(document) for document in found}

    async def live_instances(self) -> set[str]:
        """Return the other live instances that read the stream."""
        alive = {**self._prefix("instance"), "expires_at": {"$gt": earliest(self._clock)}}
        with translated("reading the instances of a stream"):
            found = await self._collection.find(alive, {"owner": 1}).to_list()
        return {document["owner"] for document in found} - {self._me}

    async def acquire(self, shard: str) -> tuple[str, Checkpoint] | None:
        """Acquire a free shard. Return the lease's id and the checkpoint. None: another instance holds the shard."""
        lease = uuid.uuid4().hex
        free = {
            "_id": self._id("shard", shard),
            "$or": [{"expires_at": {"$lte": earliest(self._clock)}}, {"owner": {"$in": ["", self._me]}}],
        }
        held = {"owner": self._me, "lease": lease, "expires_at": latest(self._clock) + self._lease}
        about = {"stream": self._stream, "kind": "shard", "shard": shard}
        with translated("acquiring a shard"):
            try:
                document = await self._collection.find_one_and_update(
                    free, {"$set": held, "$setOnInsert": about}, upsert=True, return_document=ReturnDocument.AFTER
                )
            except DuplicateKeyError:
                # The shard's document exists, and the shard is not free.
                return None
        return None if document is None else (lease, _checkpoint_of(document))

    async def renew(self, leases: Mapping[str, str]) -> set[str]:
        """Renew leases and this instance's own document. Return the shards whose lease was lost."""
        until = latest(self._clock) + self._lease
        with translated("renewing leases of shards"):
            await self._collection.update_one(
                {"_id": self._id("instance", self._me)},
                {"$set": {"stream": self._stream, "kind": "instance", "owner": self._me, "expires_at": until}},
                upsert=True,
            )
            if not leases:
                return set()
            mine = {
                "_id": {"$in": [self._id("shard", shard) for shard in leases]},
                "lease": {"$in": [*leases.values()]},
            }
            await self._collection.update_many(mine, {"$set": {"expires_at": until}})
            kept = await self._collection.find(mine, {"shard": 1}).to_list()
        return leases.keys() - {document["shard"] for document in kept}

    async def advance(self, shard: str, lease: str, *, sequence: str | None = None, is_finished: bool = False) -> bool:
        """Advance a shard's checkpoint. False: the lease was lost, and nothing was written."""
        change: Document = {} if sequence is None else {"sequence": sequence}
        if is_finished:
            change |= {"finished": True, "owner": ""}
        with translated("advancing a checkpoint"):
            written = await self._collection.update_one(
                {"_id": self._id("shard", shard), "lease": lease}, {"$set": change}
            )
        return written.matched_count == 1

    async def record_start(self, shard: str, lease: str, at: datetime) -> bool:
        """Record the start time of a shard that has no checkpoint yet. False: the lease was lost."""
        with translated("recording the start of a shard"):
            written = await self._collection.update_one(
                {"_id": self._id("shard", shard), "lease": lease}, {"$set": {"began_at": at}}
            )
        return written.matched_count == 1

    async def release(self, shard: str, lease: str) -> None:
        """Release a shard; another instance may acquire it immediately."""
        with translated("releasing a shard"):
            await self._collection.update_one(
                {"_id": self._id("shard", shard), "lease": lease}, {"$set": {"owner": "", "lease": ""}}
            )

    async def leave(self) -> None:
        """Remove this instance from the stream's instances."""
        with translated("leaving a stream"):
            await self._collection.delete_one({"_id": self._id("instance", self._me)})

    def _prefix(self, kind: str) -> Document:
        start = f"{self._stream}/{kind}/"
        # '0' follows '/' in the order of characters.
        return {"_id": {"$gte": start, "$lt": f"{self._stream}/{kind}0"}}

    def _id(self, kind: str, name: str) -> str:
        return f"{self._stream}/{kind}/{name}"


def _checkpoint_of(document: Document) -> Checkpoint:
    return Checkpoint(
        document["shard"],
        document.get("sequence", ""),
        document.get("finished", False),
        document.get("owner", ""),
        document.get("expires_at"),
        document.get("began_at"),
    )
