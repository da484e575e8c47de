"""Estimate of the number of queued jobs: counted now and then, and adjusted in between, to reject submits cheaply.

Jobs that wait for other jobs count, too: they use disk, and memory once the others end.

A tenant may have twice as many jobs queued as the backlog has room for, so that there is always room for others: alone,
it may fill two thirds. Below that, nothing is counted by tenant.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from shoal.errors import ResourceExhausted

# A count of a million index entries takes about half a second: counting takes at most a twentieth of the time.
_REST = 20
_SHORTEST_S = 1.0
RETRY_AFTER_MS = 1_000


class JobBacklog:
    """Estimated number of queued jobs, of all instances together.

    Between counts, the estimate follows only the jobs of this instance. So several instances may exceed the limit by
    the submits of about a second, which is close enough to protect memory and disk.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._estimate = 0

    @property
    def estimate(self) -> int:
        return self._estimate

    def admit(self) -> None:
        """Return when one more job may be accepted.

        Raises:
            ResourceExhausted: the backlog is full.
        """
        if self._estimate >= self._limit:
            raise ResourceExhausted(
                f"{self._estimate} jobs are queued already and the limit is {self._limit}: retry later",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def share(self) -> int | None:
        """Return the number of jobs that a tenant may have queued; None while any tenant may queue more."""
        most = 2 * (self._limit - self._estimate)
        return most if most < self._estimate else None

    def added(self, jobs: int) -> None:
        self._estimate += jobs

    def removed(self, jobs: int) -> None:
        self._estimate = max(0, self._estimate - jobs)

    async def recount(self, count: Callable[[int], Awaitable[int]]) -> float:
        """Count again with `count(limit)`; return the seconds until the next count."""
        started = time.monotonic()
        self._estimate = await count(self._limit + 1)
        return max(_SHORTEST_S, _REST * (time.monotonic() - started))
