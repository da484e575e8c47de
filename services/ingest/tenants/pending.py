"""Number of a tenant's pending jobs: counted in the queue's index, and adjusted by accepted jobs in between.

A count costs at most `max_pending` steps. While the tenant submits, it is repeated after 0.2 s or 20 times its
duration. Several instances together may exceed a quota by the jobs that the others accepted since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.documents import WAITING
from services.ingest.tenant_queue import range_of
from shoal.errors import ResourceExhausted

_SHORTEST_S = 0.2
_REST = 20
_PRUNE_AT = 1_000


@dataclass(slots=True)
class _Count:
    jobs: int = 0
    stale_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class PendingCounts:
    """Pending jobs by tenant. `clock` is monotonic, in seconds."""

    def __init__(self, jobs: AsyncCollection[Document], clock: Callable[[], float]) -> None:
        self._jobs = jobs
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    def has_known_capacity(self, tenant: str, most: int) -> bool:
        """Return True when a recent count allows a job of `tenant`; otherwise call `admit`."""
        count = self._counts.get(tenant)
        return count is not None and count.jobs < most and self._clock() < count.stale_at

    def added(self, tenant: str, jobs: int) -> None:
        """Add `jobs` to the count, until the next one."""
        self._count(tenant).jobs += jobs

    async def admit(self, tenant: str, most: int, limit: str = "its quota") -> None:
        """Return when one more job of `tenant` may be accepted, and count it. `limit` says where `most` is from.

        Raises:
            ResourceExhausted: `most` jobs are pending already.
            Unavailable: MongoDB is unavailable.
        """
        count = self._count(tenant)
        # One caller counts for all concurrent ones.
        async with count.lock:
            if self._clock() >= count.stale_at:
                started = self._clock()
                count.jobs = await self.count(tenant, most)
                now = self._clock()
                count.stale_at = now + max(_SHORTEST_S, _REST * (now - started))
        if count.jobs >= most:
            raise ResourceExhausted(
                f"{most} jobs of tenant {tenant!r} are queued, which is {limit}: retry when some are done",
                retry_after_ms=max(1, int((count.stale_at - self._clock()) * 1000)),
            )
        count.jobs += 1

    async def count(self, tenant: str, most: int) -> int:
        """Return the number of jobs that are queued or wait for dependencies, at most `most`.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        waiting = {**WAITING, "lane": range_of(tenant)}
        dependents = {"lane": range_of(tenant), "waits_for": {"$exists": True}}
        with translated("counting a tenant's jobs"):
            found = await self._jobs.count_documents(waiting, limit=most, hint="lanes")
            if found < most:
                found += await self._jobs.count_documents(dependents, limit=most - found, hint="dependents_by_lane")
        return found

    def _count(self, tenant: str) -> _Count:
        if len(self._counts) >= _PRUNE_AT and tenant not in self._counts:
            now = self._clock()
            self._counts = {
                name: count for name, count in self._counts.items() if count.lock.locked() or count.stale_at > now
            }
        return self._counts.setdefault(tenant, _Count())
