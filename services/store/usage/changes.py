"""Notes of usage changes by payloads: written in the transaction that changes a reference, added to the counter later.

    refer, release ──> note, in their transaction ──┐
                       note ────────────────────────┼──each second──> one transaction: delete notes, change counter
                       note ────────────────────────┘

    usage_changes  {_id, tenant, payloads, payload_bytes}

So no change is counted twice, and a crash loses none. A counter would be one document that all transactions of a tenant
write: of 16 concurrent ones only one succeeds, and the others restart. Measured, with payloads of 300 KiB: 44 a second
instead of 116, and the slowest took 5 s instead of 0.1 s. With notes no difference was measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from pymongo.asynchronous.client_session import AsyncClientSession

from services.store.documents import Collections
from services.store.usage.weight import Weight, by_tenant

AT_ONCE = 1_000
"""Notes added to counters in one transaction: some 20 ms."""


class Changes:
    """Writes and takes notes. Raises pymongo's errors, as a transaction needs them."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    async def note(self, changes: Mapping[str, Weight], session: AsyncClientSession) -> None:
        """Note the change of tenants' payloads, effective when the transaction of `session` commits."""
        docs = [
            {"tenant": tenant, "payloads": weight.payloads, "payload_bytes": weight.payload_bytes}
            for tenant, weight in changes.items()
            if weight
        ]
        if docs:
            await self._collections.usage_changes.insert_many(docs, session=session)

    async def exist(self) -> bool:
        """Return True when some note waits to be added."""
        return await self._collections.usage_changes.find_one({}, {"_id": 1}, hint="_id_") is not None

    async def pending(self, tenant: str, session: AsyncClientSession | None = None) -> Weight:
        """Return the sum of a tenant's notes."""
        found = self._collections.usage_changes.find({"tenant": tenant}, session=session).hint("by_tenant")
        return sum([_weight(doc["payloads"], doc["payload_bytes"]) async for doc in found], Weight())

    async def take(self, session: AsyncClientSession) -> Mapping[str, Weight]:
        """Delete some notes and return their sums by tenant; empty when there are none.

        The caller adds the sums to the counters in the same transaction. Of two transactions that take the same notes,
        one restarts.
        """
        changes = self._collections.usage_changes
        docs = await changes.find({}, session=session).hint("_id_").limit(AT_ONCE).to_list()
        if docs:
            await changes.delete_many({"_id": {"$in": [doc["_id"] for doc in docs]}}, session=session)
        return by_tenant((doc["tenant"], _weight(doc["payloads"], doc["payload_bytes"])) for doc in docs)


def _weight(payloads: int, payload_bytes: int) -> Weight:
    return Weight(0, payload_bytes, payloads, payload_bytes)
