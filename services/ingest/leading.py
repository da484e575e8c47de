"""Which instance leads: one at a time does what is to be done once for all, such as firing schedules.

    follower ──(the lease is free or has lapsed)──> leader, with a token ──(renewed)──> leader ...
                                                        └──(stops, is killed, is cut off)──> follower

The lease lies in MongoDB, beside what its holder acts upon, so whoever can act can lead, and the other way round. Its
times are MongoDB's: instances whose clocks disagree agree on who leads. Each term's token is greater than those before;
an act writes it along and demands that no greater one was there, so that a leader that was only slow changes nothing.
The holder itself stops by its own clock, before the lease lapses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import pymongo
from pymongo import ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.tasks import Background, for_ever
from services.ingest.documents import EVER
from shoal.errors import AlreadyExists, ShoalError

log = logging.getLogger(__name__)

LEADS = "leads"
LEAD_VALIDATOR: Mapping[str, Any] = {
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
_FAREWELL_S = 1.0
_NAME = "ingest"


class Lead(Background):
    """Stands for the lead for as long as the `async with` block lasts, once `ready` is set. Leaving resigns.

    `holder` is of this process alone. A leader that was killed is succeeded after `ttl_ms`.
    """

    def __init__(
        self,
        leads: AsyncCollection[Document],
        holder: str,
        *,
        ready: asyncio.Event,
        ttl_ms: int,
        renew_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leads = leads
        self._holder = holder
        self._ready = ready
        self._ttl_ms = ttl_ms
        self._renew_s = renew_ms / 1_000
        self._clock = clock
        self._token = 0
        self._until = 0.0

    @property
    def token(self) -> int | None:
        """The fencing token, while this instance surely leads; ask at every act. None: it does not."""
        return self._token if self._clock() < self._until else None

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, err, tb)
        if self._until:
            self._until = 0.0
            with suppress(ShoalError), pymongo.timeout(_FAREWELL_S), translated("resigning the lead"):
                await self._leads.update_one({"_id": _NAME, "holder": self._holder}, {"$set": {"expires_at": EVER}})

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("stand for the lead", self._turn, away_s=self._renew_s, log=log, level=logging.INFO)

    async def _turn(self) -> float:
        await self.stand()
        return self._renew_s

    async def stand(self) -> None:
        """Takes the lease, or renews it, unless somebody else has it.

        Raises:
            ShoalError: it is not known who has it.
        """
        began = self._clock()
        with translated("standing for the lead"):
            await self._make()
            document = await self._leads.find_one_and_update(
                {"_id": _NAME, "$expr": {"$or": [_is_over(), self._is_ours()]}},
                [{"$set": self._ours()}],
                return_document=ReturnDocument.AFTER,
            )
        if document is None:
            self._until = 0.0
            return
        if self.token != document["token"]:
            log.info("leads, with token %d", document["token"])
        # Counted from before the question: MongoDB counts from after.
        self._token, self._until = document["token"], began + self._ttl_ms / 1_000

    async def _make(self) -> None:
        blank = {"holder": "", "token": 0, "expires_at": EVER}
        with suppress(AlreadyExists):  # Two made it at once.
            await self._leads.update_one({"_id": _NAME}, {"$setOnInsert": blank}, upsert=True)

    def _is_ours(self) -> Document:
        return {"$eq": ["$holder", {"$literal": self._holder}]}

    def _ours(self) -> Document:
        goes_on = {"$and": [self._is_ours(), {"$not": [_is_over()]}]}
        return {
            "token": {"$cond": [goes_on, "$token", {"$add": ["$token", 1]}]},
            "holder": {"$literal": self._holder},
            "expires_at": {"$add": ["$$NOW", self._ttl_ms]},
        }


def _is_over() -> Document:
    return {"$lte": ["$expires_at", "$$NOW"]}


def fenced(token: int) -> Document:
    """The condition of a write that only the leader may do: nobody with a later term has written there."""
    return {"$or": [{"fence": {"$lte": token}}, {"fence": {"$exists": False}}]}
