"""Queries over results that run at a time: a filter that matches nothing may read all results of its tenant.

A tenant may hold twice as many slots as are free. So its queries neither take all connections to MongoDB, for which
other calls would wait, nor keep other tenants from querying.
"""

from __future__ import annotations

from mesh.rpc.tenant_turns import TenantTurns

LIMIT = 16
"""A third of the connections of a store (`mesh.mongo`)."""
SEARCHES = 4
"""Queries that may examine many results which do not match, 2 of one tenant: each keeps a thread of MongoDB busy."""


class QuerySlots(TenantTurns):
    """Slots for queries. Tenants take turns."""

    def __init__(self, limit: int = LIMIT, *, wait_s: float | None = None) -> None:
        super().__init__(limit, leaves_room=True, wait_s=wait_s)
