"""How long to wait before the next try: longer after each failure, and never quite the same for two processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Backoff:
    """Doubles from `first_s` to `max_s`; each wait is 50 to 100 percent of that."""

    first_s: float
    max_s: float
    chance: Callable[[], float] = random.random
    """A number in [0, 1)."""
    _failures: int = 0

    def next_s(self) -> float:
        """Seconds to wait after one more failure."""
        whole = min(self.first_s * 2.0 ** min(self._failures, 32), self.max_s)
        self._failures += 1
        return whole * (0.5 + self.chance() / 2)

    def reset(self) -> None:
        """It worked: the next failure is a first one."""
        self._failures = 0
