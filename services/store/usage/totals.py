"""Usage of all tenants together, for the metrics: read from the counters now and then."""

from __future__ import annotations

import logging

from mesh.mongo import Document, translated
from mesh.process.tasks import Background, for_ever
from services.store.documents import Collections

log = logging.getLogger(__name__)

READ_S = 30.0
"""Interval at which the counters are read, of which each tenant has one."""
_AGAIN_S = 5.0
LARGEST = 20
"""Tenants whose own bytes are read."""
_KINDS = ("results", "bytes", "payloads", "payload_bytes")


class UsageTotals(Background):
    """Sums of the counters of usage, and the tenants with the most bytes. Used as `async with`."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self.sums: dict[str, int] = {}
        """Sum of each counter, by its name in `usage`; empty before the first read."""
        self.largest: dict[str, int] = {}
        """Bytes of results and payloads of the LARGEST tenants, the most first."""

    async def _run(self) -> None:
        # Other tasks warn of an unavailable MongoDB.
        await for_ever("read the usage", self._read, away_s=_AGAIN_S, log=log, level=logging.DEBUG)

    async def _read(self) -> float:
        pipeline: list[Document] = [
            {
                "$facet": {
                    "sums": [{"$group": {"_id": None, **{kind: {"$sum": f"${kind}"} for kind in _KINDS}}}],
                    "largest": [{"$project": {"bytes": 1}}, {"$sort": {"bytes": -1}}, {"$limit": LARGEST}],
                }
            }
        ]
        with translated("reading the usage"):
            [found] = await (await self._collections.usage.aggregate(pipeline)).to_list()
        # A recount may be late: no sum is below zero for long.
        sums = found["sums"][0] if found["sums"] else {}
        self.sums = {kind: max(0, int(sums.get(kind, 0))) for kind in _KINDS}
        self.largest = {str(each["_id"]): max(0, int(each["bytes"])) for each in found["largest"]}
        return READ_S
