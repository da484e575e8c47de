"""Budgets, windows, backlog: what bounds memory, and lets the right ones through."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from services.ingest.intake.backlog import JobBacklog
from services.ingest.intake.budget import Budget
from services.ingest.intake.stream import Window
from shoal.errors import ResourceExhausted


async def test_a_budget_lets_wait_in_order() -> None:
    budget = Budget(100)
    order: list[str] = []

    async def wait(name: str, nbytes: int) -> None:
        async with budget.of(nbytes):
            order.append(name)

    async with budget.of(80):
        large = asyncio.create_task(wait("large", 90))
        small = asyncio.create_task(wait("small", 10))
        await asyncio.sleep(0)
        assert order == []  # The small one would fit, but came later.
    await asyncio.gather(large, small)
    assert order == ["large", "small"]
    assert budget.used == 0


async def test_a_budget_gives_back_what_a_cancelled_waiter_was_given() -> None:
    budget = Budget(100)

    async def wait(nbytes: int) -> None:
        async with budget.of(nbytes):
            pass

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(budget.of(100))
        waiters = [asyncio.create_task(wait(60)) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[1].cancel()
    waiters[0].cancel()  # Its turn has come, and it does not know yet.
    await asyncio.wait(waiters)
    assert waiters[2].exception() is None
    assert budget.used == 0


async def test_more_than_everything_passes_alone() -> None:
    budget = Budget(100)
    async with budget.of(1_000):
        small = asyncio.create_task(budget.wait_for(1))
        await asyncio.sleep(0)
        assert not small.done()
    await small


async def test_a_full_window_stops_its_reader() -> None:
    window = Window(items=2, nbytes=100)
    await window.enter(90)
    second = asyncio.create_task(window.enter(20))
    await asyncio.sleep(0)
    assert not second.done()
    window.leave(90)
    await second
    await window.enter(20)
    third = asyncio.create_task(window.enter(1))
    await asyncio.sleep(0)
    assert not third.done()
    window.leave(20)
    await third


async def test_the_backlog_is_counted_now_and_then_and_kept_up_in_between() -> None:
    backlog = JobBacklog(10)

    async def count(limit: int) -> int:
        assert limit == 11
        return 8

    assert await backlog.recount(count) >= 1.0
    backlog.added(1)
    backlog.admit()
    backlog.added(1)
    with pytest.raises(ResourceExhausted, match="10 jobs are queued already and the limit is 10") as refused:
        backlog.admit()
    assert refused.value.retry_after_ms
    backlog.removed(100)
    backlog.admit()
    assert backlog.estimate == 0
