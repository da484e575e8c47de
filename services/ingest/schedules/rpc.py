"""RPC methods for schedules: translation between messages and `ScheduleRepository`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

from mesh.process.pauses import Pauses
from mesh.process.tasks import uninterrupted
from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes
from mesh.rpc.tenant_turns import TenantTurns
from services.ingest.job_access import checked_caller
from services.ingest.messages import timestamp_of
from services.ingest.schedules import cron
from services.ingest.schedules.schedule import Misfire, Overlap, Schedule
from services.ingest.schedules.schedule_repository import ScheduleRepository
from services.ingest.schedules.validation import checked_name, schedule_of
from shoal.ingest.v1 import ingest_pb2 as pb

_UPCOMING = 5
# Lists of up to 10,000 schedules.
_LISTS_AT_ONCE = 4
# The next time of a rare expression takes a millisecond to find.
_PAUSED_AFTER = 2
MISFIRES = {each: f"MISFIRE_POLICY_{each.name}" for each in Misfire}
OVERLAPS = {each: f"OVERLAP_POLICY_{each.name}" for each in Overlap}


class SchedulesRpc:
    """Mixin of the servicer with the methods for schedules."""

    def __init__(self, schedules: ScheduleRepository, scopes: Scopes) -> None:
        self._schedules = schedules
        self._scopes = scopes
        self._lists = TenantTurns(_LISTS_AT_ONCE, leaves_room=True)
        self._pauses = Pauses()
        self._searches = TenantTurns(1)

    async def PutSchedule(self, request: pb.PutScheduleRequest, context: Context) -> pb.PutScheduleResponse:
        scope = self._scopes.of(context, "PutSchedule")
        request.schedule.tenant = scope.owner("schedule.tenant", request.schedule.tenant)
        caller = checked_caller(scope, request.schedule.job.request.model_name)
        async with self._search(request.schedule.tenant):
            requested = schedule_of(request.schedule, self._schedules.now(), caller)
        schedule = await self._schedules.put(requested, replaces=request.replace)
        return pb.PutScheduleResponse(schedule=await self._schedule_message(schedule))

    async def GetSchedule(self, request: pb.GetScheduleRequest, context: Context) -> pb.GetScheduleResponse:
        tenant = self._scopes.of(context, "GetSchedule").owner("tenant", request.tenant)
        schedule = await self._schedules.get(tenant, checked_name(request.name))
        return pb.GetScheduleResponse(schedule=await self._schedule_message(schedule))

    async def ListSchedules(self, request: pb.ListSchedulesRequest, context: Context) -> pb.ListSchedulesResponse:
        scope = self._scopes.of(context, "ListSchedules")
        # Of a caller with a tenant, an unset tenant is its own.
        every = not request.HasField("tenant") and scope.tenant is None
        tenant = None if every else scope.owner("tenant", request.tenant)
        response = pb.ListSchedulesResponse()
        async with self._lists.take(tenant or ""):
            schedules = await uninterrupted(self._schedules.list(tenant))
            async for each in self._pauses.each(schedules, every=_PAUSED_AFTER):
                response.schedules.append(message_of(each, self._schedules.now(), upcoming=1))
        return response

    async def PauseSchedule(self, request: pb.PauseScheduleRequest, context: Context) -> pb.PauseScheduleResponse:
        tenant = self._scopes.of(context, "PauseSchedule").owner("tenant", request.tenant)
        schedule = await self._schedules.pause(tenant, checked_name(request.name), not request.resume)
        return pb.PauseScheduleResponse(schedule=await self._schedule_message(schedule))

    async def RemoveSchedule(self, request: pb.RemoveScheduleRequest, context: Context) -> pb.RemoveScheduleResponse:
        tenant = self._scopes.of(context, "RemoveSchedule").owner("tenant", request.tenant)
        schedule = await self._schedules.remove(tenant, checked_name(request.name))
        return pb.RemoveScheduleResponse(schedule=await self._schedule_message(schedule))

    async def _schedule_message(self, schedule: Schedule) -> pb.Schedule:
        async with self._search(schedule.tenant):
            return message_of(schedule, self._schedules.now())

    @asynccontextmanager
    async def _search(self, tenant: str) -> AsyncIterator[None]:
        """Search for times in the block: one call does in an iteration of the event loop, and tenants take turns.

        The times of a rare expression take some milliseconds.
        """
        async with self._searches.take(tenant):
            await asyncio.sleep(0)
            yield


def message_of(schedule: Schedule, now: datetime, upcoming: int = _UPCOMING) -> pb.Schedule:
    """Return the message of a schedule, with up to `upcoming` next times."""
    message = pb.Schedule(
        name=schedule.name,
        tenant=schedule.tenant,
        cron=schedule.cron,
        time_zone=schedule.zone,
        misfire=MISFIRES[schedule.misfire],
        overlap=OVERLAPS[schedule.overlap],
        paused=schedule.is_paused,
        last_job_id=schedule.last_job,
        fired=schedule.fired,
        skipped=schedule.skipped,
        last_skip=schedule.last_skip,
        created_at=timestamp_of(schedule.created_at),
        updated_at=timestamp_of(schedule.updated_at),
    )
    if schedule.template:
        message.job.MergeFromString(schedule.template)
    if schedule.last_at is not None:
        message.last_at.CopyFrom(timestamp_of(schedule.last_at))
    if schedule.next_at is not None:
        zone = cron.zone_of(schedule.zone)
        later = cron.upcoming(schedule.cron, zone, max(now, schedule.next_at), upcoming - 1) if upcoming > 1 else []
        message.upcoming.extend(map(timestamp_of, [schedule.next_at, *later]))
    return message
