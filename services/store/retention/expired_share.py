"""Share of the store's data that the rules would remove at a given time, estimated from a sample."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from pymongo import DESCENDING

from mesh.mongo import Document, translated
from mesh.removal_guard import SAMPLE
from services.store.documents import EARLIEST, Collections
from services.store.retention.rule_repository import RuleRepository
from services.store.retention.rules import DataKind, RetentionPlan, plan
from shoal.store.v1.store_pb2 import Result

_SUCCEEDED = int(Result.OUTCOME_SUCCEEDED)
_FIELDS = ("recorded_at", "removed_at", "answer_removed_at", "tenant", "outcome")


class ExpiredShare:
    """Results, answers and tombstones: the `Removal` that the store's removal guard watches."""

    def __init__(self, collections: Collections, rules: RuleRepository) -> None:
        self._collections = collections
        self._rules = rules

    async def newest(self) -> datetime | None:
        with translated("looking for the newest result"):
            doc = await self._collections.results.find_one(
                {"recorded_at": {"$gte": EARLIEST}}, {"recorded_at": 1}, sort=[("recorded_at", DESCENDING)]
            )
        return None if doc is None else doc["recorded_at"]

    async def share(self, now: datetime) -> float:
        """Return the largest share, from 0 to 1, of a kind of data that would be removed at `now`."""
        rules = (await self._rules.read()).rules
        plans = {kind: plan(rules, kind, now) for kind in DataKind}
        stages = [{"$sample": {"size": SAMPLE}}, {"$project": dict.fromkeys(_FIELDS, 1)}]
        stored: Counter[DataKind] = Counter()
        expired: Counter[DataKind] = Counter()
        with translated("estimating the share of expired data"):
            async for doc in await self._collections.results.aggregate(stages):
                for kind in _kinds(doc):
                    stored[kind] += 1
                    expired[kind] += _is_expired(doc, kind, plans[kind])
        return max((expired[kind] / stored[kind] for kind in stored), default=0.0)

    async def rules_version(self) -> str:
        return str((await self._rules.read()).version)


def _kinds(doc: Document) -> list[DataKind]:
    """Return the kinds of data that a document holds."""
    if "recorded_at" not in doc:
        return [DataKind.TOMBSTONES]
    has_answer = doc["outcome"] == _SUCCEEDED and "answer_removed_at" not in doc
    return [DataKind.RESULTS, DataKind.ANSWERS] if has_answer else [DataKind.RESULTS]


def _is_expired(doc: Document, kind: DataKind, planned: RetentionPlan) -> bool:
    if kind is DataKind.TOMBSTONES:
        return planned.default is not None and doc["removed_at"] < planned.default
    until = planned.until(doc["tenant"])
    return until is not None and doc["recorded_at"] < until
