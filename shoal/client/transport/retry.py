"""Retry policy of failed calls, a pure function of the failure.

Retried: UNAVAILABLE (no instance at present) and RESOURCE_EXHAUSTED (overload), of idempotent calls, as long as
attempts and the deadline allow. The bound of the wait doubles, and the wait is drawn between 0 and that bound ("full
jitter": callers that failed together do not retry together); a server's `retry-after-ms` is added to the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import Code, ShoalError

RETRIED = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)

# grpc's text for a message over a size limit, on either end: a retry cannot succeed.
_TOO_LARGE = "larger than max"


@dataclass(frozen=True)
class RetryPolicy:
    """Number and timing of attempts. `RetryPolicy(attempts=1)` never retries."""

    attempts: int = 8
    """Total number of attempts. Envoy has already tried other instances by then; eight attempts (waits of 3.5 s on
    average, 7.1 s at most) outlast the restart of a service with one instance."""
    stream_attempts: int = 20
    """Total number for a started stream (a watch, a stream of jobs, an upload), counted anew after each progress. A
    started stream has more to lose: twenty attempts (15 s on average) outlast a restart of the whole node."""
    first_wait_s: float = 0.1
    """Upper bound of the wait before the second attempt."""
    longest_wait_s: float = 2.0
    """Limit of the bound."""

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
        """Return the seconds until the next attempt, or None to give up and raise `error`.

        `attempt` is the number of the failed one, from 1; `left_s` the time to the deadline; `draw` returns a number in
        [0, 1).
        """
        if not idempotent or attempt >= (self.stream_attempts if stream else self.attempts) or not is_retried(error):
            return None
        bound = min(self.longest_wait_s, self.first_wait_s * float(2 ** min(attempt - 1, 30)))
        wait = draw() * bound + (error.retry_after_ms or 0) / 1000
        if left_s is not None and wait >= left_s:
            return None
        return wait


def is_retried(error: ShoalError) -> bool:
    """Return True when a retry may succeed."""
    return error.code in RETRIED and _TOO_LARGE not in error.message
