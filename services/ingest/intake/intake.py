"""Intake: submits are checked, written in groups, and acknowledged when a majority has the jobs on disk.

    submit ──check──> limits ──> group ──payloads, then jobs (`durable_insert.py`)──> acknowledged

A repeated idempotency key fails at its unique index, in the same write. No read precedes the write, and the database
decides between two concurrent submits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from mesh.process.tasks import end
from mesh.rpc.access import Access
from mesh.rpc.held_shares import CallLimits, Reservation
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import TenantTurns
from services.ingest.dependencies.dependency_states import dependency_states
from services.ingest.dependencies.references import by_key, words
from services.ingest.group_commit import Group
from services.ingest.instance import Instance
from services.ingest.intake.durable_insert import DurableInsert
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.pressure import WritePressure
from services.ingest.intake.storage import StorageQuotas
from services.ingest.intake.submission import check_not_reserved
from services.ingest.intake.submission import job_of as job_of_submit
from services.ingest.job import Job
from services.ingest.job_access import checked_caller
from services.ingest.job_store import JobStore, Key, KeyTaken, UnknownOutcome
from services.ingest.limits import CONNECTOR_LABEL
from services.ingest.tenants.admission import Admission, when_possible
from services.ingest.tracing import traceparent_of
from shoal.access.caller_header import connector_value
from shoal.errors import AlreadyExists, NotFound, ResourceExhausted, ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

GROUP_ITEMS = 500
"""Maximum jobs of one write. 100 documents in a write are 11 times as fast as one each, and 1,000 are 24 times as fast,
but in larger groups the first jobs wait long."""
DEPENDENCIES_OF_AN_ITEM = 5
"""Dependencies that count as one more job of a write: each one is looked up before, and has an entry in an index."""
GROUP_BYTES = 16 << 20
"""Maximum bytes of one write: a third of MongoDB's largest message."""
_RETRY_AFTER_MS = 200
# While one half of the callers is written, the other half submits (`group_commit.py`).
_WRITES = 2
# Timeout of a submit while MongoDB is unavailable: a write gives up after mesh.mongo.TIMEOUT_MS, then the next one.
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """Result of a submit: the durable job, and True when it existed before."""

    job: Job
    existed: bool


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Limits on submits, in the order in which they are checked."""

    storage: StorageQuotas
    admission: Admission
    memory: TenantTurns
    """Memory for requests that wait for their write, in bytes."""
    pressure: WritePressure


class Intake:
    """Intake of submits. Used as `async with`; the exit finishes the writes in flight."""

    def __init__(
        self,
        store: JobStore,
        payloads: Payloads,
        insert: DurableInsert,
        limits: IntakeLimits,
        instance: Instance,
        *,
        inline_bytes: int,
        access: Access | None = None,
    ) -> None:
        self._store = store
        self._payloads = payloads
        self._insert = insert
        self._limits = limits
        self._instance = instance
        self._inline_bytes = inline_bytes
        self._access = access
        self._group: Group[Job, Accepted] = Group(
            "submitted jobs",
            self._write,
            max_items=GROUP_ITEMS,
            max_bytes=GROUP_BYTES,
            size=_size,
            cost=_cost,
            sender=lambda job: job.tenant,
            limit_s=_TIMEOUT_S,
            on_removed=self._on_removed,
            writes=_WRITES,
            # The dependencies of a job may be just before it, and must be found. Of two jobs with one idempotency key,
            # the first must be written first.
            must_follow=lambda job: bool(job.depends_on) or job.id in self._repeats,
        )
        # The idempotency keys of jobs in the group, and the ids of jobs there that repeat a key.
        self._keys: Counter[tuple[str, str]] = Counter()
        self._repeats: set[str] = set()
        # Submits that wait for a check of a limit. Bounded by the number of calls: each has its caller.
        self._admitting: set[asyncio.Task[Accepted]] = set()
        self._is_open = False

    async def __aenter__(self) -> Intake:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._admitting)
        await self._group.__aexit__(kind, err, tb)

    def open(self) -> None:
        """Accept submits from now on: the collections exist, with the indexes that idempotency requires."""
        self._is_open = True

    async def submit(self, submit: pb.SubmitRequest, scope: TenantScope = EVERY_TENANT) -> Accepted:
        """Create a durable job, or return the one that an earlier equal submit created. Raises what `begin` raises."""
        return await self.begin(submit, traceparent_of(), scope)

    async def submit_scheduled(self, submit: pb.SubmitRequest, caller: bytes) -> Accepted:
        """Create the job of a schedule's firing, whose idempotency key is reserved for schedules.

        `caller` stored the schedule. Its grants decide when the job runs, so that a refusal is the end of a job.
        """
        return await self._begin(submit, traceparent_of(), caller)

    def begin(
        self, submit: pb.SubmitRequest, traceparent: str = "", scope: TenantScope = EVERY_TENANT
    ) -> asyncio.Future[Accepted]:
        """Begin a submit; return the future of its durable job, or of the job that an equal submit created before.

        Raises, here or in the future:
            InvalidArgument: a field is invalid; the message names it.
            PermissionDenied: the message names another tenant than the caller's, or a model that it may not run.
            AlreadyExists: the idempotency key was used with another request.
            ResourceExhausted: a limit of the policy is reached, the backlog is full, too many bytes wait for their
                write, or the storage quota is spent.
            Unavailable: MongoDB is unavailable; the job may or may not exist: repeat with an idempotency key.
        """
        check_not_reserved(submit)
        if scope is EVERY_TENANT:
            return self._begin(submit, traceparent, b"")
        caller = _admitted(submit, scope)
        return self._begin(submit, traceparent, caller, scope.limits(submit.request.model_name))

    def _begin(
        self, submit: pb.SubmitRequest, traceparent: str, caller: bytes, limits: CallLimits | None = None
    ) -> asyncio.Future[Accepted]:
        job = self._checked(submit, traceparent, caller)
        if limits is None:
            return self._admitted(job)
        reservation = limits.reserve(len(job.request or b""), 0)
        try:
            future = self._admitted(job)
        except BaseException:
            reservation.end()
            raise
        return _ending(reservation, future)

    def _admitted(self, job: Job) -> asyncio.Future[Accepted]:
        if not self._limits.admission.try_admit(job.tenant):
            admitting = asyncio.create_task(self._admit_and_enqueue(job), name="admission")
            self._admitting.add(admitting)
            admitting.add_done_callback(self._admitting.discard)
            return admitting
        self._hold(job)
        return self._enqueue(job)

    async def begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str = "", scope: TenantScope = EVERY_TENANT
    ) -> asyncio.Future[Accepted]:
        """Begin a submit of a stream: instead of raising, wait until the limits allow it.

        The wait for memory has no deadline. The waits for the limits of the policy, and for `Admission`, end after half
        a minute each.
        """
        check_not_reserved(submit)
        if scope is EVERY_TENANT:
            return await self._begin_when_there_is_room(submit, traceparent, b"")
        caller = _admitted(submit, scope)
        limits = scope.limits(submit.request.model_name)
        return await self._begin_when_there_is_room(submit, traceparent, caller, limits)

    async def begin_of_connector(self, submit: pb.SubmitRequest) -> asyncio.Future[Accepted]:
        """Begin the submit of a connector's message, whose labels are reserved; wait as a stream does.

        The caller is the connector: a user of its tenant.
        """
        caller = connector_value(submit.labels[CONNECTOR_LABEL], submit.tenant)
        scope = TenantScope(submit.tenant, caller, self._access)
        caller = checked_caller(scope, submit.request.model_name)
        return await self._begin_when_there_is_room(submit, "", caller, scope.limits(submit.request.model_name))

    async def _begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str, caller: bytes, limits: CallLimits | None = None
    ) -> asyncio.Future[Accepted]:
        job = self._checked(submit, traceparent, caller)
        if limits is None:
            return await self._admitted_when_there_is_room(job)

        async def reserve() -> Reservation:
            return limits.reserve(len(job.request or b""), 0)

        reservation = await when_possible(reserve)
        try:
            future = await self._admitted_when_there_is_room(job)
        except BaseException:
            reservation.end()
            raise
        return _ending(reservation, future)

    async def _admitted_when_there_is_room(self, job: Job) -> asyncio.Future[Accepted]:
        await self._limits.admission.wait(job.tenant)
        size = _size(job)
        if not self._limits.memory.try_admit(job.tenant, size):
            await self._limits.memory.admit(job.tenant, size)
        return self._enqueue(job)

    def _checked(self, submit: pb.SubmitRequest, traceparent: str, caller: bytes) -> Job:
        job = job_of_submit(
            submit,
            job_id=self._instance.new_id(),
            now=self._instance.clock(),
            instance=self._instance.name,
            inline_bytes=self._inline_bytes,
            traceparent=traceparent,
            caller=caller,
        )
        if not self._is_open:
            raise Unavailable("this instance is not connected to the job database yet: retry in a moment")
        self._limits.storage.admit(job.tenant)
        return job

    async def _admit_and_enqueue(self, job: Job) -> Accepted:
        await self._limits.admission.admit(job.tenant)
        self._hold(job)
        return await self._enqueue(job)

    def _hold(self, job: Job) -> None:
        """Hold the memory of a job until its write. Raises ResourceExhausted when there is none."""
        memory = self._limits.memory
        if not memory.try_admit(job.tenant, _size(job)):
            raise ResourceExhausted(
                f"{memory.held} bytes of submitted requests wait for their write, {memory.held_by(job.tenant)} of them "
                "this tenant's, which may hold twice what is free: retry in a moment",
                retry_after_ms=_RETRY_AFTER_MS,
            )

    def _enqueue(self, job: Job) -> asyncio.Future[Accepted]:
        self._add_key(job)
        try:
            future = self._group.add(job)
        except ShoalError:
            self._remove_key(job)
            self._limits.memory.release(job.tenant, _size(job))
            raise
        self._limits.pressure.entered(job.tenant, _cost(job), _size(job))
        return future

    def _on_removed(self, jobs: Sequence[Job]) -> None:
        by_tenant: Counter[str] = Counter()
        for job in jobs:
            size = _size(job)
            by_tenant[job.tenant] += size
            self._limits.pressure.left(job.tenant, _cost(job), size)
            self._remove_key(job)
        for tenant, nbytes in by_tenant.items():
            self._limits.memory.release(tenant, nbytes)

    def _add_key(self, job: Job) -> None:
        if job.key:
            if self._keys[job.tenant, job.key]:
                self._repeats.add(job.id)
            self._keys[job.tenant, job.key] += 1

    def _remove_key(self, job: Job) -> None:
        if job.key:
            self._repeats.discard(job.id)
            self._keys[job.tenant, job.key] -= 1
            if not self._keys[job.tenant, job.key]:
                del self._keys[job.tenant, job.key]

    async def by_key(self, tenant: str, key: str) -> Job | None:
        """Return the job with this idempotency key, without its request; None when there is none.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        return (await self._find_by_key({(tenant, key)})).get((tenant, key))

    async def _write(self, jobs: list[Job]) -> Sequence[Accepted | ShoalError]:
        began = self._limits.pressure.began()
        try:
            return await self._write_all(jobs)
        finally:
            self._limits.pressure.ended(began)

    async def _write_all(self, jobs: list[Job]) -> Sequence[Accepted | ShoalError]:
        errors = await self._missing_dependencies(jobs)
        known = [job for job in jobs if job.id not in errors]
        await self._payloads.put(known)
        written: dict[str, Job] = {}
        if known:
            outcome = await self._insert(known)
            if isinstance(outcome, UnknownOutcome):
                raise outcome.error
            written = {job.id: job for job in outcome.written}
            errors |= outcome.refused
        earlier = await self._earlier([job for job in jobs if isinstance(errors.get(job.id), KeyTaken)])
        earlier |= await self._repeated([job for job in jobs if isinstance(errors.get(job.id), NotFound) and job.key])
        await self._payloads.drop([job.id for job in jobs if job.id in errors and job.is_apart])
        return [earlier.get(job.id) or errors.get(job.id) or Accepted(written[job.id], False) for job in jobs]

    async def _missing_dependencies(self, jobs: Sequence[Job]) -> dict[str, ShoalError]:
        """Return the errors of jobs with a missing dependency: neither in the database nor earlier in `jobs`.

        The idempotency key of an earlier job counts as written: if the insert refuses it, another job has the key.
        """
        dependents = [job for job in jobs if job.depends_on]
        if not dependents:
            return {}
        known: set[tuple[str, str]] = set()
        for tenant in {job.tenant for job in dependents}:
            references = {reference for job in dependents if job.tenant == tenant for reference in job.depends_on}
            known |= {(tenant, reference) for reference in await dependency_states(self._store, tenant, references)}
        errors: dict[str, ShoalError] = {}
        for job in jobs:
            missing = [reference for reference in job.depends_on if (job.tenant, reference) not in known]
            if missing:
                errors[job.id] = NotFound(f"depends_on: this tenant has no job {words(missing[0])}")
            elif job.key:
                known.add((job.tenant, by_key(job.key)))
        return errors

    async def _earlier(self, jobs: Sequence[Job]) -> dict[str, Accepted | ShoalError]:
        """Return, for each of `jobs`, the job that has its idempotency key, or the error."""
        try:
            found = await self._find_by_key({(job.tenant, job.key) for job in jobs})
        except ShoalError as err:
            return {job.id: err for job in jobs}
        return {job.id: _existing_or_conflict(job, found.get((job.tenant, job.key))) for job in jobs}

    async def _repeated(self, jobs: Sequence[Job]) -> dict[str, Accepted | ShoalError]:
        """Return the earlier jobs of repeated submits whose dependencies were removed since, by the new job's id."""
        try:
            found = await self._store.by_key({(job.tenant, job.key) for job in jobs})
        except ShoalError as err:
            return {job.id: err for job in jobs}
        return {
            job.id: _existing_or_conflict(job, found[job.tenant, job.key])
            for job in jobs
            if (job.tenant, job.key) in found
        }

    async def _find_by_key(self, keys: set[Key]) -> dict[Key, Job]:
        found: dict[Key, Job] = {}
        # On a replica set, a majority read may lag behind the write that made the index refuse the key.
        for wait_s in (0.0, 0.01, 0.1, 0.5):
            if missing := keys - found.keys():
                await asyncio.sleep(wait_s)
                found |= await self._store.by_key(missing)
        return found


def _admitted(submit: pb.SubmitRequest, scope: TenantScope) -> bytes:
    """Set the tenant of a submit to the scope's, and return the caller to be stored with its job.

    Raises PermissionDenied.
    """
    submit.tenant = scope.owner("tenant", submit.tenant)
    return checked_caller(scope, submit.request.model_name)


def _ending(reservation: Reservation, future: asyncio.Future[Accepted]) -> asyncio.Future[Accepted]:
    """Return the future of a submit, at whose end the reservation ends."""
    future.add_done_callback(lambda _: reservation.end())
    return future


def _existing_or_conflict(job: Job, earlier: Job | None) -> Accepted | ShoalError:
    if earlier is None:
        return Unavailable("the earlier job of this idempotency key is not durable yet: retry in a moment")
    if earlier.digest != job.digest:
        return AlreadyExists(
            f"idempotency_key {job.key!r} was used for job {earlier.id} with another request: use a new key"
        )
    return Accepted(earlier, True)


# Bytes of a character of a label or a dependency, at most, of a label's two texts without their characters, and of a
# dependency's text without its characters.
_CHARACTER_BYTES, _LABEL_BYTES, _DEPENDENCY_BYTES = 4, 160, 90


def _size(job: Job) -> int:
    """Return the bytes that a job takes in memory, at most."""
    size = len(job.request or b"") + len(job.caller) + 1_024
    if job.labels:
        size += sum(_LABEL_BYTES + _CHARACTER_BYTES * (len(key) + len(value)) for key, value in job.labels)
    if job.depends_on:
        size += sum(_DEPENDENCY_BYTES + _CHARACTER_BYTES * len(reference) for reference in job.depends_on)
    return size


def _cost(job: Job) -> int:
    """Return the number of jobs that a job counts as in `GROUP_ITEMS`."""
    return 1 + len(job.depends_on) // DEPENDENCIES_OF_AN_ITEM
