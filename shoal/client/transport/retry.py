"""When a failed call is tried again, and after how long: a plain function of what happened.

Tried again: UNAVAILABLE (nobody there just now) and RESOURCE_EXHAUSTED (come back later), of idempotent calls, as long
as attempts and the deadline allow. The bound of the wait doubles, and the wait is drawn between 0 and that bound ("full
jitter": callers that failed together do not come back together); a server's `retry-after-ms` is added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import Code, ShoalError

RETRIED = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)

# grpc's own words when a message is over a size limit, on either end: no wait makes it smaller.
_TOO_LARGE = "larger than max"


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how soon. `RetryPolicy(attempts=1)` never tries again."""

    attempts: int = 8
    """Attempts in all. Envoy has already tried other instances by then: eight (3.5 s of waits on average, 7.1 s at
    most) outlast the restart of a service that has but one instance."""
    stream_attempts: int = 20
    """The same for a stream (a watch, a stream of jobs, an upload) that breaks after it has begun, counted anew
    whenever it moves on. What it has done so far is worth more patience: twenty (15 s on average) outlast a restart of
    the whole node."""
    first_wait_s: float = 0.1
    """Bound of the wait before the second attempt."""
    longest_wait_s: float = 2.0
    """The bound does not grow beyond this."""

    def wait_s(
        self,
        error: ShoalError,
        *,
        attempt: int,
        idempotent: bool,
        left_s: float | None,
        draw: Callable[[], float],
        stream: bool = False,
    ) -> float | None:
        """Seconds until the next attempt, or None: give up and raise `error`.

        `attempt` is the one that failed, from 1; `left_s` the time to the deadline; `draw` gives a number in [0, 1).
        """
        if not idempotent or attempt >= (self.stream_attempts if stream else self.attempts) or not is_retried(error):
            return None
        bound = min(self.longest_wait_s, self.first_wait_s * float(2 ** min(attempt - 1, 30)))
        wait = draw() * bound + (error.retry_after_ms or 0) / 1000
        if left_s is not None and wait >= left_s:
            return None
        return wait


def is_retried(error: ShoalError) -> bool:
    """True when waiting may help."""
    return error.code in RETRIED and _TOO_LARGE not in error.message
