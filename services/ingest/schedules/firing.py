"""Firing of schedules by the leader: due times become jobs.

    due ──plan──> for each time: a job with that time's idempotency key ──> the schedule advances (fenced)

The job of a time is created first, with its own idempotency key; then the schedule advances. After a crash in between,
the next leader fires the time again, and finds the existing job. The advance applies only to a schedule unchanged since
the plan, and only with a fencing token that is not older than the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_lease import LeaderLease, fenced
from mesh.process.tasks import Background, for_ever
from services.ingest.clock import Clock
from services.ingest.intake.intake import Accepted
from services.ingest.job import Job
from services.ingest.schedules.documents import id_of, schedule_of
from services.ingest.schedules.schedule import Overlap, Schedule, SchedulePlan, label_of, plan
from shoal.errors import AlreadyExists, InvalidArgument, NotFound, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

TICK_S = 0.25
"""Interval of the leader's search for due schedules, and so the usual maximum delay of a firing."""
_DUE_AT_ONCE = 100
_UNAVAILABLE_WAIT_S = 1.0
NAME_LABEL = "schedule"
TIME_LABEL = "scheduled_for"

Submit = Callable[[pb.SubmitRequest], Awaitable[Accepted]]
Find = Callable[[str, str], Awaitable[Job | None]]
"""Finds a job by tenant and idempotency key."""
Read = Callable[[str], Awaitable[Job]]
Cancel = Callable[[str, str], Awaitable[Job]]


class Firing(Background):
    """Background firing of schedules while this instance leads. Used as `async with`."""

    def __init__(
        self,
        schedules: AsyncCollection[Document],
        lease: LeaderLease,
        *,
        submit: Submit,
        find: Find,
        read: Read,
        cancel: Cancel,
        clock: Clock,
        ready: asyncio.Event,
    ) -> None:
        self._schedules = schedules
        self._lease = lease
        self._submit = submit
        self._find = find
        self._read = read
        self._cancel = cancel
        self._clock = clock
        self._ready = ready

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("fire schedules", self._tick, away_s=_UNAVAILABLE_WAIT_S, log=log)

    async def _tick(self) -> float:
        await self.fire_due()
        return TICK_S

    async def fire_due(self) -> None:
        """Fire the due schedules, when this instance leads.

        Raises:
            ShoalError: the schedules cannot be read.
        """
        if self._lease.token is None:
            return
        with translated("finding due schedules"):
            due = {"next_at": {"$lte": self._clock()}}
            documents = await self._schedules.find(due).sort("next_at", 1).limit(_DUE_AT_ONCE).to_list()
        for document in documents:
            schedule = schedule_of(document)
            # An error of one schedule must not delay the others.
            try:
                await self._fire(schedule)
            except ShoalError as err:
                log.warning("cannot fire schedule %s of tenant %r: %s", schedule.name, schedule.tenant, err)

    async def _fire(self, schedule: Schedule) -> None:
        planned = plan(schedule, self._clock())
        if planned is None:
            return
        for time in planned.fire:
            # The next leader continues.
            if (token := self._lease.token) is None:
                return
            job, skip = await self._job_of(schedule, time)
            last = time == planned.fire[-1]
            next_at = planned.next_at if last else schedule.next_after(time)
            advanced = await self._advance(schedule, token, time, next_at, job, skip or planned.skip)
            # The schedule was changed or removed meanwhile: the next search finds its due times.
            if advanced is None:
                return
            schedule = advanced
        if not planned.fire:
            await self._skip(schedule, planned)

    async def _job_of(self, schedule: Schedule, time: datetime) -> tuple[str, str]:
        """Create the job of a time; return its id (empty: none) and the reason of a skip (empty: none)."""
        if schedule.overlap is not Overlap.ALLOW and schedule.last_job and await self._is_running(schedule.last_job):
            if schedule.overlap is Overlap.SKIP:
                return "", f"job {schedule.last_job} had not ended at {label_of(time)}"
            await self._cancel(schedule.last_job, f"schedule {schedule.name} has its next time")
        try:
            return (await self._submit(submit_of(schedule, time))).job.id, ""
        except AlreadyExists:
            # The job exists already; a client has changed the schedule since.
            earlier = await self._find(schedule.tenant, schedule.key_of(time))
            return "" if earlier is None else earlier.id, ""
        except InvalidArgument as err:
            log.error("cannot create the job of schedule %s of tenant %r: %s", schedule.name, schedule.tenant, err)
            return "", f"its job could not be created: {err.message}"

    async def _is_running(self, job_id: str) -> bool:
        try:
            return not (await self._read(job_id)).is_final
        except NotFound:
            return False

    async def _skip(self, schedule: Schedule, planned: SchedulePlan) -> None:
        if (token := self._lease.token) is not None:
            await self._advance(schedule, token, None, planned.next_at, "", planned.skip)

    async def _advance(
        self, schedule: Schedule, token: int, time: datetime | None, next_at: datetime | None, job: str, skip: str
    ) -> Schedule | None:
        """Record the firing or skip of a time, and set `next_at`. None: the schedule has changed since the plan."""
        as_planned = {
            "_id": id_of(schedule.tenant, schedule.name),
            "revision": schedule.revision,
            "next_at": schedule.next_at,
            **fenced(token),
        }
        done: Document = {"fence": token}
        counts = {}
        if job:
            done |= {"last_at": time, "last_job": job}
            counts["fired"] = 1
        if skip:
            done["last_skip"] = skip
            counts["skipped"] = 1
        update: Document = {"$set": done, "$inc": counts}
        if next_at is None:
            update["$unset"] = {"next_at": ""}
        else:
            done["next_at"] = next_at
        with translated("advancing a schedule"):
            written = await self._schedules.find_one_and_update(as_planned, update, return_document=True)
        return None if written is None else schedule_of(written)


def submit_of(schedule: Schedule, time: datetime) -> pb.SubmitRequest:
    """Return the submit of a time's job. All leaders create the same bytes."""
    submit = pb.SubmitRequest.FromString(schedule.template)
    submit.tenant = schedule.tenant
    submit.idempotency_key = schedule.key_of(time)
    submit.labels[NAME_LABEL] = schedule.name
    submit.labels[TIME_LABEL] = label_of(time)
    return submit
