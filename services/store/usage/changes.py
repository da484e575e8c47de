"""What payloads add to and take from a tenant's usage: noted in the transaction that changes them, counted soon after.

    refer, release ──> note, in their transaction ──┐
                       note ────────────────────────┼──each second──> one transaction: notes gone, counter changed
                       note ────────────────────────┘

    usage_changes  {_id, tenant, payloads, payload_bytes}

So nothing is counted twice, and a crash forgets nothing. The counter itself would be one document that all transactions
of a tenant write: of 16 at once only one can, and the others begin anew. Measured, with payloads of 300 KiB: 44 a
second instead of 116, and the slowest took 5 s instead of 0.1 s. With notes no difference was seen.
"""

from __future__ import annotations

from collections.abc import Mapping

from pymongo.asynchronous.client_session import AsyncClientSession

from services.store.documents import Collections
from services.store.usage.weight import Weight, by_tenant

AT_ONCE = 1_000
"""Notes that are counted in one transaction: some 20 ms."""


class Changes:
    """Notes and what becomes of them. Raises pymongo's errors, as a transaction needs them."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    async def note(self, changes: Mapping[str, Weight], session: AsyncClientSession) -> None:
        """Notes what tenants have more, in payloads, once the transaction of `session` is committed."""
        docs = [
            {"tenant": tenant, "payloads": weight.payloads, "payload_bytes": weight.payload_bytes}
            for tenant, weight in changes.items()
            if weight
        ]
        if docs:
            await self._collections.usage_changes.insert_many(docs, session=session)

    async def are_there(self) -> bool:
        """Whether something waits to be counted."""
        return await self._collections.usage_changes.find_one({}, {"_id": 1}, hint="_id_") is not None

    async def pending(self, tenant: str, session: AsyncClientSession | None = None) -> Weight:
        """What is not in a tenant's counter yet."""
        found = self._collections.usage_changes.find({"tenant": tenant}, session=session).hint("by_tenant")
        return sum([_weight(doc["payloads"], doc["payload_bytes"]) async for doc in found], Weight())

    async def take(self, session: AsyncClientSession) -> Mapping[str, Weight]:
        """Takes some notes away: whoever does must count them, in the transaction of `session`. Empty: there are none.

        Of two that take the same ones, one begins anew.
        """
        changes = self._collections.usage_changes
        docs = await changes.find({}, session=session).hint("_id_").limit(AT_ONCE).to_list()
        if docs:
            await changes.delete_many({"_id": {"$in": [doc["_id"] for doc in docs]}}, session=session)
        return by_tenant((doc["tenant"], _weight(doc["payloads"], doc["payload_bytes"])) for doc in docs)


def _weight(payloads: int, payload_bytes: int) -> Weight:
    return Weight(0, payload_bytes, payloads, payload_bytes)
