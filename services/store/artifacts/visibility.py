"""Artifacts that a caller with a tenant sees: uploads of its tenant, and the files of models that it may read.

A digest is no secret, and of short content it can be guessed. So whoever names one must have sent the bytes, or have
the right to read them. A tenant uploads what it does not see, although another tenant has stored it already.
"""

from __future__ import annotations

from collections.abc import Collection

from mesh.mongo import Document, translated
from mesh.rpc.tenant_scope import TenantScope
from services.store.documents import Collections
from shoal.access.rpc_groups import LIST_MODELS


async def visible(collections: Collections, digests: Collection[str], scope: TenantScope) -> Document:
    """Return the condition on artifacts, among `digests`, that the scope sees; empty for the scope of every tenant.

    Raises:
        Unavailable: MongoDB is unavailable.
    """
    if scope.tenant is None:
        return {}
    query = {"files.sha256": {"$in": list(digests)}}
    readable: set[str] = set()
    with translated("looking for the models of artifacts"):
        async for doc in collections.models.find(query, {"name": 1, "files.sha256": 1}):
            if scope.allows(LIST_MODELS, doc["name"]):
                readable |= {file["sha256"] for file in doc["files"]}
    return {"$or": [{"tenants": scope.tenant}, {"_id": {"$in": sorted(readable.intersection(digests))}}]}
