"""Repository of the retention rules, with the fence that every removal under these rules must pass.

    retention  {_id: kind or kind/tenant, kept, tenant?, keep_ms?, updated_at}
    fences     {_id: "retention", token?, rules, acts}

`token` is the greatest token of a leader lease (mesh/mongo_lease.py) under which something was removed; `rules` counts
changes of the rules. A removal is a transaction. It demands that no later leader has removed anything, and that the
rules have not changed. So a leader that lost its lease removes nothing, and after SetRetention has returned, no
instance removes anything under the old rules.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import Document, translated
from mesh.mongo_lease import fenced
from services.store.documents import Collections, whole_milliseconds
from services.store.retention.rules import DataKind, Rule, check_rule
from services.store.transactions import transaction
from shoal.errors import FailedPrecondition

T = TypeVar("T")

_FENCE = "retention"


@dataclass(frozen=True)
class RuleSnapshot:
    """All rules at one version."""

    rules: tuple[Rule, ...]
    version: int


class Outdated(Exception):
    """The rules, or the documents to be removed, have changed since they were read: read them again."""


class RuleRepository:
    """Reads and changes the rules. Safe beside other instances."""

    def __init__(self, collections: Collections, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._clock = clock

    async def read(self) -> RuleSnapshot:
        """Return the current rules.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("reading the rules of retention"):
            # The fence first: a change between the two reads is noticed.
            fence = await self._collections.fences.find_one({"_id": _FENCE})
            docs = await self._collections.retention.find({}).sort("_id").hint("_id_").to_list()
        return RuleSnapshot(tuple(map(_rule, docs)), fence["rules"] if fence else 0)

    async def put(self, rule: Rule, *, remove: bool) -> None:
        """Set a rule, or remove the rule of its kind and tenant.

        Raises:
            InvalidArgument: the rule is not allowed.
        """
        check_rule(rule)
        doc = _document(rule, whole_milliseconds(self._clock()))

        async def change(session: AsyncClientSession) -> None:
            rules, fences = self._collections.retention, self._collections.fences
            if remove:
                await rules.delete_one({"_id": doc["_id"]}, session=session)
            else:
                await rules.replace_one({"_id": doc["_id"]}, doc, upsert=True, session=session)
            await fences.update_one({"_id": _FENCE}, {"$inc": {"rules": 1}}, upsert=True, session=session)

        with translated("changing the rules of retention"):
            await self.transaction(change)

    async def pass_fence(self, token: int, version: int, session: AsyncClientSession) -> None:
        """Make the transaction of `session` a removal by the holder of lease `token`, under the rules of `version`.

        Raises:
            Outdated: the rules have changed.
            FailedPrecondition: the holder of a later term has removed something.
        """
        fences = self._collections.fences
        # An older version wrote tokens of etcd's election, with the etcd that they belong to: no later terms.
        is_no_later = {"$or": [fenced(token, "token"), {"etcd": {"$exists": True}}]}
        # `acts` makes this a write even when the token is unchanged, so that of two removals one waits.
        passing = {"$set": {"token": token}, "$unset": {"etcd": ""}, "$inc": {"acts": 1}}
        passed = await fences.update_one({"_id": _FENCE, "rules": version, **is_no_later}, passing, session=session)
        if passed.matched_count:
            return
        fence = await fences.find_one({"_id": _FENCE}, session=session)
        if fence is not None and fence["rules"] == version:
            raise FailedPrecondition(f"retention with lease token {token}: a later leader, {fence['token']}, has acted")
        raise Outdated

    async def transaction(self, work: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """Run `work` in one transaction, possibly more than once."""
        return await transaction(self._collections, work)


def _document(rule: Rule, now: datetime) -> Document:
    doc: Document = {"_id": rule.id, "kept": str(rule.kind), "updated_at": now}
    if rule.tenant is not None:
        doc["tenant"] = rule.tenant
    if rule.keep_for is not None:
        doc["keep_ms"] = rule.keep_for // timedelta(milliseconds=1)
    return doc


def _rule(doc: Document) -> Rule:
    keep = timedelta(milliseconds=doc["keep_ms"]) if "keep_ms" in doc else None
    return Rule(DataKind(doc["kept"]), doc.get("tenant"), keep, doc["updated_at"])
