"""Usage counters in MongoDB, one for each tenant: updated continuously, and recounted once a day.

    results recorded ──> summed in memory ──each second──> $inc      a crash loses the last second
    retention        ──> $inc, in the transaction that removes
    payloads         ──> noted, in the transaction that refers or releases ──each second──> $inc      (changes)
    recount          ──> sums a tenant's results by index, and its payloads; $inc by the difference to the counter

    usage  {_id: tenant, results, bytes, payloads?, payload_bytes?, recounts, recounted_at}

A write for each bulk of results would cost more than the count is worth. The next recount corrects what a crash lost:
any instance recounts each tenant once a day.

Payloads are few, large, and have a transaction of their own already. With a note in it they are counted exactly,
whenever a process is killed.
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
_CHECK_S = 600.0
# Results of one recount step: some 10 ms, or as many seconds when each holds a megabyte.
_WALK = 2_000
_WALK_TIMEOUT_S = 60.0
_UNCOUNTED: Mapping[str, Any] = {"recounts": 0, "recounted_at": EARLIEST}


class Counters(Background):
    """Maintains the counters while the `async with` block lasts. Safe beside other instances."""

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
        """Count recorded results. Results of the jobs `replacing` replaced failures, which are counted already."""
        weights = ((doc["tenant"], weight_of(doc, replaces=doc["_id"] in replacing)) for doc in docs)
        for tenant, weight in by_tenant(weights).items():
            self._waiting[tenant] = self._waiting.get(tenant, Weight()) + weight

    async def flush(self) -> None:
        """Write the pending counts. What cannot be written now is written later."""
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
            log.warning(
                "the usage of %(tenants)d tenants will be counted later: %(error)s",
                {"event": "usage.count_retrying", "tenants": len(waiting), "error": err},
            )
            for tenant, weight in waiting.items():
                self._waiting[tenant] = self._waiting.get(tenant, Weight()) + weight

    async def _fold_changes(self) -> None:
        """Add the notes of payloads, also those of other instances."""

        async def all_or_nothing(session: AsyncClientSession) -> bool:
            taken = await self._changes.take(session)
            await self.add(taken, session)
            return bool(taken)

        try:
            with translated("counting payloads"):
                # While a restore runs, its repetition would bring back notes that were counted.
                if not await self._changes.exist() or await is_being_restored(self._collections):
                    return
                while await transaction(self._collections, all_or_nothing):
                    pass
        except ShoalError as err:
            log.warning("payloads will be counted later: %(error)s", {"event": "usage.payloads_retrying", "error": err})

    async def pending(self, tenant: str) -> Weight:
        """Return the changes of a tenant's usage that its counter does not include yet.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("reading uncounted changes of usage"):
            return await self._changes.pending(tenant)

    async def add(self, weights: Mapping[str, Weight], session: AsyncClientSession | None = None) -> None:
        """Change counters. In a transaction, call it last: other transactions wait for the counters.

        Raises pymongo's errors unchanged, because a conflict restarts the transaction.
        """
        changes = [
            UpdateOne({"_id": tenant}, {"$inc": vars(weight), "$setOnInsert": _UNCOUNTED}, upsert=True)
            for tenant, weight in weights.items()
            if weight
        ]
        if changes:
            await self._collections.usage.bulk_write(changes, ordered=False, session=session)

    async def recount(self, tenant: str) -> None:
        """Recount a tenant's results and payloads while they change.

        The count of results may miss what is recorded within about two seconds; the count of payloads is exact. When
        two instances recount a tenant at the same time, one of them counts.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        await self.flush()
        # Later results are counted when they are recorded, so the walk must not count them, however long it takes.
        until, usage = whole_milliseconds(self._clock()), self._collections.usage
        with translated(f"counting the usage of tenant {tenant!r}"):
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
                "tenant %(tenant)r: the usage was off by %(results)d results, %(payloads)d payloads and "
                "%(bytes)d bytes",
                {
                    "event": "usage.corrected",
                    "tenant": tenant,
                    "results": off.results,
                    "payloads": off.payloads,
                    "bytes": off.bytes,
                },
            )

    async def _walked(self, tenant: str, until: datetime) -> Weight:
        """Return the weight of all results of a tenant that were recorded at or before `until`."""
        total, position = Weight(), START
        while True:
            steps = _step(tenant, position, until)
            with pymongo.timeout(_WALK_TIMEOUT_S):
                found: Sequence[Document] = await (
                    await self._collections.results.aggregate(steps, hint="by_tenant")
                ).to_list()
            if not found:
                return total
            (step,) = found
            total += Weight(step["results"], step["answers"] + RECORD_BYTES * step["results"])
            position = Position(step["recorded_at"], step["job_id"])

    async def _payloads_off(self, tenant: str) -> Weight:
        """Return the correction of the counter of a tenant's payloads.

        Counter, notes and references are read at one moment. Every later change affects two of them equally, so the
        correction stays right.
        """
        sum_ = {"_id": None, "count": {"$sum": 1}, "size": {"$sum": "$size"}}
        steps: list[Document] = [{"$match": {"tenant": tenant}}, {"$group": sum_}]

        async def at_once(session: AsyncClientSession) -> Weight:
            counter = await self._collections.usage.find_one({"_id": tenant}, session=session)
            cursor = await self._collections.references.aggregate(steps, hint="by_tenant", session=session)
            actual = [weight_of_payloads(found["count"], found["size"]) async for found in cursor]
            counted = Weight.counted(counter).of_payloads if counter is not None else Weight()
            return sum(actual, Weight()) - counted - await self._changes.pending(tenant, session)

        return await transaction(self._collections, at_once)

    async def _run(self) -> None:
        checked = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(FLUSH_S)
            if not self._collections.is_prepared:
                continue
            await self.flush()
            if asyncio.get_running_loop().time() - checked >= _CHECK_S:
                checked = asyncio.get_running_loop().time()
                await self._recount_due()

    async def _recount_due(self) -> None:
        try:
            while (tenant := await self._longest_uncounted()) is not None:
                await self.recount(tenant)
        except ShoalError as err:
            log.warning("usage will be recounted later: %(error)s", {"event": "usage.recount_retrying", "error": err})
        except Exception:
            # A bug in one recount must not end the later ones.
            log.exception("recounting usage", {"event": "usage.recount_failed"})

    async def _longest_uncounted(self) -> str | None:
        """Return the tenant whose recount is due first; None when none is due."""
        due = {"recounted_at": {"$lt": self._clock() - RECOUNT_EVERY}}
        with translated("looking for usage to count"):
            found = await self._collections.usage.find_one(due, sort=[("recounted_at", 1)], hint="by_recount")
        return None if found is None else str(found["_id"])


def _step(tenant: str, after: Position, until: datetime) -> list[dict[str, Any]]:
    """Return the pipeline that sums the next few results of a tenant, and finds the position of the last."""
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
