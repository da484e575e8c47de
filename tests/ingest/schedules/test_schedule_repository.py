"""Calls about single schedules: in turn by tenant. No tenant takes the places of all schedules."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document
from services.ingest.schedules import schedule_repository
from services.ingest.schedules.documents import document_of
from services.ingest.schedules.schedule_repository import CALLS_AT_ONCE, ScheduleRepository
from shoal.errors import NotFound, ResourceExhausted
from tests.breakable import PATIENCE_S, until
from tests.ingest.making import TestClock
from tests.ingest.schedules.test_firing import schedule, schedules

__all__ = ["schedules"]


class Reads:
    """A collection whose reads wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.ids: list[str] = []

    async def find_one(self, query: Document) -> None:
        self.ids.append(query["_id"])
        await self.may_end.wait()


async def test_many_reads_of_one_tenant_leave_room(clock: TestClock) -> None:
    reads = Reads()
    repository = ScheduleRepository(cast(Any, reads), clock)
    many = [asyncio.create_task(repository.get("many", f"s{n}")) for n in range(200)]
    await until(lambda: len(reads.ids) > 1, "they read")
    other = asyncio.create_task(repository.get("other", "s"))
    await until(lambda: any("other" in each for each in reads.ids), "the other tenant reads")
    assert sum("many" in each for each in reads.ids) == CALLS_AT_ONCE * 2 // 3
    reads.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        outcomes = await asyncio.gather(*many, other, return_exceptions=True)
    assert all(isinstance(each, NotFound) for each in outcomes)


async def test_one_tenant_leaves_places_for_schedules_of_others(
    schedules: AsyncCollection[Document], clock: TestClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_repository, "MOST", 30)
    repository = ScheduleRepository(schedules, clock)
    await schedules.insert_many([document_of(schedule("many", n)) for n in range(20)])
    with pytest.raises(ResourceExhausted) as refused:
        await repository.put(schedule("many", 20), replaces=True)
    assert refused.value.message == (
        "tenant 'many' has 20 schedules, and the 10 that may be added are for others: remove some"
    )
    # Those that it has can be changed.
    await repository.put(schedule("many", 7, cron="0 3 * * *"), replaces=True)
    for n in range(3):
        await repository.put(schedule("other", n), replaces=False)
    assert await schedules.count_documents({"tenant": "other"}) == 3
