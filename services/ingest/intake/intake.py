"""The way in: jobs are checked, written together, and acknowledged when a majority has them on disk.

    submit ──check──> limits ──> group ──payloads, then jobs (`durable_insert.py`)──> acknowledged

A key that was used before is found by its unique index, in the same write: no read comes first, and two that race are
told apart by the database.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from mesh.process.tasks import end
from services.ingest.dependencies.dependency_states import dependency_states
from services.ingest.dependencies.references import by_key, words
from services.ingest.group_commit import Group
from services.ingest.instance import Instance
from services.ingest.intake.budget import Budget
from services.ingest.intake.durable_insert import DurableInsert
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.pressure import Pressure
from services.ingest.intake.storage import Storage
from services.ingest.intake.submission import check_not_reserved
from services.ingest.intake.submission import job_of as job_of_submit
from services.ingest.job import Job
from services.ingest.job_store import JobStore, Key, KeyTaken, Unknown
from services.ingest.tenants.admission import Admission
from services.ingest.tracing import traceparent_of
from shoal.errors import AlreadyExists, NotFound, ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

GROUP_ITEMS = 500
"""100 documents a write are 11 times as fast as one each, 1,000 are 24 times; with more the first wait long."""
GROUP_BYTES = 16 << 20
"""A third of MongoDB's largest message."""
_WRITES = 2
# While one half of those who wait for an answer is written, the other makes its way (`group.py`).
_WAIT_S = 10.0
# Longest a submit may take with MongoDB away: the write under way gives up after mesh.mongo.TIMEOUT_MS, then the next.


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a submit: the job is durable."""

    job: Job
    existed: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that a submit is held to, in the order in which it meets them."""

    storage: Storage
    admission: Admission
    budget: Budget
    """Memory for the requests that wait to be written."""
    pressure: Pressure


class Intake:
    """Takes jobs. Used as `async with`; leaving finishes the write under way."""

    def __init__(
        self,
        store: JobStore,
        payloads: Payloads,
        insert: DurableInsert,
        limits: Limits,
        instance: Instance,
        *,
        inline_bytes: int,
    ) -> None:
        self._store = store
        self._payloads = payloads
        self._insert = insert
        self._limits = limits
        self._instance = instance
        self._inline_bytes = inline_bytes
        self._group: Group[Job, Accepted] = Group(
            "submitted jobs",
            self._write,
            max_items=GROUP_ITEMS,
            max_bytes=GROUP_BYTES,
            size=_size,
            limit_s=_WAIT_S,
            on_removed=self._left,
            writes=_WRITES,
            # What it depends on may come just before it, and must be found; and of two with one key the first has it.
            must_follow=lambda job: bool(job.depends_on) or job.id in self._repeats,
        )
        self._keys: Counter[tuple[str, str]] = Counter()
        self._repeats: set[str] = set()
        # The keys of jobs in the group, and those of these jobs whose key another one brought before.
        self._asking: set[asyncio.Task[Accepted]] = set()
        # Submits that wait to hear of a limit. Bounded as calls are: each has its caller.
        self._is_open = False

    async def __aenter__(self) -> Intake:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._asking)
        await self._group.__aexit__(kind, err, tb)

    def open(self) -> None:
        """The collections are there, with the indexes that idempotency rests on: submits may come."""
        self._is_open = True

    async def submit(self, submit: pb.SubmitRequest) -> Accepted:
        """Makes `submit` a durable job, or finds the one that it made before. Raises what `begin` does, or gives."""
        return await self.begin(submit, traceparent_of())

    async def submit_scheduled(self, submit: pb.SubmitRequest) -> Accepted:
        """The same for the job of a schedule, whose key nobody else may use."""
        return await self._begin(submit, traceparent_of())

    def begin(self, submit: pb.SubmitRequest, traceparent: str = "") -> asyncio.Future[Accepted]:
        """Takes `submit` in: the future has its answer once it is durable, or that of the job that it made before.

        Raises, or its future does:
            InvalidArgument: names the field.
            AlreadyExists: the key was used with another request.
            ResourceExhausted: the backlog is full, too many bytes wait to be written, the tenant's storage is used up.
            Unavailable: MongoDB is away; the job may or may not be there, so repeat it with an idempotency key.
        """
        check_not_reserved(submit)
        return self._begin(submit, traceparent)

    def _begin(self, submit: pb.SubmitRequest, traceparent: str) -> asyncio.Future[Accepted]:
        job = self._checked(submit, traceparent)
        if not self._limits.admission.admit_at_hand(job.tenant):
            asking = asyncio.create_task(self._begin_later(job), name="admission")
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            return asking
        self._limits.budget.take(_size(job))
        return self._handed_on(job)

    async def begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str = ""
    ) -> asyncio.Future[Accepted]:
        """The same, but for a stream, which is read on after it: where there is no room, it waits for some.

        For memory as long as it takes; for what `Admission` asks, half a minute.
        """
        check_not_reserved(submit)
        job = self._checked(submit, traceparent)
        await self._limits.admission.wait(job.tenant)
        await self._limits.budget.wait_for(_size(job))
        return self._handed_on(job)

    def _checked(self, submit: pb.SubmitRequest, traceparent: str) -> Job:
        job = job_of_submit(
            submit,
            job_id=self._instance.new_id(),
            now=self._instance.clock(),
            instance=self._instance.name,
            inline_bytes=self._inline_bytes,
            traceparent=traceparent,
        )
        if not self._is_open:
            raise Unavailable("the job database has not been reached yet: retry in a moment")
        self._limits.storage.admit(job.tenant)
        return job

    async def _begin_later(self, job: Job) -> Accepted:
        await self._limits.admission.admit(job.tenant)
        self._limits.budget.take(_size(job))
        return await self._handed_on(job)

    def _handed_on(self, job: Job) -> asyncio.Future[Accepted]:
        self._note_key(job)
        try:
            future = self._group.add(job)
        except ShoalError:
            self._forget_key(job)
            self._limits.budget.give_back(_size(job))
            raise
        self._limits.pressure.entered(_size(job))
        return future

    def _left(self, jobs: Sequence[Job]) -> None:
        nbytes = sum(map(_size, jobs))
        self._limits.budget.give_back(nbytes)
        self._limits.pressure.left(len(jobs), nbytes)
        for job in jobs:
            self._forget_key(job)

    def _note_key(self, job: Job) -> None:
        if job.key:
            if self._keys[job.tenant, job.key]:
                self._repeats.add(job.id)
            self._keys[job.tenant, job.key] += 1

    def _forget_key(self, job: Job) -> None:
        if job.key:
            self._repeats.discard(job.id)
            self._keys[job.tenant, job.key] -= 1
            if not self._keys[job.tenant, job.key]:
                del self._keys[job.tenant, job.key]

    async def by_key(self, tenant: str, key: str) -> Job | None:
        """The job that has this idempotency key, without its request.

        Raises:
            Unavailable: MongoDB is away.
        """
        return (await self._find_by_key({(tenant, key)})).get((tenant, key))

    async def _write(self, jobs: list[Job]) -> Sequence[Accepted | ShoalError]:
        began = self._limits.pressure.began()
        try:
            return await self._written(jobs)
        finally:
            self._limits.pressure.ended(began)

    async def _written(self, jobs: list[Job]) -> Sequence[Accepted | ShoalError]:
        errors = await self._without_dependencies(jobs)
        known = [job for job in jobs if job.id not in errors]
        await self._payloads.put(known)
        written: dict[str, Job] = {}
        if known:
            outcome = await self._insert(known)
            if isinstance(outcome, Unknown):
                raise outcome.error
            written = {job.id: job for job in outcome.written}
            errors |= outcome.refused
        earlier = await self._earlier([job for job in jobs if isinstance(errors.get(job.id), KeyTaken)])
        earlier |= await self._repeated([job for job in jobs if isinstance(errors.get(job.id), NotFound) and job.key])
        await self._payloads.drop([job.id for job in jobs if job.id in errors and job.is_apart])
        return [earlier.get(job.id) or errors.get(job.id) or Accepted(written[job.id], False) for job in jobs]

    async def _without_dependencies(self, jobs: Sequence[Job]) -> dict[str, ShoalError]:
        """Those of `jobs` that depend on jobs that there are not, neither in the database nor before them in `jobs`.

        A key is as good as its job, before that is written: when the one among `jobs` does not get it, another has it.
        """
        dependents = [job for job in jobs if job.depends_on]
        if not dependents:
            return {}
        known: set[tuple[str, str]] = set()
        for tenant in {job.tenant for job in dependents}:
            asked = {reference for job in dependents if job.tenant == tenant for reference in job.depends_on}
            known |= {(tenant, reference) for reference in await dependency_states(self._store, tenant, asked)}
        errors: dict[str, ShoalError] = {}
        for job in jobs:
            missing = [reference for reference in job.depends_on if (job.tenant, reference) not in known]
            if missing:
                errors[job.id] = NotFound(f"depends_on: there is no job {words(missing[0])} of this tenant")
            elif job.key:
                known.add((job.tenant, by_key(job.key)))
        return errors

    async def _earlier(self, jobs: Sequence[Job]) -> dict[str, Accepted | ShoalError]:
        """For each of `jobs`, whose keys are taken: the job that has its key."""
        try:
            found = await self._find_by_key({(job.tenant, job.key) for job in jobs})
        except ShoalError as err:
            return {job.id: err for job in jobs}
        return {job.id: _same_or_not(job, found.get((job.tenant, job.key))) for job in jobs}

    async def _repeated(self, jobs: Sequence[Job]) -> dict[str, Accepted | ShoalError]:
        """For those of `jobs` that were submitted before, when their dependencies were still there: that job."""
        try:
            found = await self._store.by_key({(job.tenant, job.key) for job in jobs})
        except ShoalError as err:
            return {job.id: err for job in jobs}
        return {job.id: _same_or_not(job, found[job.tenant, job.key]) for job in jobs if (job.tenant, job.key) in found}

    async def _find_by_key(self, keys: set[Key]) -> dict[Key, Job]:
        found: dict[Key, Job] = {}
        # A majority read may trail the write that the index already refused us for, on a set of several members.
        for wait_s in (0.0, 0.01, 0.1, 0.5):
            if missing := keys - found.keys():
                await asyncio.sleep(wait_s)
                found |= await self._store.by_key(missing)
        return found


def _same_or_not(job: Job, earlier: Job | None) -> Accepted | ShoalError:
    if earlier is None:
        return Unavailable("the earlier job of this idempotency key is not durable yet: retry in a moment")
    if earlier.digest != job.digest:
        return AlreadyExists(
            f"idempotency_key {job.key!r} was used for job {earlier.id} with another request: use a new key"
        )
    return Accepted(earlier, True)


def _size(job: Job) -> int:
    return len(job.request or b"") + 1_024
