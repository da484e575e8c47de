"""How many jobs wait, known well enough to refuse more, and cheaply: counted now and then, kept up in between."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from shoal.errors import ResourceExhausted

_REST = 20
# A count of a million index entries takes about half a second: counting takes at most a twentieth of the time.
_SHORTEST_S = 1.0
RETRY_AFTER_MS = 1_000


class Backlog:
    """An estimate of the jobs that wait, of all instances together.

    Between counts it knows only what this instance adds and takes, so several instances may overshoot the limit by what
    they accept in a second or so. The limit protects memory and disk, for which that is near enough.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._estimate = 0

    @property
    def estimate(self) -> int:
        return self._estimate

    def admit(self) -> None:
        """Lets one more job in.

        Raises:
            ResourceExhausted: the backlog is full.
        """
        if self._estimate >= self._limit:
            raise ResourceExhausted(
                f"{self._estimate} jobs are queued already and the limit is {self._limit}: come back later",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def added(self, jobs: int) -> None:
        self._estimate += jobs

    def removed(self, jobs: int) -> None:
        self._estimate = max(0, self._estimate - jobs)

    async def recount(self, count: Callable[[int], Awaitable[int]]) -> float:
        """Counts anew with `count(limit)` and says for how many seconds that is good enough."""
        started = time.monotonic()
        self._estimate = await count(self._limit + 1)
        return max(_SHORTEST_S, _REST * (time.monotonic() - started))
