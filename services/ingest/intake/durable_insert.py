"""Durable insert: the write that makes submitted jobs durable, together with their claims; one call, one outcome.

    jobs ──claimed where this instance has capacity──> one insert ──> Inserted | UnknownOutcome ──> claimer, subscribers

A claim in the insert saves a later write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.ingest.job import Job
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Inserted, JobStore, UnknownOutcome
from shoal.errors import Unavailable


class Claimer(Protocol):
    """Claimer of jobs in their insert: the dispatcher."""

    def claim_in_write(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs as they are to be inserted: claimed as far as capacity allows."""

    def settle_write(self, jobs: Sequence[Job], outcome: Inserted | UnknownOutcome) -> None:
        """Apply the outcome of the insert of `jobs`, which `claim_in_write` returned; once per call of it."""


class DurableInsert:
    """Insert of jobs with claims."""

    def __init__(self, store: JobStore, claimer: Claimer, events: JobEvents) -> None:
        self._store = store
        self._claimer = claimer
        self._events = events

    async def __call__(self, jobs: Sequence[Job]) -> Inserted | UnknownOutcome:
        """Insert the jobs; the outcome has the jobs as inserted."""
        # Leases start here.
        jobs = self._claimer.claim_in_write(jobs)
        outcome: Inserted | UnknownOutcome = UnknownOutcome(Unavailable("storing submitted jobs: interrupted"))
        try:
            outcome = await self._store.insert(jobs)
        finally:
            self._claimer.settle_write(jobs, outcome)
        if isinstance(outcome, Inserted) and outcome.written:
            self._events.accepted(outcome.written)
        return outcome
