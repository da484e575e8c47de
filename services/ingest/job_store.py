"""Storage of jobs, in the language of jobs: the protocol, and the outcomes of its writes.

    insert ──> claim ──renew──> write_states (ended, or back in the queue)
                 └──lapsed, cancelled, expired: take_*──> a new holder

A write is made, is not made, or its outcome is unknown (`Unknown`): it may be made, now or later. Each write about a
job that was read demands the job as it was read, so repeating one is safe. Reads and repeatable writes raise ShoalError
where they fail.
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
"""The due time of a job that waits, and its id."""
Change: TypeAlias = tuple[Job, Job]
"""A job before and after."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A write whose outcome is unknown; `error` is for the caller."""

    error: ShoalError


@dataclass(frozen=True, slots=True)
class Inserted:
    """Jobs that are durable now, and the refusals of the others, by their ids."""

    written: Sequence[Job]
    refused: Mapping[str, ShoalError] = field(default_factory=dict)


class KeyTaken(AlreadyExists):
    """The refusal of a job whose idempotency key another job has, which may be the same one."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """Jobs that a claim has won."""

    jobs: Sequence[Job]


@dataclass(frozen=True, slots=True)
class Written:
    """Number of state changes that were made; the other jobs have another holder."""

    count: int


@dataclass(frozen=True, slots=True)
class DependencyState:
    """State of a job that others wait for."""

    id: str
    state: State
    message: str = ""
    """The reason of its end, unless it succeeded."""
    key: str = ""


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Condition on dead letters; each field that is set narrows it."""

    state: State = State.DEAD
    model_name: str = ""
    tenant: str = ""
    code: int = 0
    before: datetime | None = None

    def query(self) -> dict[str, Any]:
        """Return the condition as MongoDB takes it."""
        asked: dict[str, Any] = {"model_name": self.model_name, "tenant": self.tenant, "last_code": self.code}
        query = {"state": str(self.state), **{name: value for name, value in asked.items() if value}}
        if self.before is not None:
            query["updated_at"] = {"$lt": self.before}
        return query


class JobStore(Protocol):
    """Durable jobs. Unless it says otherwise, a method returns jobs without their requests and raises ShoalError."""

    async def insert(self, jobs: Sequence[Job]) -> Inserted | Unknown:
        """Insert new jobs, each by itself: queued, or claimed already (`Job.lease`).

        A job whose key another one has is refused with KeyTaken.
        """

    async def by_key(self, keys: Collection[Key]) -> dict[Key, Job]:
        """Return the jobs that have these idempotency keys."""

    async def standings(self, tenant: str, ids: Collection[str], keys: Collection[str]) -> list[DependencyState]:
        """Return the states of a tenant's jobs that have one of these ids or keys; one of both kinds may be twice."""

    async def count_waiting(self, limit: int) -> int:
        """Return the number of jobs that wait to be claimed; `limit` if there are more."""

    async def lanes(self, after: str, limit: int) -> list[tuple[TenantQueueKey, datetime]]:
        """Return up to `limit` lanes that have jobs, with their earliest due times, by text from `after` on."""

    async def heads(
        self, limits: Sequence[tuple[TenantQueueKey, int]], now: datetime
    ) -> dict[TenantQueueKey, list[Waiting]]:
        """Return the first due jobs of each of these lanes, up to its limit, in the order of their due times."""

    async def claim(self, ids: Sequence[str], lease: Lease, now: datetime) -> Claimed | Unknown:
        """Claim those of these jobs that are due and wait; return them with their requests."""

    async def claim_fresh(self, jobs: Sequence[Job], lease: Lease, now: datetime) -> Claimed | Unknown:
        """Claim those of these jobs that nobody has touched since they were inserted; return them with requests."""

    async def claimed_under(self, lease: Lease, ids: Sequence[str]) -> list[Job]:
        """Return those of these jobs that `lease` holds, with their requests."""

    async def renew(self, held: Mapping[str, Lease], expires_at: datetime) -> set[str]:
        """Extend the leases `held`, by job id; return the jobs that these do not hold any more."""

    async def take_lapsed(
        self, lapsed_at: datetime, lease: Lease, limit: int, *, but_ids: Collection[str], but_leases: Collection[str]
    ) -> list[tuple[Job, Lease]]:
        """Move up to `limit` jobs whose leases have lapsed to `lease`; return each with the lease that it had."""

    async def take_expired(self, now: datetime, lease: Lease, limit: int) -> list[Job]:
        """Move up to `limit` queued jobs whose deadlines have passed to `lease`; return them."""

    async def take_to_cancel(self, job_id: str, reason: str, lease: Lease) -> Job | None:
        """Move a job to `lease`, to be cancelled. None: it has ended, is being cancelled, or is unknown."""

    async def lapse(self, owner: str, but_process: str, at: datetime) -> int:
        """Let the leases of other processes of `owner` lapse at `at`; return their number."""

    async def line_up(self) -> int:
        """Give lanes to queued jobs of an earlier version; return their number."""

    async def write_states(self, changes: Sequence[Change]) -> Written | Unknown:
        """Write each job's change, where the lease that it had before still holds it, in the same attempt."""

    async def read(self, ids: Collection[str]) -> dict[str, Job]:
        """Return those of these jobs that exist."""

    async def dead_letters(self, among: DeadFilter, limit: int) -> list[Job]:
        """Return up to `limit` dead letters, oldest first."""

    async def requeue(self, changes: Sequence[Change]) -> None:
        """Write each dead letter's change, unless it was requeued or removed since it was read."""

    async def purge(self, letters: Sequence[Job]) -> None:
        """Remove each dead letter that was not requeued since it was read."""

    async def dependents(self, ended: Collection[str]) -> list[Job]:
        """Return the jobs that wait for one of these, and that nobody holds."""

    async def dependents_among(self, ids: Collection[str]) -> list[Job]:
        """Return those of these jobs that wait for others, and that nobody holds."""

    async def dependents_page(self, after: str, limit: int) -> list[Job]:
        """Return up to `limit` queued jobs that wait for others, and that nobody holds, by id from `after` on."""

    async def release_dependents(self, changes: Sequence[Change]) -> None:
        """Write the change of each job that waits for others, unless it has changed since it was read."""

    async def doom(self, dooms: Sequence[tuple[Job, End, Sequence[str]]], lease: Lease) -> list[Job]:
        """Move jobs that wait for others to `lease` with their decided ends, and with the dependencies that failed.

        Return those that had not changed since they were read.
        """
