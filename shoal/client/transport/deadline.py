"""Deadline of a call: one point in time for everything that the call does, with its retries and look-ups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from shoal.errors import InvalidArgument

LONGEST_S = 365 * 86_400.0
"""Longest time limit. grpc cannot represent an infinite one; a year ends no call that anybody still waits for."""

Timeout: TypeAlias = "float | Deadline | None"
"""Time limit of a call: seconds, None for no limit, or the deadline of a call that consists of several."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """Point in time on the caller's clock. Every call that belongs to one method of the client gets the same one."""

    timeout_s: float | None
    """The limit as the caller set it, for messages; None: no limit."""
    at: float
    """Infinite: no limit."""

    @classmethod
    def after(cls, timeout_s: float | None, now: float) -> Deadline:
        """Return the deadline `timeout_s` seconds after `now`. Raises InvalidArgument when that is not a duration."""
        if timeout_s is None:
            return cls(None, math.inf)
        try:
            is_duration = timeout_s >= 0
        except TypeError:
            is_duration = False
        if not is_duration:
            raise InvalidArgument(f"timeout={timeout_s!r}: expected seconds, 0 or more, or None for no limit")
        return cls(timeout_s, now + min(timeout_s, LONGEST_S))

    def left_s(self, now: float) -> float | None:
        """Return the seconds that are left; None: no limit."""
        return None if self.timeout_s is None else max(self.at - now, 0.0)

    def capped(self, most_s: float, now: float) -> Deadline:
        """Return this deadline, or the one `most_s` seconds after `now` if that is earlier."""
        return self if self.at <= now + most_s else Deadline(most_s, now + most_s)
