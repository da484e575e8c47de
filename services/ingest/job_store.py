"""Storage of jobs: the protocol `JobStore`, and the outcomes of its writes.

    insert ──> claim ──renew──> write_states (ended, or back in the queue)
                 └──lapsed, cancelled, expired: take_*──> a new holder

A write is made, is not made, or has an unknown outcome (`UnknownOutcome`): it may take effect now or later. Each write
about a job applies only while the job is unchanged since it was read, so repeating a write is safe. Reads and
repeatable writes raise ShoalError when they fail.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeAlias

from services.ingest.job import End, Job, Lease, State
from services.ingest.tenant_queue import TenantQueueKey
from shoal.errors import AlreadyExists, ShoalError

Key: TypeAlias = tuple[str, str]
"""A tenant and one of its idempotency keys."""
Waiting: TypeAlias = tuple[datetime, str]
"""The due time and the id of a queued job."""
Change: TypeAlias = tuple[Job, Job]
"""A job before and after a change."""


@dataclass(frozen=True, slots=True)
class UnknownOutcome:
    """Outcome of a write that may or may not take effect; `error` is for the caller."""

    error: ShoalError


@dataclass(frozen=True, slots=True)
class Inserted:
    """Outcome of an insert: the durable jobs, and the errors of the refused ones by job id."""

    written: Sequence[Job]
    refused: Mapping[str, ShoalError] = field(default_factory=dict)


class KeyTaken(AlreadyExists):
    """Refusal of a job whose idempotency key is in use, maybe by the same job."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """Outcome of a claim: the claimed jobs."""

    jobs: Sequence[Job]


@dataclass(frozen=True, slots=True)
class StatesWritten:
    """Outcome of state changes: the number that was made. The other jobs have another holder."""

    count: int


@dataclass(frozen=True, slots=True)
class DependencyState:
    """State of a job that other jobs wait for."""

    id: str
    state: State
    message: str = ""
    """The reason of the job's end; empty when it succeeded or has not ended."""
    key: str = ""


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Condition on dead letters; each field that is set narrows the selection."""

    state: State = State.DEAD
    model_name: str = ""
    tenant: str = ""
    code: int = 0
    before: datetime | None = None

    def query(self) -> dict[str, Any]:
        """Return the condition as a MongoDB query."""
        optional: dict[str, Any] = {"model_name": self.model_name, "tenant": self.tenant, "last_code": self.code}
        query = {"state": str(self.state), **{name: value for name, value in optional.items() if value}}
        if self.before is not None:
            query["updated_at"] = {"$lt": self.before}
        return query


class JobStore(Protocol):
    """Durable jobs. Methods return jobs without their requests and raise ShoalError, except where noted."""

    async def insert(self, jobs: Sequence[Job]) -> Inserted | UnknownOutcome:
        """Insert new jobs independently of each other: queued, or claimed already (`Job.lease`).

        A job whose idempotency key is in use is refused with KeyTaken.
        """

    async def by_key(self, keys: Collection[Key]) -> dict[Key, Job]:
        """Return the jobs that have these idempotency keys."""

    async def dependency_states(
        self, tenant: str, ids: Collection[str], keys: Collection[str]
    ) -> list[DependencyState]:
        """Return the states of a tenant's jobs with one of these ids or keys; a job that has both may occur twice."""

    async def count_waiting(self, limit: int) -> int:
        """Return the number of jobs that wait for a claim or for other jobs, at most `limit`."""

    async def tenant_queues(self, after: str, limit: int) -> list[tuple[TenantQueueKey, datetime]]:
        """Return up to `limit` tenant queues that have jobs, with their earliest due times, by text after `after`."""

    async def heads(
        self, limits: Sequence[tuple[TenantQueueKey, int]], now: datetime
    ) -> dict[TenantQueueKey, list[Waiting]]:
        """Return the first due jobs of each of these tenant queues, up to its limit, by due time."""

    async def claim(self, ids: Sequence[str], lease: Lease, now: datetime) -> Claimed | UnknownOutcome:
        """Claim the jobs among `ids` that are due and unclaimed; return them with their requests."""

    async def claim_accepted(self, jobs: Sequence[Job], lease: Lease, now: datetime) -> Claimed | UnknownOutcome:
        """Claim the given jobs that are unchanged since their insert; return them with their requests."""

    async def claimed_under(self, lease: Lease, ids: Sequence[str]) -> list[Job]:
        """Return the jobs among `ids` that `lease` holds, with their requests."""

    async def renew(self, held: Mapping[str, Lease], expires_at: datetime) -> set[str]:
        """Extend the leases `held`, by job id; return the ids of jobs that the leases no longer hold."""

    async def take_lapsed(
        self, lapsed_at: datetime, lease: Lease, limit: int, *, but_ids: Collection[str], but_leases: Collection[str]
    ) -> list[tuple[Job, Lease]]:
        """Move up to `limit` jobs with lapsed leases to `lease`; return each job with its former lease."""

    async def take_expired(self, now: datetime, lease: Lease, limit: int) -> list[Job]:
        """Move up to `limit` queued jobs past their deadlines to `lease`; return the jobs."""

    async def take_to_cancel(self, job_id: str, reason: str, lease: Lease) -> Job | None:
        """Move a job to `lease` for cancellation. None: the job has ended, is being cancelled, or is unknown."""

    async def expire_leases(self, owner: str, but_process: str, at: datetime) -> int:
        """Set the expiry of leases of other processes of `owner` to `at`; return the number of leases."""

    async def add_tenant_queues(self) -> int:
        """Set the tenant queue of queued jobs that an earlier version wrote; return the number of jobs."""

    async def write_states(self, changes: Sequence[Change]) -> StatesWritten | UnknownOutcome:
        """Write each change whose job is still held by the lease, and in the attempt, of its `before`."""

    async def read(self, ids: Collection[str], tenant: str | None = None) -> dict[str, Job]:
        """Return the existing jobs among `ids`, by id; with `tenant`, those of the tenant.

        Without their labels, and of their transitions the newest one: of dead letters, both may be long.
        """

    async def dead_letters(self, filter_: DeadFilter, limit: int, after: str = "") -> tuple[list[Job], str]:
        """Return up to `limit` dead letters, by id after `after`, and the id after which the next page begins.

        A page may have fewer, or none, although more match; the id is empty after the last page. They are as `read`
        returns them.
        """

    async def requeue(self, changes: Sequence[Change]) -> None:
        """Write the change of each dead letter that was not requeued or removed since it was read."""

    async def purge(self, letters: Sequence[Job]) -> None:
        """Remove each dead letter that was not requeued since it was read."""

    async def dependents(self, ended: Collection[str], limit: int) -> list[Job]:
        """Return up to `limit` unheld jobs that wait for one of the ended jobs, in any order."""

    async def dependents_of(self, ended: str, after: str, limit: int) -> list[Job]:
        """Return up to `limit` unheld jobs that wait for the ended job, by id after `after`."""

    async def dependents_among(self, ids: Collection[str]) -> list[Job]:
        """Return the unheld jobs among `ids` that wait for other jobs."""

    async def dependents_page(self, after: str, limit: int) -> list[Job]:
        """Return up to `limit` unheld queued jobs that wait for other jobs, by id after `after`."""

    async def release_dependents(self, changes: Sequence[Change]) -> None:
        """Write the change of each waiting job that is unchanged since it was read."""

    async def take_to_end(self, dooms: Sequence[tuple[Job, End, Sequence[str]]], lease: Lease) -> list[Job]:
        """Move waiting jobs to `lease`, each with its decided end and its unmet dependencies.

        Return the jobs that were unchanged since they were read.
        """
