"""Rounds of the audit log: the instance that holds the store's leader lease writes anchors and applies retention.

lease held? ──yes──> entries too old? ──> anchor with the new first entries ──> remove the entries before ──┐
                            └──no──> chains changed? ──> anchor                                            └──> wait
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from mesh.mongo import translated
from mesh.mongo_clock import Clock, milliseconds
from mesh.mongo_lease import LeaderLease
from mesh.process.tasks import Background, for_ever
from services.store.audit import chains
from services.store.audit.anchors import Anchor, Anchors
from services.store.audit.chains import Extent
from services.store.documents import Collection, Collections

log = logging.getLogger(__name__)

_CHECK_S = 1.0
_AWAY_S = 5.0
# Anchors that are read in one round to find those that are too old.
_MAX_OLD = 1_000


class AuditRounds(Background):
    """Writes an anchor every `every_s` while chains grow, and removes entries older than `keep`."""

    def __init__(
        self,
        collections: Collections,
        anchors: Anchors,
        lease: LeaderLease,
        removal_clock: Clock,
        *,
        every_s: float,
        keep: timedelta,
    ) -> None:
        """Store what a round needs. `removal_clock` decides what is old (mesh.removal_guard)."""
        self._collections = collections
        self._anchors = anchors
        self._lease = lease
        self._removal_clock = removal_clock
        self._every_s = every_s
        self._keep = keep

    async def _run(self) -> None:
        await for_ever("anchor the audit log", self._round, away_s=min(_AWAY_S, self._every_s), log=log)

    async def _round(self) -> float:
        if not self._lease.is_held:
            return min(_CHECK_S, self._every_s)
        await self.anchor()
        return self._every_s

    async def anchor(self) -> None:
        """Write an anchor when a chain has changed, and remove what is too old.

        Raises:
            DataLoss: the newest anchor is damaged; nothing is removed.
            Unavailable: MongoDB or the blobs are unavailable.
        """
        newest = await self._anchors.newest()
        before = self._removal_clock() - self._keep
        extents, oldest = await self._anchors.extents(newest), None
        with translated("looking for old audit entries"):
            kept = {
                writer: await _kept(self._collections.audit, writer, one, before) for writer, one in extents.items()
            }
        if kept != (newest.chains if newest is not None else {}):
            if newest is not None:
                oldest = await self._oldest(newest, before)
            if not await self._anchors.write(newest, kept, oldest):
                return
        # Also without a change: an earlier removal may have been interrupted.
        await self._remove_before(kept)
        if newest is not None and oldest is not None and oldest != newest.oldest:
            await self._anchors.remove_before(oldest)

    async def _remove_before(self, kept: Mapping[str, Extent]) -> None:
        """Remove the entries before those that an anchor keeps."""
        for writer, one in kept.items():
            if one.first == 1:
                continue
            with translated("removing old audit entries"):
                removed = await self._collections.audit.delete_many(chains.range_of(writer, end=one.first))
            if removed.deleted_count:
                log.info(
                    "removed %(entries)d old entries of the audit chain %(writer)s",
                    {"event": "audit.removed", "entries": removed.deleted_count, "writer": writer},
                )

    async def _oldest(self, newest: Anchor, before: datetime) -> int:
        """Return the number of the oldest anchor to keep: the last one that is too old stays."""
        named = await self._anchors.named()
        limit = milliseconds(before)
        oldest = newest.oldest
        for stored in [one for one in named if one.n > newest.oldest][:_MAX_OLD]:
            if stored.n >= newest.n or (await self._anchors.read(stored)).at_ms >= limit:
                break
            oldest = stored.n
        return oldest


async def _kept(audit: Collection, writer: str, one: Extent, before: datetime) -> Extent:
    """Return the extent without the entries that are older than `before`; times grow along a chain."""
    query = {**chains.range_of(writer, one.first), "at": {"$gte": before}}
    young = await audit.find_one(query, {"_id": 1}, sort=[("_id", 1)], hint="_id_")
    first = one.last + 1 if young is None else chains.number_of(young["_id"])
    if first is None or first <= one.first:
        return one
    previous = await audit.find_one({"_id": f"{writer}/{first - 1:012d}"}, {"hash": 1})
    return one if previous is None else replace(one, first=first, before=previous["hash"])
