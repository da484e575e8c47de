"""Jobs that are called while the write that makes them durable is under way: only a few at a time, and only new ones.

    adopted ──> in a call ──answer──┐
       └──> being written ──────────┴──> recorded            not written? then nothing is recorded, and nobody was told

A lone job so has its answer sooner by the time of a write. Under load that time is hidden, and calls of many are
cheaper: then none is begun ahead. A model may thereby run for a submit that is refused in the end, or is lost with its
instance; not for one that repeats a key which this instance has seen lately.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

from services.ingest.job import Job

MOST = 8
"""More at a time are a load."""
_KEYS = 10_000
# Newest idempotency keys that are remembered.

T = TypeVar("T")


class Ahead(Generic[T]):
    """The jobs in calls that are not durable yet, and what is to be done about each once it is."""

    def __init__(self) -> None:
        self._jobs: dict[str, T | None] = {}
        self._keys: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def may_begin(self, jobs: Sequence[Job]) -> bool:
        """Whether `jobs`, which are about to be written, may be called before they are. Their keys are then known."""
        keys = [(job.tenant, job.key) for job in jobs if job.key]
        is_new = self._keys.keys().isdisjoint(keys)
        for key in keys:
            self._keys[key] = None
        while len(self._keys) > _KEYS:
            self._keys.popitem(last=False)
        return is_new and len(jobs) + len(self._jobs) <= MOST and not any(job.is_apart for job in jobs)

    def begin(self, jobs: Sequence[Job]) -> None:
        """They go into calls."""
        self._jobs.update(dict.fromkeys(job.id for job in jobs))

    def put(self, job_id: str, what: T) -> None:
        """What is to be done about one, once it is durable; the last word counts."""
        self._jobs[job_id] = what

    def pop(self, job_id: str) -> T | None:
        """It is durable, or never will be: what was to be done about it, if anything."""
        return self._jobs.pop(job_id, None)
