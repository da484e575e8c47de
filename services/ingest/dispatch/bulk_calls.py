"""Grouping of jobs into calls to infer, and the limit of concurrent jobs. No clock and no network.

    waiting jobs of a model ──next_bulk──> one call        concurrent jobs: `ConcurrencyLimit`

Some jobs get a call of their own: large requests (one copy less), externally stored requests, steps of a sequence
(routed by their sequence), and ambiguous jobs, during which an instance died (a crash then hits no other job).

infer checks each job that may have run against the requests of which an instance died.
"""

from __future__ import annotations

from collections import deque

from services.ingest.job import Job
from shoal.errors import Code

BULK_JOBS = 256
BULK_BYTES = 4 << 20
"""Maximum size of one call. infer batches its jobs as it sees fit, and results arrive as they are ready."""
LONE_BYTES = 256 << 10
"""Requests larger than this get calls of their own."""
# Encoding of the parameter key `sequence_id` in a ModelInferRequest. A chance match only costs a call of its own.
_SEQUENCE_ID = b"\x0a\x0bsequence_id"
INITIAL_LIMIT = 32
"""Concurrency limit of a model without any results yet."""
# A model is fast when it responds within this multiple of its best time.
_TIMES_BEST = 3


def is_ambiguous(job: Job) -> bool:
    """Return True when an instance died, or was cut off, during the job's last attempt that reached one.

    Attempts since then were refused. The code of the one before them is not known.
    """
    return may_have_run(job) and (job.refusals > 0 or job.last_code in (Code.UNAVAILABLE, Code.ABORTED))


def may_have_run(job: Job) -> bool:
    """Return True when an earlier attempt reached an instance. Refused attempts do not count."""
    return job.attempts > 1


def runs_alone(job: Job) -> bool:
    """Return True when the job gets a call of its own."""
    request = job.request
    return job.is_apart or request is None or len(request) > LONE_BYTES or is_ambiguous(job) or _SEQUENCE_ID in request


def next_bulk(waiting: deque[Job], most: int) -> list[Job]:
    """Remove the jobs of the next call, at most `most`, from the left of `waiting`, which is not empty."""
    bulk = [waiting.popleft()]
    if runs_alone(bulk[0]):
        return bulk
    nbytes = len(bulk[0].request or b"")
    while waiting and len(bulk) < min(most, BULK_JOBS) and not runs_alone(waiting[0]):
        nbytes += len(waiting[0].request or b"")
        if nbytes > BULK_BYTES:
            break
        bulk.append(waiting.popleft())
    return bulk


class ConcurrencyLimit:
    """Adaptive limit of one model's jobs in calls, and of one claim.

    The limit doubles with each round of fast results, up to `most`, and halves after slow ones. A queue of more than a
    second's work at the model makes it no faster, and is lost when the instance dies. Fast means within `soon_s`, or
    within a small multiple of the model's best time: a model with batches of five seconds still gets full batches.
    """

    def __init__(self, most: int, soon_s: float) -> None:
        self._most = most
        self._soon_s = soon_s
        self._best_s = float("inf")
        self._halved_at = float("-inf")
        self.limit = min(INITIAL_LIMIT, most)

    def record_results(self, jobs: int, took_s: float, now_s: float) -> None:
        """Adapt the limit to `jobs` results that arrived after `took_s`."""
        self._best_s = min(self._best_s, took_s)
        soon_s = max(self._soon_s, _TIMES_BEST * self._best_s)
        if took_s < soon_s:
            self.limit = min(self._most, self.limit + jobs)
        # At most one halving for all jobs that were sent under the old limit.
        elif now_s - self._halved_at > soon_s:
            self._halved_at = now_s
            self.limit = max(1, self.limit // 2)
