"""A wrong clock does not empty the store: retention goes by the time that has certainly passed, until confirmed."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mesh.removal_guard import MARKS, REST
from services.store.retention.expired_share import ExpiredShare
from services.store.retention.rounds import RetentionRounds
from tests.removal_guards import guard_of
from tests.store.retention.test_sweep import DAY, HOUR, RESULTS, START, TOMBSTONES, World, threads, world

pytestmark = pytest.mark.mongo
__all__ = ["threads", "world"]


class Leader:
    is_held = True
    token = 1


def rounds(world: World, steady: list[timedelta]) -> RetentionRounds:
    share = ExpiredShare(world.collections, world.book)
    guard = guard_of(world.collections.db[MARKS], "results", share, world.clock, lambda: steady[0])
    sweep = world.another(removal_clock=guard)
    return RetentionRounds(sweep, Leader(), 60, check=guard.check)  # type: ignore[arg-type]


async def test_a_year_ahead_removes_nothing_until_a_rule_is_set(world: World) -> None:
    await world.rule(RESULTS, 7 * DAY)
    for number in range(4):
        await world.put(f"j{number}", number * HOUR)
    await world.put("old", -8 * DAY)
    world.clock.now, steady = START + 4 * HOUR, [timedelta(0)]
    running = rounds(world, steady)
    await running._round()
    assert await world.jobs() == ["j0", "j1", "j2", "j3"]
    world.clock.now += 365 * DAY
    for _ in range(3):
        steady[0] += REST
        world.clock.now += REST
        await running._round()
    assert await world.jobs() == ["j0", "j1", "j2", "j3"]
    await world.rule(RESULTS, 7 * DAY)
    await running._round()
    assert await world.jobs() == []


async def test_the_share_is_that_of_the_kind_that_loses_most(world: World) -> None:
    await world.rule(RESULTS, HOUR)
    for number in range(8):
        await world.put(f"old{number}", -2 * HOUR)
    await world.applied()
    await world.put("young")
    await world.rule(RESULTS, HOUR, "kept")
    await world.put("other", tenant="kept")
    await world.rule(TOMBSTONES, 2 * DAY)
    share = ExpiredShare(world.collections, world.book)
    assert await share.newest() == START
    # Eight tombstones, and two results.
    assert await share.share(START + HOUR / 2) == 0
    assert await share.share(START + 2 * HOUR) == 1
    await world.rule(RESULTS, None, "kept")
    assert await share.share(START + 2 * HOUR) == 0.5
    assert await share.share(START + 3 * DAY) == 1
