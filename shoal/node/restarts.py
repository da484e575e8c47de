"""When a process that ended is started again: soon, then ever later while it keeps ending, and soon again once it held.

ended after a long life   ->  restart after `first_s`
ended young, n times      ->  restart after first_s * 2^n, at most `last_s`; the `loop_after`-th time it is a crash loop
stayed up for `steady_s`  ->  all forgotten
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Restarts:
    """The policy, with what it remembers of one process. Immutable: `after` gives the next state."""

    first_s: float = 0.1
    """A process that was killed is missed by every caller: it comes back at once."""
    last_s: float = 10.0
    steady_s: float = 10.0
    """A process that lived so long has started well; what ends it now is another matter."""
    loop_after: int = 3
    young_deaths: int = 0
    """How often in a row it ended before it was steady."""

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start."""
        return min(self.first_s * 2.0 ** min(max(self.young_deaths - 1, 0), 32), self.last_s)

    @property
    def is_loop(self) -> bool:
        """It keeps ending young: somebody should look."""
        return self.young_deaths >= self.loop_after

    @property
    def is_news(self) -> bool:
        """It has just become a crash loop. Said once, not at every turn of the loop."""
        return self.young_deaths == self.loop_after

    def after(self, lived_s: float) -> Restarts:
        """The state after one more end, of a process that lived for `lived_s`."""
        deaths = 0 if lived_s >= self.steady_s else self.young_deaths + 1
        return Restarts(self.first_s, self.last_s, self.steady_s, self.loop_after, deaths)

    def steady(self) -> Restarts:
        """The state once it has held for `steady_s`."""
        return Restarts(self.first_s, self.last_s, self.steady_s, self.loop_after)
