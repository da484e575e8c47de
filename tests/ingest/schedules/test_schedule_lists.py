"""A list of many schedules: other work goes on meanwhile."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, cast

import pytest

from mesh.rpc.tenant_scope import Scopes
from services.ingest.schedules import rpc
from services.ingest.schedules.schedule import Schedule
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import PATIENCE_S, until
from tests.ingest.schedules.test_plan import NOON, schedule

MANY = 300


class Kept:
    """Schedules, without MongoDB."""

    def now(self) -> datetime:
        return NOON

    async def list(self, tenant: str | None) -> list[Schedule]:
        return [schedule(name=f"s{n}") for n in range(MANY)]


class NoContext:
    def invocation_metadata(self) -> None:
        return None


async def test_lists_of_schedules_take_turns_with_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    served = rpc.SchedulesRpc(cast(Any, Kept()), Scopes("shoal.ingest.v1.IngestService"))
    order: list[str] = []
    made = rpc.message_of
    monkeypatch.setattr(rpc, "message_of", lambda *given, **more: (order.append("s"), made(*given, **more))[1])

    async def bystander() -> None:
        while True:
            order.append(" ")
            await asyncio.sleep(0)

    other = asyncio.create_task(bystander())
    async with asyncio.timeout(PATIENCE_S):
        lists = (served.ListSchedules(pb.ListSchedulesRequest(), cast(Any, NoContext())) for _ in range(3))
        found = await asyncio.gather(*lists)
    other.cancel()
    assert [len(each.schedules) for each in found] == [MANY] * 3
    # Two of one list, and the first two of one that begins.
    assert max(map(len, "".join(order).split())) <= 4


async def test_a_list_of_schedules_goes_on_when_its_client_leaves() -> None:
    events: list[str] = []
    may_end = asyncio.Event()

    class Slow(Kept):
        async def list(self, tenant: str | None) -> list[Schedule]:
            events.append("begins")
            await may_end.wait()
            events.append("ends")
            return []

    served = rpc.SchedulesRpc(cast(Any, Slow()), Scopes("shoal.ingest.v1.IngestService"))
    call = asyncio.create_task(served.ListSchedules(pb.ListSchedulesRequest(), cast(Any, NoContext())))
    await until(lambda: bool(events), "it is read")
    call.cancel()
    may_end.set()
    await asyncio.wait([call])
    assert call.cancelled()
    assert events == ["begins", "ends"]


async def test_searches_for_times_take_turns_with_other_work_and_by_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def refused(message: pb.Schedule, *more: object) -> Schedule:
        order.append(message.tenant)
        raise InvalidArgument("cron: no next time")

    monkeypatch.setattr(rpc, "schedule_of", refused)
    served = rpc.SchedulesRpc(cast(Any, Kept()), Scopes("shoal.ingest.v1.IngestService"))

    async def bystander() -> None:
        while True:
            order.append(" ")
            await asyncio.sleep(0)

    other = asyncio.create_task(bystander())
    requests = [pb.PutScheduleRequest(schedule={"tenant": tenant}) for tenant in ("m",) * 50 + ("o",)]
    async with asyncio.timeout(PATIENCE_S):
        puts = (served.PutSchedule(request, cast(Any, NoContext())) for request in requests)
        found = await asyncio.gather(*puts, return_exceptions=True)
    other.cancel()
    assert {type(each) for each in found} == {InvalidArgument}
    runs = "".join(order).split()
    assert max(map(len, runs)) == 1
    assert runs.index("o") <= 2
