"""How long a submit that comes now would wait for its write: refused while that is hopeless, before memory fills up.

    wait = time of a write x writes that come first

A write's time is what the last ones took, or as long as the one under way has taken already: a database that hangs is
noticed by the clock, not by an answer. With nothing under way nothing is known, so the next one is let in and tells.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import ResourceExhausted

_NEWEST = 0.3
# Weight of the last write in what a write usually takes: three or four make up the picture.
_LONGEST_RETRY_S = 10.0


class Pressure:
    """Knows what waits for the database. `clock` is monotonic, in seconds.

    Args:
        most_s: a longer wait is refused.
        group_items, group_bytes: what goes into one write at most.
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
        """Lets one more come.

        Raises:
            ResourceExhausted: it would wait too long.
        """
        wait_s = self.wait_s()
        if wait_s > self._most_s:
            raise ResourceExhausted(
                f"MongoDB is slow: {self._items} jobs wait to be written, and one more would wait {wait_s:.1f} s: "
                "come back later",
                retry_after_ms=int(min(wait_s, _LONGEST_RETRY_S) * 1000),
            )

    def wait_s(self) -> float:
        """How long one that comes now would wait."""
        if not self._items:
            return 0.0
        under_way_s = self._clock() - min(self._began) if self._began else 0.0
        writes = 1 + max(self._items // self._group_items, self._bytes // self._group_bytes)
        return max(self._usual_s, under_way_s) * writes

    def entered(self, nbytes: int) -> None:
        """A job waits for its write."""
        self._items += 1
        self._bytes += nbytes

    def left(self, jobs: int, nbytes: int) -> None:
        """So many wait no more."""
        self._items -= jobs
        self._bytes -= nbytes

    def began(self) -> float:
        """A write begins. Several may be under way."""
        now = self._clock()
        self._began.append(now)
        return now

    def ended(self, began: float) -> None:
        """The one that began then has ended, well or not."""
        self._began.remove(began)
        took_s = self._clock() - began
        self._usual_s = took_s if not self._usual_s else self._usual_s + _NEWEST * (took_s - self._usual_s)
