"""Tenants with results, payloads or a counter, found by skipping from tenant to tenant in indexes."""

from __future__ import annotations

from pymongo import ASCENDING

from mesh.mongo import Document, translated
from services.store.documents import Collections
from services.store.results import tenants as of_results


async def tenant_after(collections: Collections, after: str | None) -> str | None:
    """Return the next tenant that has results, payloads or a counter, by name; None when there is none.

    Raises:
        Unavailable: MongoDB is unavailable.
    """
    beyond: Document = {"$gte": ""} if after is None else {"$gt": after}
    with translated("looking for tenants"):
        payload = await collections.references.find_one(
            {"tenant": beyond}, {"tenant": 1, "_id": 0}, sort=[("tenant", ASCENDING)], hint="by_tenant"
        )
        counter = await collections.usage.find_one({"_id": beyond}, {"_id": 1}, sort=[("_id", ASCENDING)], hint="_id_")
    found = [await of_results.tenant_after(collections, after)]
    found += [payload["tenant"] if payload else None, counter["_id"] if counter else None]
    return min((tenant for tenant in found if tenant is not None), default=None)
