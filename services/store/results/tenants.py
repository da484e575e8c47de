"""Tenants with results, found by skipping from tenant to tenant in an index, whatever the number of results."""

from __future__ import annotations

from pymongo import ASCENDING

from mesh.mongo import Document, translated
from services.store.documents import EARLIEST, Collections


async def tenant_after(collections: Collections, after: str | None) -> str | None:
    """Return the next tenant that has results, by name; None when there is none.

    Raises:
        Unavailable: MongoDB is unavailable.
    """
    query: Document = {"tenant": {"$gte": ""} if after is None else {"$gt": after}, "recorded_at": {"$gte": EARLIEST}}
    with translated("looking for tenants"):
        doc = await collections.results.find_one(
            query, {"tenant": 1, "_id": 0}, sort=[("tenant", ASCENDING)], hint="by_tenant"
        )
    return None if doc is None else str(doc["tenant"])
