"""`client.jobs.schedules`: schedules of recurring jobs."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from shoal.client.inference.requests import RequestEncoder
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
    """Snapshot of a schedule at the time of the call."""

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
    """The next times, soonest first; empty while the schedule is paused."""
    last_at: datetime | None = None
    """The last time for which a job was created."""
    last_job_id: str = ""
    fired: int = 0
    """Number of times for which a job was created."""
    skipped: int = 0
    """Number of skipped times."""
    last_skip: str = ""
    """Reason of the last skip."""
    created_at: datetime | None = None
    updated_at: datetime | None = None


class AsyncSchedules:
    """Client of the schedules: create, read, pause and remove."""

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
        timeout: float | None = TIMEOUT_S,
    ) -> Schedule:
        """Create a schedule: at each time of `cron` in `time_zone`, `job` is submitted once.

        `misfire` covers times at which the node was down: `skip` them, one job for the `latest`, or one for `all`.
        `overlap` covers a previous job that has not ended: `allow` both, `skip` this time, or `cancel` that job.
        With `replace`, an existing schedule of that name is changed.

        Raises:
            InvalidArgument: the message names the field.
            AlreadyExists: a schedule of that name exists, and `replace` is False.
        """
        deadline = self._caller.deadline(timeout)
        encoded = await RequestEncoder(self._caller).encode(job, deadline)
        submit = to_submit(job, encoded, key=job.idempotency_key, tenant=self._tenant)
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
        return _schedule((await self._caller.call(methods.PUT_SCHEDULE, request, timeout_s=deadline)).schedule)

    async def get(self, name: str, *, tenant: str = "", timeout: float | None = TIMEOUT_S) -> Schedule:
        """Return one schedule.

        Raises:
            NotFound: no such schedule.
        """
        request = ingest.GetScheduleRequest(name=name, tenant=tenant or self._tenant)
        return _schedule((await self._caller.call(methods.GET_SCHEDULE, request, timeout_s=timeout)).schedule)

    async def list(self, *, tenant: str | None = None, timeout: float | None = TIMEOUT_S) -> builtins.list[Schedule]:
        """Return all schedules, ordered by tenant and name; only one tenant's when it is set here or in the client."""
        request = ingest.ListSchedulesRequest(tenant=tenant if tenant is not None else self._tenant or None)
        response = await self._caller.call(methods.LIST_SCHEDULES, request, timeout_s=timeout)
        return [_schedule(one) for one in response.schedules]

    async def pause(self, name: str, *, tenant: str = "", timeout: float | None = TIMEOUT_S) -> Schedule:
        """Pause a schedule. Times within the pause are skipped.

        Raises:
            NotFound: no such schedule.
        """
        return await self._pause(name, tenant, False, timeout)

    async def resume(self, name: str, *, tenant: str = "", timeout: float | None = TIMEOUT_S) -> Schedule:
        """Resume a paused schedule, from now on.

        Raises:
            NotFound: no such schedule.
        """
        return await self._pause(name, tenant, True, timeout)

    async def remove(self, name: str, *, tenant: str = "", timeout: float | None = TIMEOUT_S) -> Schedule:
        """Remove a schedule. Its jobs stay.

        Raises:
            NotFound: no such schedule.
        """
        request = ingest.RemoveScheduleRequest(name=name, tenant=tenant or self._tenant)
        return _schedule((await self._caller.call(methods.REMOVE_SCHEDULE, request, timeout_s=timeout)).schedule)

    async def _pause(self, name: str, tenant: str, resume: bool, timeout: float | None) -> Schedule:
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
