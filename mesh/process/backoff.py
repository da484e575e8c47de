"""Exponential backoff with jitter, so that processes do not retry at the same moment."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Backoff:
    """Waits that double from `first_s` to `max_s`; each is 50 to 100 percent of that value."""

    first_s: float
    max_s: float
    chance: Callable[[], float] = random.random
    """Returns a number in [0, 1)."""
    _failures: int = 0

    def next_s(self) -> float:
        """Count one more failure, and return the seconds to wait."""
        whole = min(self.first_s * 2.0 ** min(self._failures, 32), self.max_s)
        self._failures += 1
        return whole * (0.5 + self.chance() / 2)

    def reset(self) -> None:
        """Forget the failures, after a success."""
        self._failures = 0
