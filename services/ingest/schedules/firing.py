"""Firing of schedules by the leader: due times become jobs.

    due ──plan──> for each time: a job with that time's idempotency key ──> the schedule advances (fenced)
     ^                                └─ fails (a full quota)
     └── after 1 s, 2 s, 4 s ... ────────┘

The tenants take turns: one that has many schedules, or whose quota is full, delays only its own.

The job of a time is created first, with its own idempotency key; then the schedule advances. After a crash in between,
the next leader fires the time again, and finds the existing job. The advance applies only to a schedule unchanged since
the plan, and only with a fencing token that is not older than the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import Clock
from mesh.mongo_lease import LeaderLease, fenced
from mesh.process.tasks import Background, for_ever, together
from services.ingest.documents import EPOCH
from services.ingest.intake.intake import Accepted
from services.ingest.job import Job
from services.ingest.schedules.documents import id_of, schedule_of
from services.ingest.schedules.schedule import Overlap, Schedule, SchedulePlan, label_of, plan, retry_delay
from services.ingest.schedules.turns import turns
from shoal.errors import AlreadyExists, InvalidArgument, NotFound, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

TICK_S = 0.25
"""Pause of the leader after a round of due schedules, some of which may be left."""
AHEAD_S = 1.0
"""Interval of the search for schedules that are due before the next search, and so the maximum delay of a new one."""
DUE_AT_ONCE = 100
"""Maximum schedules of one round, shared by the tenants in turn: about a second of one tenant."""
TURN_S = 1.0
"""Time of one tenant in a round: after it, the tenant's other due times wait for the next round."""
# Tenants that fire at the same time. Each holds one schedule with its template, of at most a mebibyte.
_TENANTS_AT_ONCE = 16
_UNAVAILABLE_WAIT_S = 1.0
NAME_LABEL = "schedule"
TIME_LABEL = "scheduled_for"

Submit = Callable[[pb.SubmitRequest, bytes], Awaitable[Accepted]]
"""Submits a job for a caller, as `Schedule.caller` has it."""
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
        self.fired = 0
        """Times for which a job was made."""
        self.skipped = 0
        """Times, or runs of missed times, for which no job was made."""
        self.failed = 0
        """Attempts to fire that failed and are repeated."""

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("fire schedules", self.fire_due, away_s=_UNAVAILABLE_WAIT_S, log=log)

    async def fire_due(self) -> float:
        """Fire the due schedules, when this instance leads; return the pause until the next round.

        Each tenant gets its turn, however many others have.

        Raises:
            ShoalError: the schedules cannot be read.
        """
        if self._lease.token is None:
            return TICK_S
        now = self._clock()
        soon = now + timedelta(seconds=AHEAD_S)
        until = {"next_at": {"$lte": soon}, "try_again_at": {"$not": {"$gt": soon}}}
        with translated("finding due schedules"):
            fields = {"tenant": 1, "next_at": 1, "try_again_at": 1}
            found = await self._schedules.find(until, fields).sort("next_at", 1).to_list()
        times = [max(document["next_at"], document.get("try_again_at") or EPOCH) for document in found]
        due = [document for document, time in zip(found, times, strict=True) if time <= now]
        if not due:
            return max(0.0, (min(times, default=soon) - self._clock()).total_seconds())
        at_once = asyncio.Semaphore(_TENANTS_AT_ONCE)
        by_tenant = turns([(document["tenant"], document["_id"]) for document in due], DUE_AT_ONCE)
        await together(self._take_turn(ids, at_once) for ids in by_tenant.values())
        return TICK_S

    async def _take_turn(self, ids: Sequence[str], at_once: asyncio.Semaphore) -> None:
        """Fire the schedules of one tenant, for at most `TURN_S`."""
        async with at_once:
            until = asyncio.get_running_loop().time() + TURN_S
            for schedule_id in ids:
                if asyncio.get_running_loop().time() < until:
                    await self._fire_one(schedule_id, until)

    async def _fire_one(self, schedule_id: str, until: float) -> None:
        document: Document | None = None
        # An error of one schedule must not delay the others.
        try:
            with translated("reading a schedule"):
                document = await self._schedules.find_one({"_id": schedule_id})
            if document is not None:
                await self._fire(schedule_of(document), until)
        except Exception as err:
            await self._try_later(schedule_id, document, err)

    async def _try_later(self, schedule_id: str, document: Document | None, err: Exception) -> None:
        """Postpone a schedule whose firing failed. Only the first failure in a row is logged."""
        self.failed += 1
        tries = (document or {}).get("tries", 0) + 1
        if tries == 1:
            unexpected = None if isinstance(err, ShoalError) else err
            log.warning(
                "cannot fire schedule %(schedule)s, which is tried again: %(error)s",
                {"event": "schedule.retrying", "schedule": schedule_id, "error": err},
                exc_info=unexpected,
            )
        if document is None or (token := self._lease.token) is None:
            return
        unchanged = {"_id": schedule_id, "revision": document["revision"], **fenced(token)}
        later = {"tries": tries, "try_again_at": self._clock() + retry_delay(tries)}
        # Without MongoDB, the next round finds the schedule as it was.
        with suppress(ShoalError), translated("postponing a schedule"):
            await self._schedules.update_one(unchanged, {"$set": later})

    async def _fire(self, schedule: Schedule, until: float) -> None:
        planned = plan(schedule, self._clock())
        if planned is None:
            return
        for time in planned.fire:
            # The next round or leader continues.
            if (token := self._lease.token) is None or asyncio.get_running_loop().time() >= until:
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
            return (await self._submit(submit_of(schedule, time), schedule.caller)).job.id, ""
        except AlreadyExists:
            # The job exists already; a client has changed the schedule since.
            earlier = await self._find(schedule.tenant, schedule.key_of(time))
            return "" if earlier is None else earlier.id, ""
        except InvalidArgument as err:
            log.error(
                "cannot create the job of schedule %(schedule)s of tenant %(tenant)r: %(error)s",
                {
                    "event": "schedule.job_not_created",
                    "schedule": schedule.name,
                    "tenant": schedule.tenant,
                    "error": err,
                },
            )
            return "", f"its job could not be created at {label_of(time)}: {err.message}"

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
        unset: dict[str, str] = {}
        # A time that is skipped because its firing failed is no success.
        if schedule.tries and time is not None:
            unset |= {"tries": "", "try_again_at": ""}
        if next_at is None:
            unset["next_at"] = ""
        else:
            done["next_at"] = next_at
        if unset:
            update["$unset"] = unset
        with translated("advancing a schedule"):
            written = await self._schedules.find_one_and_update(as_planned, update, return_document=True)
        if written is not None:
            self.fired += bool(job)
            self.skipped += bool(skip)
        return None if written is None else schedule_of(written)


def submit_of(schedule: Schedule, time: datetime) -> pb.SubmitRequest:
    """Return the submit of a time's job. All leaders create the same bytes."""
    submit = pb.SubmitRequest.FromString(schedule.template)
    submit.tenant = schedule.tenant
    submit.idempotency_key = schedule.key_of(time)
    submit.labels[NAME_LABEL] = schedule.name
    submit.labels[TIME_LABEL] = label_of(time)
    return submit
