"""Slots of queries: bounded, shared by tenants, in turn, and free after every way in which a query can end."""

from __future__ import annotations

import asyncio

from services.store.results.query_slots import QuerySlots
from tests.breakable import PATIENCE_S


class Queries:
    """Queries that run until they are told to end."""

    def __init__(self, slots: QuerySlots) -> None:
        self._slots = slots
        self.began: list[str] = []
        self.running: dict[str, list[asyncio.Event]] = {}

    def start(self, tenant: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._query(tenant))

    async def _query(self, tenant: str) -> None:
        async with self._slots.take(tenant):
            self.began.append(tenant)
            may_end = asyncio.Event()
            self.running.setdefault(tenant, []).append(may_end)
            await may_end.wait()

    async def end(self, tenant: str) -> None:
        self.running[tenant].pop(0).set()
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_tenant_leaves_slots_and_tenants_take_turns() -> None:
    queries = Queries(slots := QuerySlots(16))
    tasks = [queries.start("a") for _ in range(30)]
    await settled()
    assert (queries.began.count("a"), slots.held) == (10, 10)
    tasks += [queries.start(tenant) for tenant in "bcdefg"]
    await settled()
    assert queries.began[10:] == list("bcdefg")
    assert slots.held == 16
    tasks += [queries.start(tenant) for tenant in "aah"]
    for _ in range(8):
        await queries.end("a")
    # One that holds less than its part goes first.
    assert queries.began[16] == "h"
    while any(queries.running.values()):
        for tenant in [name for name, events in queries.running.items() if events]:
            await queries.end(tenant)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)
    assert slots.held == 0
    assert queries.began.count("a") == 32


async def test_a_cancelled_query_gives_its_slot_or_its_turn_back() -> None:
    queries = Queries(slots := QuerySlots(3))
    running = [queries.start("a"), queries.start("b")]
    await settled()
    waiting = [queries.start("a") for _ in range(3)]
    await settled()
    waiting[0].cancel()
    await queries.end("b")
    # Its turn comes in the same moment as its cancellation.
    waiting[1].cancel()
    await settled()
    for task in (*running, *waiting):
        task.cancel()
    await asyncio.gather(*running, *waiting, return_exceptions=True)
    assert slots.held == 0
    async with asyncio.timeout(PATIENCE_S), slots.take("a"):
        assert slots.held == 1
