"""Estimated wait of a new submit for its write: submits are rejected when it is too long, before memory fills up.

    wait = time of a write x number of writes before it

The time of a write is the recent average, or the age of the write in flight if that is longer. So a hanging database is
noticed by the clock, without a response. Without a write in flight, the next submit is accepted and measures the time.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import ResourceExhausted

# Weight of the last write in the moving average: the last three or four dominate.
_NEWEST = 0.3
_LONGEST_RETRY_S = 10.0


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
        self._items = 0
        self._bytes = 0
        self._began: list[float] = []
        self._usual_s = 0.0

    def admit(self) -> None:
        """Return when one more job may be accepted.

        Raises:
            ResourceExhausted: the job would wait too long.
        """
        wait_s = self.wait_s()
        if wait_s > self._most_s:
            raise ResourceExhausted(
                f"MongoDB is slow: {self._items} jobs wait to be written, and one more would wait {wait_s:.1f} s: "
                "retry later",
                retry_after_ms=int(min(wait_s, _LONGEST_RETRY_S) * 1000),
            )

    def wait_s(self) -> float:
        """Return the estimated wait of a new job in seconds."""
        if not self._items:
            return 0.0
        under_way_s = self._clock() - min(self._began) if self._began else 0.0
        writes = 1 + max(self._items // self._group_items, self._bytes // self._group_bytes)
        return max(self._usual_s, under_way_s) * writes

    def entered(self, nbytes: int) -> None:
        """Count a job that waits for its write."""
        self._items += 1
        self._bytes += nbytes

    def left(self, jobs: int, nbytes: int) -> None:
        """Subtract jobs that no longer wait."""
        self._items -= jobs
        self._bytes -= nbytes

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
