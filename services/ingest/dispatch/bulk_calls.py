"""Which jobs go to infer together: plain functions and one small object, no clock and no network.

    waiting jobs of a model ──next_bulk──> one call        at most so many at once: `ConcurrencyLimit`

What is large, kept apart, a step of a sequence, or had an instance die under it goes alone: the call of a large one is
copied once less, a step is routed by its sequence, and a suspect takes nobody along.
"""

from __future__ import annotations

from collections import deque

from services.ingest.job import Job
from shoal.errors import Code

BULK_JOBS = 256
BULK_BYTES = 4 << 20
"""One call: its jobs are batched by infer as it sees fit, and its answers come as they are ready."""
LONE_BYTES = 256 << 10
_STEP = b"\x0a\x0bsequence_id"
# How the key of a parameter `sequence_id` is written in a ModelInferRequest. Found elsewhere by chance, it only costs a
# call of its own.
FIRST = 32
"""Of a model that nothing is known of."""
_TIMES_BEST = 3


def is_suspect(job: Job) -> bool:
    """Whether an instance died, or was cut off, while it had this job."""
    return job.attempts > 1 and job.last_code in (Code.UNAVAILABLE, Code.ABORTED)


def goes_alone(job: Job) -> bool:
    """Whether it gets a call of its own."""
    request = job.request
    return job.is_apart or request is None or len(request) > LONE_BYTES or is_suspect(job) or _STEP in request


def next_bulk(waiting: deque[Job], most: int) -> list[Job]:
    """Takes from the left of `waiting`, which is not empty, what goes into one call: at most `most` jobs."""
    bulk = [waiting.popleft()]
    if goes_alone(bulk[0]):
        return bulk
    nbytes = len(bulk[0].request or b"")
    while waiting and len(bulk) < min(most, BULK_JOBS) and not goes_alone(waiting[0]):
        nbytes += len(waiting[0].request or b"")
        if nbytes > BULK_BYTES:
            break
        bulk.append(waiting.popleft())
    return bulk


class ConcurrencyLimit:
    """How many jobs of one model may be in calls at once, and are claimed at a time.

    It doubles with each round of answers that come soon, up to `most`, and halves when they take long: what a model has
    waiting beyond a second's work makes it no faster, and is run again when the instance dies. Soon is `soon_s`, or a
    few times what it needs at best: a model of five seconds a batch gets its batches.
    """

    def __init__(self, most: int, soon_s: float) -> None:
        self._most = most
        self._soon_s = soon_s
        self._best_s = float("inf")
        self._halved_at = float("-inf")
        self.limit = min(FIRST, most)

    def answered(self, jobs: int, took_s: float, now_s: float) -> None:
        """So many jobs of a call have come back after `took_s`."""
        self._best_s = min(self._best_s, took_s)
        soon_s = max(self._soon_s, _TIMES_BEST * self._best_s)
        if took_s < soon_s:
            self.limit = min(self._most, self.limit + jobs)
        elif now_s - self._halved_at > soon_s:  # Once for all that was sent at the old pace.
            self._halved_at = now_s
            self.limit = max(1, self.limit // 2)
