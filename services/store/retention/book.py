"""The rules, as they lie in MongoDB, and the fence that every act under them must pass.

    retention  {_id: kind or kind/tenant, kept, tenant?, keep_ms?, updated_at}
    fences     {_id: "retention", token, etcd, rules, acts}

`token` is the greatest fencing token of a leader that has acted; `rules` counts changes of the rules. An act is a
transaction that demands both as it knew them: a leader that was succeeded removes nothing any more, and once
SetRetention has returned, nothing is removed under the old rules, whoever had read them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import Document, translated
from services.store.documents import Collections, whole_milliseconds
from services.store.retention.leadership import Mandate
from services.store.retention.rules import Kept, Rule, check_rule
from services.store.transactions import transaction
from shoal.errors import FailedPrecondition

T = TypeVar("T")

_FENCE = "retention"


@dataclass(frozen=True)
class Reading:
    """All rules, and the version that they are of."""

    rules: tuple[Rule, ...]
    version: int


class Outdated(Exception):
    """The rules, or what was to be removed, are not what was read: read again."""


class RuleBook:
    """Reads and changes the rules. Safe beside other instances."""

    def __init__(self, collections: Collections, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._clock = clock

    async def read(self) -> Reading:
        """The rules as they are.

        Raises:
            Unavailable: MongoDB is away.
        """
        with translated("reading the rules of retention"):
            fence = await self._collections.fences.find_one({"_id": _FENCE})  # First: a change between is noticed.
            docs = await self._collections.retention.find({}).sort("_id").hint("_id_").to_list()
        return Reading(tuple(map(_rule, docs)), fence["rules"] if fence else 0)

    async def put(self, rule: Rule, *, remove: bool) -> None:
        """Sets a rule, or removes the one of that kind and tenant.

        Raises:
            InvalidArgument: there may be no such rule.
        """
        check_rule(rule)
        doc = _document(rule, whole_milliseconds(self._clock()))

        async def change(session: AsyncClientSession) -> None:
            rules, fences = self._collections.retention, self._collections.fences
            if remove:
                await rules.delete_one({"_id": doc["_id"]}, session=session)
            else:
                await rules.replace_one({"_id": doc["_id"]}, doc, upsert=True, session=session)
            counted = {"$inc": {"rules": 1}, "$setOnInsert": {"token": 0}}
            await fences.update_one({"_id": _FENCE}, counted, upsert=True, session=session)

        with translated("changing the rules of retention"):
            await self.transaction(change)

    async def pass_fence(self, mandate: Mandate, version: int, session: AsyncClientSession) -> None:
        """Makes the transaction of `session` an act of the leader with `mandate`, under the rules of `version`.

        Raises:
            Outdated: the rules are others.
            FailedPrecondition: a later leader has acted.
        """
        fences = self._collections.fences
        known = {
            "_id": _FENCE,
            "rules": version,
            "$or": [{"token": {"$lte": mandate.token}}, {"etcd": {"$ne": mandate.etcd}}],
        }
        # `acts` makes it a write even when the token stands there already: two acts at once must not both pass.
        passed = await fences.update_one(known, {"$set": vars(mandate), "$inc": {"acts": 1}}, session=session)
        if passed.matched_count:
            return
        fence = await fences.find_one({"_id": _FENCE}, session=session)
        if fence is not None and fence["rules"] == version:
            raise FailedPrecondition(f"token {mandate.token}: a later leader, {fence['token']}, has acted")
        raise Outdated

    async def transaction(self, work: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """Runs `work` in one transaction: all of it or nothing. It may run more than once."""
        return await transaction(self._collections, work)


def _document(rule: Rule, now: datetime) -> Document:
    doc: Document = {"_id": rule.id, "kept": str(rule.kept), "updated_at": now}
    if rule.tenant is not None:
        doc["tenant"] = rule.tenant
    if rule.keep is not None:
        doc["keep_ms"] = rule.keep // timedelta(milliseconds=1)
    return doc


def _rule(doc: Document) -> Rule:
    keep = timedelta(milliseconds=doc["keep_ms"]) if "keep_ms" in doc else None
    return Rule(Kept(doc["kept"]), doc.get("tenant"), keep, doc["updated_at"])
