"""A list of many schedules: other work goes on meanwhile."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, cast

import pytest

from mesh.rpc.tenant_scope import Scopes
from services.ingest.schedules import rpc
from services.ingest.schedules.schedule import Schedule
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import PATIENCE_S
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
