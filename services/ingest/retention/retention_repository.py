"""Retention rules in MongoDB: one document for each tenant and state, or for a tenant's batches."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.job import State
from services.ingest.retention.rules import BATCHES, Keep, Rule, Rules, What, what_of
from shoal.errors import ResourceExhausted

JOB_RETENTION = "job_retention"
VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "tenant", "state", "keep_ms"],
        "properties": {
            "tenant": {"bsonType": "string"},
            "state": {"enum": [*map(str, State), BATCHES]},
            # null: for ever.
            "keep_ms": {"bsonType": ["int", "long", "null"], "minimum": 60_000},
            # New at each time that the rule is set.
            "set": {"bsonType": "string"},
        },
    }
}
MOST = 10_000
_MS = timedelta(milliseconds=1)


class RetentionRepository:
    """Storage of the retention rules."""

    def __init__(self, rules: AsyncCollection[Document], defaults: Mapping[What, Keep]) -> None:
        self._rules = rules
        self._defaults = defaults

    async def set(self, rule: Rule) -> None:
        """Create or replace a rule.

        Raises:
            ResourceExhausted: too many rules. Unavailable: MongoDB is unavailable.
        """
        with translated("setting a retention rule"):
            rule_id = {"_id": _id(rule.tenant, rule.what)}
            is_full = await self._rules.estimated_document_count() >= MOST
            if is_full and await self._rules.find_one(rule_id, {"_id": 1}) is None:
                raise ResourceExhausted(f"there are {MOST} rules, which is the limit: let some tenants inherit")
            keep_ms = None if rule.keep is None else rule.keep // _MS
            document = {"tenant": rule.tenant, "state": str(rule.what), "keep_ms": keep_ms, "set": uuid.uuid4().hex}
            await self._rules.replace_one(rule_id, document, upsert=True)

    async def inherit(self, tenant: str, what: What) -> None:
        """Remove a tenant's own rule. A missing rule is no error.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("removing a retention rule"):
            await self._rules.delete_one({"_id": _id(tenant, what)})

    async def read(self) -> Rules:
        """Return all rules.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        own: dict[tuple[str, What], Keep] = {}
        with translated("reading the retention rules"):
            async for document in self._rules.find():
                keep_ms = document["keep_ms"]
                own[document["tenant"], what_of(document["state"])] = None if keep_ms is None else keep_ms * _MS
        return Rules(self._defaults, own)

    async def version(self) -> str:
        """Return a digest of the rules, which changes whenever one is set, also to the same value.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        digest = hashlib.sha256()
        with translated("reading the retention rules"):
            async for document in self._rules.find({}, {"set": 1}).sort("_id", 1):
                digest.update(json.dumps([document["_id"], document.get("set", "")]).encode())
        return digest.hexdigest()


def _id(tenant: str, what: What) -> str:
    return json.dumps([tenant, str(what)], separators=(",", ":"))
