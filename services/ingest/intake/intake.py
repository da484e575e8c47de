"""The way in: jobs are checked, written together, and acknowledged when a majority has them on disk.

    submit ──check──> memory budget, backlog ──> group ──payloads, then jobs──> acknowledged ──> the dispatcher hears

Where the dispatcher has time for them, jobs are written as claimed already: one write less in the life of each.

A key that was used before is found by its unique index, in the same write: no read comes first, and two that race are
told apart by the database.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import BulkWriteError

from mesh.mongo import Document, translate, translated
from mesh.tasks import end
from services.ingest.clock import Clock
from services.ingest.dependencies.references import by_key, words
from services.ingest.dependencies.standings import standings
from services.ingest.documents import LIGHT, document_of, job_of
from services.ingest.intake.backlog import Backlog
from services.ingest.intake.budget import Budget
from services.ingest.intake.group import Group
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.pressure import Pressure
from services.ingest.intake.storage import Storage
from services.ingest.intake.submission import check_not_reserved
from services.ingest.intake.submission import job_of as job_of_submit
from services.ingest.job import Job
from services.ingest.tenants.admission import Admission
from services.ingest.tracing import traceparent_of
from services.ingest.ulid import Ulids
from shoal.errors import AlreadyExists, DataLoss, NotFound, ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

GROUP_ITEMS = 500
"""100 documents a write are 11 times as fast as one each, 1,000 are 24 times; with more the first wait long."""
GROUP_BYTES = 16 << 20
"""A third of MongoDB's largest message."""
_WRITES = 2
# While one half of those who wait for an answer is written, the other makes its way (`group.py`).
_DUPLICATE_KEY = 11000
_WAIT_S = 10.0
# Longest a submit may take with MongoDB away: the write under way gives up after mesh.mongo.TIMEOUT_MS, then the next.


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a submit: the job is durable."""

    job: Job
    existed: bool


class Takers(Protocol):
    """Who works on jobs, as intake needs them."""

    def adopt(self, jobs: list[Job]) -> list[Job]:
        """The jobs as they are to be written: claimed at once where somebody here has time for them.

        What was adopted is then accepted, disowned or forgotten.
        """

    def accept(self, jobs: Sequence[Job]) -> None:
        """They were written."""

    def disown(self, jobs: Sequence[Job]) -> None:
        """It is not clear whether they were written."""

    def forget(self, jobs: Sequence[Job]) -> None:
        """They were not written."""


class Intake:
    """Takes jobs. Used as `async with`; leaving finishes the write under way."""

    def __init__(
        self,
        jobs: AsyncCollection[Document],
        payloads: Payloads,
        *,
        backlog: Backlog,
        admission: Admission,
        storage: Storage,
        budget: Budget,
        pressure: Pressure,
        clock: Clock,
        ulids: Ulids,
        instance: str,
        inline_bytes: int,
        takers: Takers,
        on_accepted: Callable[[Sequence[Job]], None],
    ) -> None:
        self._jobs = jobs
        self._payloads = payloads
        self._backlog = backlog
        self._admission = admission
        self._storage = storage
        self._budget = budget
        self._pressure = pressure
        self._clock = clock
        self._ulids = ulids
        self._instance = instance
        self._inline_bytes = inline_bytes
        self._takers = takers
        self._on_accepted = on_accepted
        self._group: Group[Job, Accepted] = Group(
            "submitted jobs",
            self._write,
            max_items=GROUP_ITEMS,
            max_bytes=GROUP_BYTES,
            size=_size,
            limit_s=_WAIT_S,
            on_left=self._left,
            writes=_WRITES,
            # What it depends on may come just before it, and must be found; and of two with one key the first has it.
            follows=lambda job: bool(job.depends_on) or job.id in self._repeats,
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
        if not self._admission.admit_at_hand(job.tenant):
            asking = asyncio.create_task(self._begin_later(job), name="admission")
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            return asking
        self._budget.take(_size(job))
        return self._handed_on(job)

    async def begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str = ""
    ) -> asyncio.Future[Accepted]:
        """The same, but for a stream, which is read on after it: where there is no room, it waits for some.

        For memory as long as it takes; for what `Admission` asks, half a minute.
        """
        check_not_reserved(submit)
        job = self._checked(submit, traceparent)
        await self._admission.wait(job.tenant)
        await self._budget.wait_for(_size(job))
        return self._handed_on(job)

    def _checked(self, submit: pb.SubmitRequest, traceparent: str) -> Job:
        job = job_of_submit(
            submit,
            job_id=self._ulids.new(),
            now=self._clock(),
            instance=self._instance,
            inline_bytes=self._inline_bytes,
            traceparent=traceparent,
        )
        if not self._is_open:
            raise Unavailable("the job database has not been reached yet: retry in a moment")
        self._storage.admit(job.tenant)
        return job

    async def _begin_later(self, job: Job) -> Accepted:
        await self._admission.admit(job.tenant)
        self._budget.take(_size(job))
        return await self._handed_on(job)

    def _handed_on(self, job: Job) -> asyncio.Future[Accepted]:
        self._note_key(job)
        try:
            future = self._group.add(job)
        except ShoalError:
            self._forget_key(job)
            self._budget.give_back(_size(job))
            raise
        self._pressure.entered(_size(job))
        return future

    def _left(self, jobs: Sequence[Job]) -> None:
        nbytes = sum(map(_size, jobs))
        self._budget.give_back(nbytes)
        self._pressure.left(len(jobs), nbytes)
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
        began = self._pressure.began()
        try:
            return await self._written(jobs)
        finally:
            self._pressure.ended(began)

    async def _written(self, jobs: list[Job]) -> Sequence[Accepted | ShoalError]:
        errors = await self._without_dependencies(jobs)
        known = [job for job in jobs if job.id not in errors]
        await self._payloads.put(known)
        known = self._takers.adopt(known)  # Only now: their leases count from here, and the store may be slow.
        try:
            errors |= await self._insert(known) if known else {}
        except BaseException:
            self._takers.disown(known)  # They may be there or not.
            raise
        self._takers.forget([job for job in known if job.id in errors])
        written = {job.id: job for job in known if job.id not in errors}
        if written:
            self._backlog.added(sum(job.due_at is not None for job in written.values()))
            self._takers.accept([*written.values()])
            self._on_accepted([*written.values()])
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
            known |= {(tenant, reference) for reference in await standings(self._jobs, tenant, asked)}
        errors: dict[str, ShoalError] = {}
        for job in jobs:
            missing = [reference for reference in job.depends_on if (job.tenant, reference) not in known]
            if missing:
                errors[job.id] = NotFound(f"depends_on: there is no job {words(missing[0])} of this tenant")
            elif job.key:
                known.add((job.tenant, by_key(job.key)))
        return errors

    async def _insert(self, jobs: Sequence[Job]) -> dict[str, ShoalError]:
        """Writes the jobs and says which were refused."""
        with translated("storing submitted jobs"):
            try:
                await self._jobs.insert_many([document_of(job) for job in jobs], ordered=False)
            except BulkWriteError as err:
                if err.details.get("writeConcernErrors"):
                    raise  # Written, but not by a majority in time: nothing may be acknowledged.
                return {jobs[entry["index"]].id: _refusal(err, entry) for entry in err.details["writeErrors"]}
        return {}

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
            found = await self._look_for_keys({(job.tenant, job.key) for job in jobs})
        except ShoalError as err:
            return {job.id: err for job in jobs}
        return {job.id: _same_or_not(job, found[job.tenant, job.key]) for job in jobs if (job.tenant, job.key) in found}

    async def _find_by_key(self, keys: set[tuple[str, str]]) -> dict[tuple[str, str], Job]:
        found: dict[tuple[str, str], Job] = {}
        # A majority read may trail the write that the index already refused us for, on a set of several members.
        for wait_s in (0.0, 0.01, 0.1, 0.5):
            if missing := keys - found.keys():
                await asyncio.sleep(wait_s)
                found |= await self._look_for_keys(missing)
        return found

    async def _look_for_keys(self, keys: set[tuple[str, str]]) -> dict[tuple[str, str], Job]:
        if not keys:
            return {}
        either = [{"tenant": tenant, "key": key} for tenant, key in keys]
        with translated("looking for the earlier jobs of keys"):
            found = [job_of(document) async for document in self._jobs.find({"$or": either}, LIGHT)]
        return {(job.tenant, job.key): job for job in found}


class KeyTaken(AlreadyExists):
    """The key has a job already; whether it is the same one remains to be seen."""


def _same_or_not(job: Job, earlier: Job | None) -> Accepted | ShoalError:
    if earlier is None:
        return Unavailable("the earlier job of this idempotency key is not durable yet: retry in a moment")
    if earlier.digest != job.digest:
        return AlreadyExists(
            f"idempotency_key {job.key!r} was used for job {earlier.id} with another request: use a new key"
        )
    return Accepted(earlier, True)


def _refusal(error: BulkWriteError, entry: dict[str, Any]) -> ShoalError:
    if entry.get("code") == _DUPLICATE_KEY:
        if "key" in entry.get("keyPattern", {}):
            return KeyTaken("the idempotency key is taken")
        return DataLoss("two jobs got one id")  # 80 random bits: it does not happen, and is not to be hidden.
    details = {"writeErrors": [entry], "writeConcernErrors": []}
    return translate(BulkWriteError(details), "storing a submitted job")


def _size(job: Job) -> int:
    return len(job.request or b"") + 1_024
