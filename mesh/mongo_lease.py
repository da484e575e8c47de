"""Leader lease in MongoDB: at most one instance of a service holds it, and acts for all of them.

    follower ──(the lease is free or expired)──> holder, with a token ──(renewed)──> holder ...
                                                     └──(stops, is killed, loses MongoDB)──> follower

The lease is a document in the database on which its holder acts: an instance that can act can also hold the lease.
Expiry is compared with MongoDB's clock, so that instances with different clocks agree on the holder. The token grows
with each term. A write of the holder carries the token and demands that no greater one has written there before:
a holder that was only slow changes nothing. The holder stops by its own clock before the lease expires.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import pymongo
from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever
from shoal.errors import AlreadyExists, ShoalError

log = logging.getLogger(__name__)

LEASES = "leads"
"""Name of the collection that holds the leases, one document for each service."""
LEASE_VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "holder", "token", "expires_at"],
        "properties": {
            "holder": {"bsonType": "string"},
            "token": {"bsonType": ["int", "long"], "minimum": 0},
            "expires_at": {"bsonType": "date"},
        },
    }
}
EXPIRED = datetime(1970, 1, 1, tzinfo=UTC)
"""Expiry time of a lease that is free."""

# A shutdown does not wait longer for a MongoDB that does not respond.
_RELEASE_TIMEOUT_S = 1.0


class LeaderLease(Background):
    """Acquires and renews the lease for as long as the `async with` block lasts, once `ready` is set; then releases it.

    `name` is the service, whose instances compete; `holder` is unique to this process. The lease of a holder that was
    killed passes to another instance within `ttl_ms` and one renewal interval.
    """

    def __init__(
        self,
        leases: AsyncCollection[Document],
        name: str,
        holder: str,
        *,
        ready: asyncio.Event,
        ttl_ms: int,
        renew_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._name = name
        self._holder = holder
        self._ready = ready
        self._ttl_ms = ttl_ms
        self._renew_s = renew_ms / 1_000
        self._clock = clock
        self._token = 0
        self._until = 0.0

    @property
    def token(self) -> int | None:
        """The fencing token while this instance surely holds the lease, else None. Read it before every write."""
        return self._token if self.is_held else None

    @property
    def is_held(self) -> bool:
        """True while this instance surely holds the lease."""
        return self._clock() < self._until

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, err, tb)
        with suppress(ShoalError), pymongo.timeout(_RELEASE_TIMEOUT_S):
            await self.release()

    async def _run(self) -> None:
        await self._ready.wait()
        work = f"acquire the leader lease of {self._name}"
        await for_ever(work, self._step, away_s=self._renew_s, log=log, level=logging.INFO)

    async def _step(self) -> float:
        await self.acquire_or_renew()
        return self._renew_s

    async def acquire_or_renew(self) -> None:
        """Acquire the lease, or renew it, unless another instance holds it.

        Raises:
            ShoalError: MongoDB did not respond. A lease that is held stays held until it expires.
        """
        began = self._clock()
        with translated(f"acquiring the leader lease of {self._name}"):
            document = await self._acquire()
            if document is None and await self._insert_document():
                document = await self._acquire()
        if document is None:
            self._until = 0.0
            return
        if self.token != document["token"]:
            log.info(
                "acquired the leader lease of %(name)s, token %(token)d",
                {"event": "leader.acquired", "name": self._name, "token": document["token"]},
            )
        # The term counts from before the request here, and from a later moment in MongoDB: it ends here first.
        self._token, self._until = document["token"], began + self._ttl_ms / 1_000

    async def release(self) -> None:
        """Release the lease if this instance has acquired it: another instance can acquire it immediately.

        Raises:
            ShoalError: MongoDB did not respond. The lease then lasts until it expires.
        """
        if not self._until:
            return
        self._until = 0.0
        with translated(f"releasing the leader lease of {self._name}"):
            mine = {"_id": self._name, "holder": self._holder}
            await self._leases.update_one(mine, {"$set": {"expires_at": EXPIRED}})

    async def _acquire(self) -> Document | None:
        return await self._leases.find_one_and_update(
            {"_id": self._name, "$expr": {"$or": [_is_expired(), self._is_ours()]}},
            [{"$set": self._ours()}],
            return_document=ReturnDocument.AFTER,
        )

    async def _insert_document(self) -> bool:
        """Insert the document unless it exists. Return True when it was inserted."""
        free = {"holder": "", "token": 0, "expires_at": EXPIRED}
        # Two instances may insert it at the same moment.
        with suppress(AlreadyExists), translated("inserting a leader lease"):
            done = await self._leases.update_one({"_id": self._name}, {"$setOnInsert": free}, upsert=True)
            return done.upserted_id is not None
        return False

    def _is_ours(self) -> Document:
        return {"$eq": ["$holder", {"$literal": self._holder}]}

    def _ours(self) -> Document:
        is_same_term = {"$and": [self._is_ours(), {"$not": [_is_expired()]}]}
        return {
            "token": {"$cond": [is_same_term, "$token", {"$add": ["$token", 1]}]},
            "holder": {"$literal": self._holder},
            "expires_at": {"$add": ["$$NOW", self._ttl_ms]},
        }


def _is_expired() -> Document:
    return {"$lte": ["$expires_at", "$$NOW"]}


def fenced(token: int, field: str = "fence") -> Document:
    """Return the condition of a write that only the holder may do: no later term has written its token to `field`."""
    return {"$or": [{field: {"$lte": token}}, {field: {"$exists": False}}]}
