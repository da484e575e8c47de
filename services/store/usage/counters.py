"""How much each tenant has: counters in MongoDB, kept up as things come and go, and counted anew now and then.

    results come ──> added up in memory ──each second──> $inc      a crash forgets what came within the second
    retention    ──> $inc, in the transaction that removes
    payloads     ──> noted, in the transaction that refers or releases ──each second──> $inc      (changes)
    recount      ──> walks a tenant's results by index, adds up its payloads; $inc by what the counter was off

    usage  {_id: tenant, results, bytes, payloads?, payload_bytes?, recounts, recounted_at}

A write for every bulk of results would cost more than the counting is worth. What a crash forgets, the next recount
finds: each tenant is counted once a day, by whichever instance comes first.

Payloads are few beside results, large, and have a transaction of their own already: a note more, and they are counted
exactly, whoever is killed when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any

import pymongo
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import Document, translated
from mesh.process.tasks import Background
from services.store.documents import EARLIEST, Collections, is_being_restored, whole_milliseconds
from services.store.page_token import START, Position
from services.store.results.result_filter import beyond
from services.store.transactions import transaction
from services.store.usage.changes import Changes
from services.store.usage.weight import (
    ANSWER_BYTES,
    RECORD_BYTES,
    Weight,
    by_tenant,
    weight_of,
    weight_of_payloads,
)
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

FLUSH_S = 1.0
RECOUNT_EVERY = timedelta(days=1)
_LOOK_S = 600.0
_WALK = 2_000
# Results of one step of a recount: some 10 ms, or as many seconds when each holds a megabyte.
_WALK_TIMEOUT_S = 60.0
_UNCOUNTED: Mapping[str, Any] = {"recounts": 0, "recounted_at": EARLIEST}


class Counters(Background):
    """Counts while the `async with` block lasts. Safe beside other instances."""

    def __init__(self, collections: Collections, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._clock = clock
        self._changes = Changes(collections)
        self._waiting: dict[str, Weight] = {}

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, err, tb)
        await self.flush()

    def recorded(self, docs: Iterable[Document], replacing: Collection[str] = ()) -> None:
        """These results came. Those of the jobs `replacing` took the places of failures that are counted."""
        weights = ((doc["tenant"], weight_of(doc, replaces=doc["_id"] in replacing)) for doc in docs)
        for tenant, weight in by_tenant(weights).items():
            self._waiting[tenant] = self._waiting.get(tenant, Weight()) + weight

    async def flush(self) -> None:
        """Counts what has come. What cannot be counted now is counted later."""
        await self._flush_results()
        await self._fold_changes()

    async def _flush_results(self) -> None:
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        try:
            with translated("counting usage"):
                await self.add(waiting)
        except ShoalError as err:
            log.warning("the usage of %d tenants is counted later: %s", len(waiting), err)
            for tenant, weight in waiting.items():
                self._waiting[tenant] = self._waiting.get(tenant, Weight()) + weight

    async def _fold_changes(self) -> None:
        """Adds what was noted of payloads, here or by other instances."""

        async def all_or_nothing(session: AsyncClientSession) -> bool:
            taken = await self._changes.take(session)
            await self.add(taken, session)
            return bool(taken)

        try:
            with translated("counting payloads"):
                if not await self._changes.are_there() or await is_being_restored(self._collections):
                    return  # A restore that is repeated would bring back the notes that were counted.
                while await transaction(self._collections, all_or_nothing):
                    pass
        except ShoalError as err:
            log.warning("payloads are counted later: %s", err)

    async def pending(self, tenant: str) -> Weight:
        """What was noted of a tenant, and is not counted yet.

        Raises:
            Unavailable: MongoDB is away.
        """
        with translated("looking for what is not counted yet"):
            return await self._changes.pending(tenant)

    async def add(self, weights: Mapping[str, Weight], session: AsyncClientSession | None = None) -> None:
        """Changes counters. In a transaction: with what is counted, and best last, for others wait for it.

        Raises pymongo's errors as they are: those of a conflict have the transaction begin anew.
        """
        changes = [
            UpdateOne({"_id": tenant}, {"$inc": vars(weight), "$setOnInsert": _UNCOUNTED}, upsert=True)
            for tenant, weight in weights.items()
            if weight
        ]
        if changes:
            await self._collections.usage.bulk_write(changes, ordered=False, session=session)

    async def recount(self, tenant: str) -> None:
        """Counts a tenant's results and payloads anew, while they come and go.

        Of results it is off by what comes within about two seconds; of payloads by nothing.
        Of two that do this at once one counts.

        Raises:
            Unavailable: MongoDB is away.
        """
        await self.flush()
        # What comes from now on is counted as it comes: the walk must not count it too, however long it takes.
        until, usage = whole_milliseconds(self._clock()), self._collections.usage
        with translated(f"counting what tenant {tenant!r} has"):
            await usage.update_one({"_id": tenant}, {"$setOnInsert": {**vars(Weight()), **_UNCOUNTED}}, upsert=True)
            before = await usage.find_one({"_id": tenant}) or {}
            off = await self._walked(tenant, until) - Weight.counted(before).of_results
            off += await self._payloads_off(tenant)
            counted = {
                "$inc": {**vars(off), "recounts": 1},
                "$set": {"recounted_at": whole_milliseconds(self._clock())},
            }
            await usage.update_one({"_id": tenant, "recounts": before["recounts"]}, counted)
        if off:
            log.info(
                "tenant %r: the usage was off by %d results, %d payloads and %d bytes",
                tenant,
                off.results,
                off.payloads,
                off.bytes,
            )

    async def _walked(self, tenant: str, until: datetime) -> Weight:
        """What all results of a tenant count for that were recorded `until` then."""
        sum_, place = Weight(), START
        while True:
            steps = _step(tenant, place, until)
            with pymongo.timeout(_WALK_TIMEOUT_S):
                found: Sequence[Document] = await (
                    await self._collections.results.aggregate(steps, hint="by_tenant")
                ).to_list()
            if not found:
                return sum_
            (step,) = found
            sum_ += Weight(step["results"], step["answers"] + RECORD_BYTES * step["results"])
            place = Position(step["recorded_at"], step["job_id"])

    async def _payloads_off(self, tenant: str) -> Weight:
        """What is missing from the counter of a tenant's payloads.

        Counter, notes and references are read as of one moment. Whatever changes one of them later changes another as
        much, so that it stays right.
        """
        sum_ = {"_id": None, "count": {"$sum": 1}, "size": {"$sum": "$size"}}
        steps: list[Document] = [{"$match": {"tenant": tenant}}, {"$group": sum_}]

        async def at_once(session: AsyncClientSession) -> Weight:
            counter = await self._collections.usage.find_one({"_id": tenant}, session=session)
            cursor = await self._collections.references.aggregate(steps, hint="by_tenant", session=session)
            there = [weight_of_payloads(found["count"], found["size"]) async for found in cursor]
            counted = Weight.counted(counter).of_payloads if counter is not None else Weight()
            return sum(there, Weight()) - counted - await self._changes.pending(tenant, session)

        return await transaction(self._collections, at_once)

    async def _run(self) -> None:
        looked = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
            if asyncio.get_running_loop().time() - looked >= _LOOK_S:
                looked = asyncio.get_running_loop().time()
                await self._recount_what_is_due()

    async def _recount_what_is_due(self) -> None:
        try:
            while (tenant := await self._longest_uncounted()) is not None:
                await self.recount(tenant)
        except ShoalError as err:
            log.warning("usage is counted anew later: %s", err)
        except Exception:  # A fault of ours must not end the counting for ever.
            log.exception("counting usage")

    async def _longest_uncounted(self) -> str | None:
        """Whose count is due first. None: nobody's is."""
        due = {"recounted_at": {"$lt": self._clock() - RECOUNT_EVERY}}
        with translated("looking for usage to count"):
            found = await self._collections.usage.find_one(due, sort=[("recounted_at", 1)], hint="by_recount")
        return None if found is None else str(found["_id"])


def _step(tenant: str, after: Position, until: datetime) -> list[dict[str, Any]]:
    """The sum of the next few results of a tenant, and where they end."""
    window = {"tenant": tenant, "recorded_at": {"$gte": EARLIEST, "$lte": until}}
    query = {"$and": [window, beyond(after, oldest_first=True)]}
    group = {
        "_id": None,
        "results": {"$sum": 1},
        "answers": {"$sum": ANSWER_BYTES},
        "recorded_at": {"$last": "$recorded_at"},
        "job_id": {"$last": "$_id"},
    }
    order = {"recorded_at": 1, "_id": 1}
    return [{"$match": query}, {"$sort": order}, {"$limit": _WALK}, {"$group": group}]
