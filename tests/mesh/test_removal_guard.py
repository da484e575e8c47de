"""The guard of removal: a clock that jumps forward removes nothing that is not certainly old, unless confirmed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, connect, ensure_collection
from mesh.removal_guard import MARK_VALIDATOR, MARKS, REST, RemovalGuard
from tests.removal_guards import guard_of

pytestmark = pytest.mark.mongo

START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE, HOUR, YEAR = timedelta(minutes=1), timedelta(hours=1), timedelta(days=365)


class Removal:
    """Stored data, as a test sets it."""

    def __init__(self) -> None:
        self.newest_at: datetime | None = None
        self.expired = 1.0
        self.version = "1"

    async def newest(self) -> datetime | None:
        return self.newest_at

    async def share(self, now: datetime) -> float:
        return self.expired

    async def rules_version(self) -> str:
        return self.version


class World:
    """True time, a wall clock that may be wrong, and guards of several processes."""

    def __init__(self, marks: AsyncCollection[Document]) -> None:
        self.passed = timedelta(0)
        self.wrong = timedelta(0)
        self.removal = Removal()
        self.marks = marks
        self.guard = self.started()

    def started(self) -> RemovalGuard:
        """The guard of a process that starts now."""
        return guard_of(self.marks, "results", self.removal, lambda: self.true + self.wrong, lambda: self.passed)

    @property
    def true(self) -> datetime:
        return START + self.passed

    async def round(self, after: timedelta = MINUTE) -> datetime:
        self.passed += after
        await self.guard.check()
        return self.guard()


@pytest.fixture
async def world(mongo_uri: str, mongo_database: str) -> AsyncIterator[World]:
    async with connect(mongo_uri) as client:
        yield World(await ensure_collection(client[mongo_database], MARKS, validator=MARK_VALIDATOR, indexes=[]))


async def test_removal_goes_by_a_clock_that_is_right(world: World) -> None:
    for after in (MINUTE, MINUTE, HOUR):
        assert await world.round(after) == world.true


async def test_removal_goes_by_the_certain_time_while_a_clock_is_wrong_and_by_the_clock_when_it_is_right(
    world: World,
) -> None:
    await world.round()
    world.wrong = YEAR
    await world.round()
    # It may be corrected yet, and nothing is asked.
    assert not world.guard.is_stopped
    for _ in range(30):
        assert await world.round() == world.true
    assert world.guard.is_stopped
    world.wrong = timedelta(0)
    assert await world.round() == world.true


async def test_a_restart_does_not_make_a_wrong_time_the_right_one(world: World) -> None:
    await world.round()
    world.wrong = YEAR
    for _ in range(3):
        world.guard = world.started()
        # Recorded by the wrong clock.
        world.removal.newest_at = world.true + world.wrong
        assert await world.round() <= world.true


async def test_a_machine_that_boots_with_a_wrong_clock_for_the_first_time_goes_by_its_newest_document(
    world: World,
) -> None:
    world.removal.newest_at, world.wrong = START - HOUR, YEAR
    assert await world.round(timedelta(0)) == START - HOUR
    world.removal.newest_at = START + YEAR
    world.guard = world.started()
    assert await world.round() < world.true


async def test_a_long_stop_is_taken_for_one_when_little_is_old(world: World) -> None:
    await world.round()
    world.passed += 10 * HOUR
    world.guard, world.removal.expired = world.started(), 0.2
    assert await world.round() < world.true - 9 * HOUR
    await world.round(REST)
    assert await world.round() == world.true


async def test_a_large_share_waits_until_a_rule_is_set(world: World) -> None:
    await world.round()
    world.passed += 10 * HOUR
    world.guard = world.started()
    for _ in range(3):
        assert await world.round(REST) < world.true - 9 * HOUR
    assert world.guard.is_stopped
    # Another instance leads from now on, and an operator answers the question of the first.
    world.guard = world.started()
    await world.round()
    assert world.guard.is_stopped
    world.removal.version = "2"
    await world.round(REST)
    assert await world.round() == world.true
    assert not world.guard.is_stopped


async def test_one_confirmation_counts_for_all_processes(world: World) -> None:
    await world.round()
    world.wrong = 10 * HOUR
    one, other = world.guard, world.started()
    for guard in (one, other, one, other):
        world.guard = guard
        await world.round(REST)
    world.removal.version = "2"
    world.guard = other
    await world.round()
    assert await world.round() == world.true + 10 * HOUR
    world.guard = one
    assert await world.round() == world.true + 10 * HOUR


async def test_a_clock_that_is_set_back_removes_less(world: World) -> None:
    await world.round()
    world.wrong = -HOUR
    assert await world.round() == world.true - HOUR
