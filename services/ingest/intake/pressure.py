"""Estimated wait of a new submit for its write: submits are rejected when it is too long, before memory fills up.

    wait = time of a write x number of writes until it is written

Tenants take turns in a write (`group_commit.py`). So of each other tenant's jobs, those count that have a turn before
the new one: a single job, when none of the new one's tenant waits.

The time of a write is the recent average, or the age of the write in flight if that is longer. So a hanging database is
noticed by the clock, without a response. Without a write in flight, the next submit is accepted and measures the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import ResourceExhausted

# Weight of the last write in the moving average: the last three or four dominate.
_NEWEST = 0.3
_LONGEST_RETRY_S = 10.0
# Tenants whose jobs are looked at one by one for an estimate. Of more, all jobs count.
_TENANTS = 100


@dataclass(slots=True)
class _Waiting:
    """Jobs of a tenant that wait for their write: what they count as in `group_items`, and their bytes."""

    jobs: int = 0
    items: int = 0
    nbytes: int = 0


class WritePressure:
    """Estimate of the wait for a write. `clock` is monotonic, in seconds.

    Args:
        most_s: the longest accepted wait.
        group_items, group_bytes: the maximum size of one write.
    """

    def __init__(self, most_s: float, *, group_items: int, group_bytes: int, clock: Callable[[], float]) -> None:
        self._most_s = most_s
        self._group_items = group_items
        self._group_bytes = group_bytes
        self._clock = clock
        self._all = _Waiting()
        self._by_tenant: dict[str, _Waiting] = {}
        self._began: list[float] = []
        self._usual_s = 0.0

    def admit(self, tenant: str) -> None:
        """Return when one more job of `tenant` may be accepted.

        Raises:
            ResourceExhausted: the job would wait too long.
        """
        wait_s = self.wait_s(tenant)
        if wait_s > self._most_s:
            raise ResourceExhausted(
                f"MongoDB is slow: {self._all.jobs} jobs wait to be written, and one more of this tenant would wait "
                f"{wait_s:.1f} s: retry later",
                retry_after_ms=int(min(wait_s, _LONGEST_RETRY_S) * 1000),
            )

    def wait_s(self, tenant: str) -> float:
        """Return the estimated wait of a new job of `tenant` in seconds."""
        if not self._all.jobs:
            return 0.0
        under_way_s = self._clock() - min(self._began) if self._began else 0.0
        write_s = max(self._usual_s, under_way_s)
        wait_s = write_s * self._writes(self._all.items, self._all.nbytes)
        if wait_s <= self._most_s or len(self._by_tenant) > _TENANTS:
            return wait_s
        turns = self._by_tenant[tenant].jobs + 1 if tenant in self._by_tenant else 1
        items = nbytes = 0.0
        for waiting in self._by_tenant.values():
            before = min(1.0, turns / waiting.jobs)
            items += waiting.items * before
            nbytes += waiting.nbytes * before
        return write_s * self._writes(items, nbytes)

    def _writes(self, items: float, nbytes: float) -> int:
        return 1 + int(max(items / self._group_items, nbytes / self._group_bytes))

    def entered(self, tenant: str, items: int, nbytes: int) -> None:
        """Count a job that waits for its write, and counts as `items` there."""
        for waiting in (self._all, self._by_tenant.setdefault(tenant, _Waiting())):
            waiting.jobs += 1
            waiting.items += items
            waiting.nbytes += nbytes

    def left(self, tenant: str, items: int, nbytes: int) -> None:
        """Subtract a job that no longer waits."""
        of_tenant = self._by_tenant[tenant]
        for waiting in (self._all, of_tenant):
            waiting.jobs -= 1
            waiting.items -= items
            waiting.nbytes -= nbytes
        if not of_tenant.jobs:
            del self._by_tenant[tenant]

    def began(self) -> float:
        """Note the begin of a write, and return its time. Several writes may be in flight."""
        now = self._clock()
        self._began.append(now)
        return now

    def ended(self, began: float) -> None:
        """Note the end of the write that began at `began`, successful or not."""
        self._began.remove(began)
        took_s = self._clock() - began
        self._usual_s = took_s if not self._usual_s else self._usual_s + _NEWEST * (took_s - self._usual_s)
