"""`client.jobs.schedules`: jobs that recur."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from shoal.client.inference.requests import Asker
from shoal.client.jobs.job import JobRequest, to_submit
from shoal.client.models.registry import of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest

TIMEOUT_S = 10.0

Misfire: TypeAlias = Literal["skip", "latest", "all"]
Overlap: TypeAlias = Literal["allow", "skip", "cancel"]
MISFIRES = ("skip", "latest", "all")
OVERLAPS = ("allow", "skip", "cancel")


@dataclass(frozen=True)
class Schedule:
    """Jobs that recur, as it stood when the node was asked."""

    name: str
    cron: str
    time_zone: str
    tenant: str = ""
    model_name: str = ""
    """Empty in lists."""
    misfire: str = "skip"
    overlap: str = "allow"
    paused: bool = False
    upcoming: tuple[datetime, ...] = ()
    """The next times, soonest first; none while it is paused."""
    last_at: datetime | None = None
    """The last time that became a job."""
    last_job_id: str = ""
    fired: int = 0
    """Times that became jobs."""
    skipped: int = 0
    """How often times were skipped."""
    last_skip: str = ""
    """Why the last time."""
    created_at: datetime | None = None
    updated_at: datetime | None = None


class AsyncSchedules:
    """Makes, reads, pauses and removes schedules."""

    def __init__(self, caller: Caller, tenant: str) -> None:
        self._caller = caller
        self._tenant = tenant

    async def put(
        self,
        name: str,
        cron: str,
        job: JobRequest,
        *,
        time_zone: str = "UTC",
        misfire: Misfire = "skip",
        overlap: Overlap = "allow",
        paused: bool = False,
        replace: bool = False,
        timeout: float = TIMEOUT_S,
    ) -> Schedule:
        """Makes a schedule: at each time of `cron` in `time_zone`, `job` is submitted once.

        `misfire` says what is done about times at which the node was away (`skip` them, one job for the `latest`, or
        for `all`), `overlap` what when the job before has not ended (`allow`, `skip` this time, or `cancel` that job).
        With `replace` a schedule of that name is changed.

        Raises:
            InvalidArgument: names what is wrong.
            AlreadyExists: there is one of that name.
        """
        submit = to_submit(job, await Asker(self._caller).message(job), key=job.idempotency_key, tenant=self._tenant)
        message = ingest.Schedule(
            name=name,
            tenant=submit.tenant,
            cron=cron,
            time_zone=time_zone,
            job=submit,
            misfire=f"MISFIRE_POLICY_{_one_of('misfire', misfire, MISFIRES)}",
            overlap=f"OVERLAP_POLICY_{_one_of('overlap', overlap, OVERLAPS)}",
            paused=paused,
        )
        request = ingest.PutScheduleRequest(schedule=message, replace=replace)
        return _schedule((await self._caller.call(methods.PUT_SCHEDULE, request, timeout_s=timeout)).schedule)

    async def get(self, name: str, *, tenant: str = "", timeout: float = TIMEOUT_S) -> Schedule:
        """One schedule.

        Raises:
            NotFound: there is none.
        """
        request = ingest.GetScheduleRequest(name=name, tenant=tenant or self._tenant)
        return _schedule((await self._caller.call(methods.GET_SCHEDULE, request, timeout_s=timeout)).schedule)

    async def list(self, *, tenant: str | None = None, timeout: float = TIMEOUT_S) -> builtins.list[Schedule]:
        """All schedules, by tenant and name; those of one tenant, when it is given or the client has one."""
        request = ingest.ListSchedulesRequest(tenant=tenant if tenant is not None else self._tenant or None)
        answer = await self._caller.call(methods.LIST_SCHEDULES, request, timeout_s=timeout)
        return [_schedule(one) for one in answer.schedules]

    async def pause(self, name: str, *, tenant: str = "", timeout: float = TIMEOUT_S) -> Schedule:
        """Pauses a schedule. What falls into the pause is skipped.

        Raises:
            NotFound: there is none.
        """
        return await self._pause(name, tenant, False, timeout)

    async def resume(self, name: str, *, tenant: str = "", timeout: float = TIMEOUT_S) -> Schedule:
        """Has a schedule go on, from now.

        Raises:
            NotFound: there is none.
        """
        return await self._pause(name, tenant, True, timeout)

    async def remove(self, name: str, *, tenant: str = "", timeout: float = TIMEOUT_S) -> Schedule:
        """Removes a schedule. Jobs that it has made stay.

        Raises:
            NotFound: there is none.
        """
        request = ingest.RemoveScheduleRequest(name=name, tenant=tenant or self._tenant)
        return _schedule((await self._caller.call(methods.REMOVE_SCHEDULE, request, timeout_s=timeout)).schedule)

    async def _pause(self, name: str, tenant: str, resume: bool, timeout: float) -> Schedule:
        request = ingest.PauseScheduleRequest(name=name, tenant=tenant or self._tenant, resume=resume)
        return _schedule((await self._caller.call(methods.PAUSE_SCHEDULE, request, timeout_s=timeout)).schedule)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InvalidArgument(f"{what} {value!r}: use one of {', '.join(known)}")
    return value.upper()


def _schedule(message: ingest.Schedule) -> Schedule:
    return Schedule(
        name=message.name,
        cron=message.cron,
        time_zone=message.time_zone,
        tenant=message.tenant,
        model_name=message.job.request.model_name,
        misfire=ingest.MisfirePolicy.Name(message.misfire).removeprefix("MISFIRE_POLICY_").lower(),
        overlap=ingest.OverlapPolicy.Name(message.overlap).removeprefix("OVERLAP_POLICY_").lower(),
        paused=message.paused,
        upcoming=tuple(map(_moment, message.upcoming)),
        last_at=of_time(message, "last_at"),
        last_job_id=message.last_job_id,
        fired=message.fired,
        skipped=message.skipped,
        last_skip=message.last_skip,
        created_at=of_time(message, "created_at"),
        updated_at=of_time(message, "updated_at"),
    )


def _moment(time: Timestamp) -> datetime:
    return time.ToDatetime(UTC)
