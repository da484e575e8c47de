"""Removes what the rules no longer keep: oldest first, in small transactions, each of which passes the fence.

    rules ──plan──> lanes ──batch──> find a few by index ──transaction: fence, remove, bury blobs──> next batch
                                                                   └─ rules changed: read them, plan again

With one rule for everybody there is one lane, in the order of time. With rules of tenants' own, each tenant is a lane,
found by hopping from one to the next in the index: what is kept is never looked at, however much that is. Records whose
answers are gone stay in the index: a mark says how far each tenant's are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pymongo import ASCENDING
from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import Document, translated
from services.store.artifacts.pending_deletions import PendingDeletions
from services.store.documents import EARLIEST, Collections, whole_milliseconds
from services.store.page_token import Position
from services.store.results import tombstones
from services.store.results.result_filter import beyond
from services.store.results.tenants import tenant_after
from services.store.retention.rule_repository import Outdated, Reading, RuleRepository
from services.store.retention.rules import Kept, RetentionScope, plan
from services.store.usage.counters import Counters
from services.store.usage.weight import ANSWER_BYTES, INLINE_BYTES, RECORD_BYTES, Weight, by_tenant
from shoal.store.v1.store_pb2 import Result

BATCH = 200
"""Documents of one transaction: it takes some 10 ms, so that nobody waits long for what it holds."""
BATCH_BYTES = 16 << 20
"""Answers of one transaction: MongoDB holds what it has rewritten in its cache until the end."""
BUDGET_S = 2.0
"""One call goes on for about so long, then says that there is more: it is called again."""
_SUCCEEDED = int(Result.OUTCOME_SUCCEEDED)
_ABOUT = {"recorded_at": 1, "tenant": 1, "blob": 1, "inline_bytes": INLINE_BYTES, "answer_bytes": ANSWER_BYTES}
_OLDEST = [("recorded_at", ASCENDING), ("_id", ASCENDING)]


class Lease(Protocol):
    """The lease of the leader that removes."""

    @property
    def token(self) -> int | None:
        """The fencing token, or None: the lease is lost."""


@dataclass
class Swept:
    """What one call has removed."""

    results: int = 0
    answers: int = 0
    tombstones: int = 0
    more: bool = False


class Sweep:
    """Applies the rules for the leader. Safe beside other instances that do the same."""

    def __init__(
        self,
        collections: Collections,
        book: RuleRepository,
        counters: Counters,
        clock: Callable[[], datetime],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._collections = collections
        self._book = book
        self._counters = counters
        self._deletions = PendingDeletions(collections)
        self._clock = clock
        self._monotonic = monotonic
        self._reached: dict[Kept, str | None] = {}
        # After which tenant the next call goes on. Another instance begins anew: that costs a look at each.

    async def apply(self, lease: Lease) -> Swept:
        """Remove for about BUDGET_S what is no longer kept. Nothing more is removed once `lease` is lost.

        Raises:
            FailedPrecondition: a later leader has acted.
            Unavailable: MongoDB is away. What was removed so far is.
        """
        swept = Swept()
        ends = self._monotonic() + BUDGET_S
        reading = await self._book.read()
        for kept in Kept:
            while not swept.more:
                try:
                    swept.more = await self._sweep(kept, reading, lease, swept, ends)
                    break
                except Outdated:
                    reading = await self._book.read()
        return swept

    async def _sweep(self, kept: Kept, reading: Reading, lease: Lease, swept: Swept, ends: float) -> bool:
        """Remove all of one kind that is to go. True: time was up, or the lease lost, before that."""
        while (lane := await self._next_lane(kept, reading)) is not None:
            act = _Act(kept, lane, reading.version)
            while found := await self._look(act):
                if (token := lease.token) is None:
                    return True
                setattr(swept, kept, getattr(swept, kept) + await self._remove(act, found, token))
                if self._monotonic() >= ends:
                    return True
            if lane.tenant is None:
                return False
            self._reached[kept] = lane.tenant
            if self._monotonic() >= ends:
                return True
        self._reached.pop(kept, None)
        return False

    async def _next_lane(self, kept: Kept, reading: Reading) -> RetentionScope | None:
        wanted = plan(reading.rules, kept, whole_milliseconds(self._clock()))
        if wanted.is_empty:
            return None
        if kept is not Kept.ANSWERS and wanted.is_one_for_all:
            return RetentionScope(None, wanted.default) if wanted.default is not None else None
        after = self._reached.get(kept)
        while (tenant := await tenant_after(self._collections, after)) is not None:
            if (until := wanted.until(tenant)) is not None:
                return RetentionScope(tenant, until)
            after = tenant
        return None

    async def _look(self, act: _Act) -> list[Document]:
        """The oldest few of a lane that are to go."""
        query, sort, hint = act.condition, _OLDEST, "by_time" if act.lane.tenant is None else "by_tenant"
        if act.kept is Kept.TOMBSTONES:
            sort, hint = [("removed_at", ASCENDING)], "removed"
        with translated("looking for what is no longer kept"):
            if act.kept is Kept.ANSWERS and (mark := await self._collections.fences.find_one({"_id": act.mark_id})):
                query = {"$and": [query, beyond(Position(mark["recorded_at"], mark["job_id"]), oldest_first=True)]}
            found = self._collections.results.find(query, _ABOUT).sort(sort).hint(hint).limit(BATCH)
            return _light(await found.to_list())

    async def _remove(self, act: _Act, found: Sequence[Document], token: int) -> int:
        now = whole_milliseconds(self._clock())
        keys = [doc["blob"]["key"] for doc in found if "blob" in doc]
        same = {"$and": [{"_id": {"$in": [doc["_id"] for doc in found]}}, act.condition]}
        results = self._collections.results

        async def work(session: AsyncClientSession) -> int:
            await self._book.pass_fence(token, act.version, session)
            if act.kept is Kept.TOMBSTONES:
                return (await results.delete_many(same, session=session)).deleted_count
            if act.kept is Kept.ANSWERS:
                await self._mark(act, found[-1], session)
            change = tombstones.burying(now) if act.kept is Kept.RESULTS else tombstones.emptying(now)
            done = await results.update_many(same, change, session=session)
            if done.modified_count != len(found):
                raise Outdated  # Another was faster, with some of them: look again.
            await self._deletions.schedule(keys, now, session)
            await self._counters.add(_lighter(act.kept, found), session)
            return len(found)

        with translated("removing what is no longer kept"):
            return await self._book.transaction(work)

    async def _mark(self, act: _Act, last: Document, session: AsyncClientSession) -> None:
        """Notes how far a tenant's answers are gone, so that none is looked at twice."""
        place = {"recorded_at": last["recorded_at"], "job_id": last["_id"]}
        await self._collections.fences.update_one({"_id": act.mark_id}, {"$set": place}, upsert=True, session=session)


@dataclass(frozen=True)
class _Act:
    """A kind of thing to be removed from one lane, and the version of the rules that say so."""

    kept: Kept
    lane: RetentionScope
    version: int

    @property
    def mark_id(self) -> str:
        return f"answers/{self.lane.tenant}"

    @property
    def condition(self) -> Document:
        """What a document must be to go."""
        if self.kept is Kept.TOMBSTONES:
            return {"removed_at": {"$lt": self.lane.until}}
        condition: Document = {"recorded_at": {"$gte": EARLIEST, "$lt": self.lane.until}}
        if self.lane.tenant is not None:
            condition["tenant"] = self.lane.tenant
        if self.kept is Kept.ANSWERS:
            condition["outcome"] = _SUCCEEDED
        return condition


def _lighter(kept: Kept, found: Sequence[Document]) -> Mapping[str, Weight]:
    """What the tenants have less, once these are removed."""
    one = Weight(-1, -RECORD_BYTES) if kept is Kept.RESULTS else Weight()
    return by_tenant((doc["tenant"], one - Weight(0, doc["answer_bytes"])) for doc in found)


def _light(docs: list[Document]) -> list[Document]:
    """As many of `docs`, from the first, as one transaction rewrites easily."""
    held = 0
    for at, doc in enumerate(docs):
        held += doc.get("inline_bytes", 0)
        if at and held > BATCH_BYTES:
            return docs[:at]
    return docs
