"""Sweep: removes the data that rules no longer keep, oldest first, in small transactions that each pass the fence.

    rules ──plan──> scopes ──batch──> find a few by index ──transaction: fence, remove, delete blobs──> next batch
                                                                   └─ rules changed: read them, plan again

With one rule for all tenants there is one scope, in the order of time. When tenants have their own rules, each tenant
is a scope, found by skipping from one tenant to the next in the index: data that is kept is never read, however much
there is. Records without their answers stay in the index: a mark holds the position reached for each tenant.
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
from services.store.retention.rule_repository import Outdated, RuleRepository, RuleSnapshot
from services.store.retention.rules import DataKind, RetentionScope, plan
from services.store.usage.counters import Counters
from services.store.usage.weight import ANSWER_BYTES, INLINE_BYTES, RECORD_BYTES, Weight, by_tenant
from shoal.store.v1.store_pb2 import Result

BATCH = 200
"""Documents of one transaction: it takes some 10 ms, so that others do not wait long for its locks."""
BATCH_BYTES = 16 << 20
"""Answers of one transaction: MongoDB caches what a transaction rewrites until its end."""
BUDGET_S = 2.0
"""Time of one call; when more is left to remove, it is called again."""
_SUCCEEDED = int(Result.OUTCOME_SUCCEEDED)
_ABOUT = {"recorded_at": 1, "tenant": 1, "blob": 1, "inline_bytes": INLINE_BYTES, "answer_bytes": ANSWER_BYTES}
_OLDEST = [("recorded_at", ASCENDING), ("_id", ASCENDING)]


class Lease(Protocol):
    """Lease of the leader that sweeps."""

    @property
    def token(self) -> int | None:
        """The fencing token; None when the lease is lost."""


@dataclass
class Swept:
    """Counts of one call."""

    results: int = 0
    answers: int = 0
    tombstones: int = 0
    more: bool = False


class Sweep:
    """Applies the rules for the leader. Safe beside other instances that sweep too."""

    def __init__(
        self,
        collections: Collections,
        rules: RuleRepository,
        counters: Counters,
        clock: Callable[[], datetime],
        *,
        removal_clock: Callable[[], datetime] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store what a call needs. `removal_clock` decides what is old (None: `clock`); `clock` dates the removals."""
        self._collections = collections
        self.removed = 0
        """Results, large answers and tombstones that this instance has removed."""
        self._rules = rules
        self._counters = counters
        self._deletions = PendingDeletions(collections)
        self._clock = clock
        self._removal_clock = removal_clock or clock
        self._monotonic = monotonic
        # Last tenant reached. Another instance begins from the start, which costs one index read for each tenant.
        self._reached: dict[DataKind, str | None] = {}

    async def apply(self, lease: Lease) -> Swept:
        """Remove expired data for about BUDGET_S. Nothing more is removed once `lease` is lost.

        Raises:
            FailedPrecondition: a later leader has acted.
            Unavailable: MongoDB is unavailable. Earlier removals stay.
        """
        swept = Swept()
        ends = self._monotonic() + BUDGET_S
        snapshot = await self._rules.read()
        for kind in DataKind:
            while not swept.more:
                try:
                    swept.more = await self._sweep(kind, snapshot, lease, swept, ends)
                    break
                except Outdated:
                    snapshot = await self._rules.read()
        self.removed += swept.results + swept.answers + swept.tombstones
        return swept

    async def _sweep(self, kind: DataKind, snapshot: RuleSnapshot, lease: Lease, swept: Swept, ends: float) -> bool:
        """Remove all expired data of one kind. Return True when the time or the lease ended before that."""
        while (scope := await self._next_scope(kind, snapshot)) is not None:
            removal = _Removal(kind, scope, snapshot.version)
            while found := await self._find(removal):
                if (token := lease.token) is None:
                    return True
                setattr(swept, kind, getattr(swept, kind) + await self._remove(removal, found, token))
                if self._monotonic() >= ends:
                    return True
            if scope.tenant is None:
                return False
            self._reached[kind] = scope.tenant
            if self._monotonic() >= ends:
                return True
        self._reached.pop(kind, None)
        return False

    async def _next_scope(self, kind: DataKind, snapshot: RuleSnapshot) -> RetentionScope | None:
        planned = plan(snapshot.rules, kind, whole_milliseconds(self._removal_clock()))
        if planned.is_empty:
            return None
        if kind is not DataKind.ANSWERS and planned.is_one_for_all:
            return RetentionScope(None, planned.default) if planned.default is not None else None
        after = self._reached.get(kind)
        while (tenant := await tenant_after(self._collections, after)) is not None:
            if (until := planned.until(tenant)) is not None:
                return RetentionScope(tenant, until)
            after = tenant
        return None

    async def _find(self, removal: _Removal) -> list[Document]:
        """Return the oldest few expired documents of a scope."""
        query, sort, hint = removal.condition, _OLDEST, "by_time" if removal.scope.tenant is None else "by_tenant"
        if removal.kind is DataKind.TOMBSTONES:
            sort, hint = [("removed_at", ASCENDING)], "removed"
        with translated("looking for expired data"):
            if removal.kind is DataKind.ANSWERS and (
                mark := await self._collections.fences.find_one({"_id": removal.mark_id})
            ):
                query = {"$and": [query, beyond(Position(mark["recorded_at"], mark["job_id"]), oldest_first=True)]}
            found = self._collections.results.find(query, _ABOUT).sort(sort).hint(hint).limit(BATCH)
            return _within_batch_bytes(await found.to_list())

    async def _remove(self, removal: _Removal, found: Sequence[Document], token: int) -> int:
        now = whole_milliseconds(self._clock())
        keys = [doc["blob"]["key"] for doc in found if "blob" in doc]
        same = {"$and": [{"_id": {"$in": [doc["_id"] for doc in found]}}, removal.condition]}
        results = self._collections.results

        async def work(session: AsyncClientSession) -> int:
            await self._rules.pass_fence(token, removal.version, session)
            if removal.kind is DataKind.TOMBSTONES:
                return (await results.delete_many(same, session=session)).deleted_count
            if removal.kind is DataKind.ANSWERS:
                await self._mark(removal, found[-1], session)
            is_whole_result = removal.kind is DataKind.RESULTS
            change = tombstones.to_tombstone(now) if is_whole_result else tombstones.without_answer(now)
            done = await results.update_many(same, change, session=session)
            if done.modified_count != len(found):
                # Another writer has changed some of the documents meanwhile: find them again.
                raise Outdated
            await self._deletions.schedule(keys, now, session)
            await self._counters.add(_weight_change(removal.kind, found), session)
            return len(found)

        with translated("removing expired data"):
            return await self._rules.transaction(work)

    async def _mark(self, removal: _Removal, last: Document, session: AsyncClientSession) -> None:
        """Store the position up to which a tenant's answers are removed, so that no document is read twice."""
        position = {"recorded_at": last["recorded_at"], "job_id": last["_id"]}
        marks = self._collections.fences
        await marks.update_one({"_id": removal.mark_id}, {"$set": position}, upsert=True, session=session)


@dataclass(frozen=True)
class _Removal:
    """Kind of data to remove from one scope, and the version of the rules that demand it."""

    kind: DataKind
    scope: RetentionScope
    version: int

    @property
    def mark_id(self) -> str:
        return f"answers/{self.scope.tenant}"

    @property
    def condition(self) -> Document:
        """Query for the documents to remove."""
        if self.kind is DataKind.TOMBSTONES:
            return {"removed_at": {"$lt": self.scope.until}}
        condition: Document = {"recorded_at": {"$gte": EARLIEST, "$lt": self.scope.until}}
        if self.scope.tenant is not None:
            condition["tenant"] = self.scope.tenant
        if self.kind is DataKind.ANSWERS:
            condition["outcome"] = _SUCCEEDED
        return condition


def _weight_change(kind: DataKind, found: Sequence[Document]) -> Mapping[str, Weight]:
    """Return the change of each tenant's usage when these documents are removed."""
    one = Weight(-1, -RECORD_BYTES) if kind is DataKind.RESULTS else Weight()
    return by_tenant((doc["tenant"], one - Weight(0, doc["answer_bytes"])) for doc in found)


def _within_batch_bytes(docs: list[Document]) -> list[Document]:
    """Return the first of `docs`, at least one, with at most BATCH_BYTES of inline answers."""
    size = 0
    for at, doc in enumerate(docs):
        size += doc.get("inline_bytes", 0)
        if at and size > BATCH_BYTES:
            return docs[:at]
    return docs
