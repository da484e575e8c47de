"""Restart policy of a process: exponential backoff while the process keeps exiting early.

exit after `steady_s` or more      ->  restart after `first_s`
n-th early exit in a row           ->  restart after first_s * 2^(n-1), at most `last_s`; from `loop_after` a crash loop
up for `steady_s`                  ->  early exits are forgotten
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Restarts:
    """Restart policy with the state of one process. Immutable: `after` returns the next state."""

    first_s: float = 0.1
    """First delay. Every caller misses a killed process, so the delay is short."""
    last_s: float = 10.0
    """Longest delay."""
    steady_s: float = 10.0
    """A process that has run for so long has started successfully; a later exit has another cause."""
    loop_after: int = 3
    """Early exits in a row that make a crash loop."""
    early_exits: int = 0
    """Exits in a row before `steady_s`."""

    @property
    def delay_s(self) -> float:
        """Seconds to wait before the next start."""
        return min(self.first_s * 2.0 ** min(max(self.early_exits - 1, 0), 32), self.last_s)

    @property
    def is_loop(self) -> bool:
        """True in a crash loop, which needs a person's attention."""
        return self.early_exits >= self.loop_after

    @property
    def begins_loop(self) -> bool:
        """True at the exit that begins a crash loop, so that the loop is reported once."""
        return self.early_exits == self.loop_after

    def after(self, lived_s: float) -> Restarts:
        """Return the state after one more exit, of a process that lived for `lived_s`."""
        exits = 0 if lived_s >= self.steady_s else self.early_exits + 1
        return Restarts(self.first_s, self.last_s, self.steady_s, self.loop_after, exits)

    def steady(self) -> Restarts:
        """Return the state after `steady_s` without an exit."""
        return Restarts(self.first_s, self.last_s, self.steady_s, self.loop_after)
