"""Checkpoints of shards in MongoDB, with leases: one instance reads a shard at a time, and only it moves its mark.

Collection `checkpoints`: a document a shard, and one for each instance that takes part, by which others know of it. A
lease has an id that is never used twice; every write names it, so that an instance which was only slow writes nothing.
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
from services.ingest.clock import Clock, earliest, latest
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
    """The checkpoints of one stream of one connector, for instance `me`."""

    def __init__(
        self, collection: AsyncCollection[Document], stream: str, *, me: str, clock: Clock, lease_ms: int
    ) -> None:
        self._collection = collection
        self._stream = stream
        self._me = me
        self._clock = clock
        self._lease = timedelta(milliseconds=lease_ms)

    async def all(self) -> dict[str, Checkpoint]:
        """By shard."""
        with translated("reading checkpoints"):
            found = await self._collection.find(self._prefix("shard")).to_list()
        return {document["shard"]: _of(document) for document in found}

    async def others(self) -> set[str]:
        """The other instances that live."""
        alive = {**self._prefix("instance"), "expires_at": {"$gt": earliest(self._clock)}}
        with translated("reading who takes part in a stream"):
            found = await self._collection.find(alive, {"owner": 1}).to_list()
        return {document["owner"] for document in found} - {self._me}

    async def take(self, shard: str) -> tuple[str, Checkpoint] | None:
        """Takes a shard that is free: the lease's id, and where to go on. None: somebody was faster."""
        lease = uuid.uuid4().hex
        free = {
            "_id": self._id("shard", shard),
            "$or": [{"expires_at": {"$lte": earliest(self._clock)}}, {"owner": {"$in": ["", self._me]}}],
        }
        taken = {"owner": self._me, "lease": lease, "expires_at": latest(self._clock) + self._lease}
        about = {"stream": self._stream, "kind": "shard", "shard": shard}
        with translated("taking a shard"):
            try:
                document = await self._collection.find_one_and_update(
                    free, {"$set": taken, "$setOnInsert": about}, upsert=True, return_document=ReturnDocument.AFTER
                )
            except DuplicateKeyError:  # It is there, and not free.
                return None
        return None if document is None else (lease, _of(document))

    async def renew(self, leases: Mapping[str, str]) -> set[str]:
        """Prolongs leases, and says that this instance lives. Gives the shards whose lease was lost."""
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

    async def move(self, shard: str, lease: str, *, sequence: str | None = None, is_finished: bool = False) -> bool:
        """Moves a shard's checkpoint. False: the lease was lost, and nothing was written."""
        change: Document = {} if sequence is None else {"sequence": sequence}
        if is_finished:
            change |= {"finished": True, "owner": ""}
        with translated("moving a checkpoint"):
            written = await self._collection.update_one(
                {"_id": self._id("shard", shard), "lease": lease}, {"$set": change}
            )
        return written.matched_count == 1

    async def begin(self, shard: str, lease: str, at: datetime) -> bool:
        """Notes where the reading of a shard begins that has no checkpoint yet. False: the lease was lost."""
        with translated("noting where a shard is begun"):
            written = await self._collection.update_one(
                {"_id": self._id("shard", shard), "lease": lease}, {"$set": {"began_at": at}}
            )
        return written.matched_count == 1

    async def release(self, shard: str, lease: str) -> None:
        """Lets go of a shard: whoever wants it has it at once."""
        with translated("giving a shard back"):
            await self._collection.update_one(
                {"_id": self._id("shard", shard), "lease": lease}, {"$set": {"owner": "", "lease": ""}}
            )

    async def leave(self) -> None:
        """This instance takes part no longer."""
        with translated("leaving a stream"):
            await self._collection.delete_one({"_id": self._id("instance", self._me)})

    def _prefix(self, kind: str) -> Document:
        start = f"{self._stream}/{kind}/"
        return {"_id": {"$gte": start, "$lt": f"{self._stream}/{kind}0"}}  # '0' comes after '/'.

    def _id(self, kind: str, name: str) -> str:
        return f"{self._stream}/{kind}/{name}"


def _of(document: Document) -> Checkpoint:
    return Checkpoint(
        document["shard"],
        document.get("sequence", ""),
        document.get("finished", False),
        document.get("owner", ""),
        document.get("expires_at"),
        document.get("began_at"),
    )
