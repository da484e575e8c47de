"""The write that makes submitted jobs durable, and the claims that are made in it: one call with one outcome.

    jobs ──claimed where somebody here has time for them──> one insert ──> Inserted | Unknown ──> claimer, subscribers

A job that is claimed in its insert saves a write later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.ingest.job import Job
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Inserted, JobStore, Unknown
from shoal.errors import Unavailable


class Claimer(Protocol):
    """The dispatcher, as an insert needs it."""

    def claim_in_write(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs as they are to be inserted: claimed at once where there is room for them."""

    def settle_write(self, jobs: Sequence[Job], outcome: Inserted | Unknown) -> None:
        """Take the outcome of the insert of `jobs`, which `claim_in_write` returned; once for each of its calls."""


class DurableInsert:
    """Inserts jobs."""

    def __init__(self, store: JobStore, claimer: Claimer, events: JobEvents) -> None:
        self._store = store
        self._claimer = claimer
        self._events = events

    async def __call__(self, jobs: Sequence[Job]) -> Inserted | Unknown:
        """Insert the jobs; the outcome has them as they were inserted."""
        # Leases count from here.
        jobs = self._claimer.claim_in_write(jobs)
        outcome: Inserted | Unknown = Unknown(Unavailable("storing submitted jobs: interrupted"))
        try:
            outcome = await self._store.insert(jobs)
        finally:
            self._claimer.settle_write(jobs, outcome)
        if isinstance(outcome, Inserted) and outcome.written:
            self._events.accepted(outcome.written)
        return outcome
