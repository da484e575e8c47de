"""The time that instances share: whatever their machines' clocks say, and whenever MongoDB's is put forward or back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import AutoReconnect

from mesh.mongo_clock import DatabaseClock, earliest, latest, utc_now
from services.ingest.dispatch.claims import Claims
from services.ingest.documents import document_of
from services.ingest.mongo_jobs import MongoJobs
from shoal.errors import Unavailable
from tests.ingest.making import instance, job

NS = 10**9
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LEASE_S, RENEW_S, RECOVERY_S, SYNC_S = 5.0, 5 / 3, 0.5, 10.0


class Primary:
    """MongoDB's clock, and the machines' steady ones, which need not begin at the same time; all under control."""

    def __init__(self, offset_s: float = 0.0) -> None:
        self.true_s, self.offset_s = 1_000_000.0, offset_s
        self.away = False
        self.takes_s = 0.0
        self.client = self
        self.admin = self

    async def command(self, name: str) -> dict[str, Any]:
        assert name == "hello"
        if self.away:
            raise AutoReconnect("away")
        self.true_s += self.takes_s / 2
        told_s = self.true_s + self.offset_s
        self.true_s += self.takes_s / 2
        return {"localTime": EPOCH + timedelta(milliseconds=int(told_s * 1000 + 1e-6))}

    def clock(self, *, wall_s: float = 0.0, booted_s: float = 0.0) -> DatabaseClock:
        """Of a machine whose wall clock is so far ahead of the truth."""
        return DatabaseClock(
            cast("AsyncDatabase[dict[str, Any]]", self),
            wall_ns=lambda: round((self.true_s + wall_s) * NS),
            steady_ns=lambda: round((self.true_s - booted_s) * NS),
        )

    def off_s(self, moment: datetime) -> float:
        """How far `moment` is ahead of MongoDB's clock."""
        return (moment - EPOCH).total_seconds() - (self.true_s + self.offset_s)


@pytest.mark.parametrize("wall_s", [0.0, 0.3, -0.3, 3600.0, -86_400.0])
async def test_whatever_the_machine_says_it_is_mongodbs_time(wall_s: float) -> None:
    primary = Primary()
    clock = primary.clock(wall_s=wall_s, booted_s=500_000.0)
    assert primary.off_s(clock()) == pytest.approx(wall_s, abs=0.002)
    await clock.synchronize()
    for moment in (clock(), clock.earliest(), clock.latest()):
        assert primary.off_s(moment) == pytest.approx(0, abs=0.002)


async def test_the_time_of_a_machine_that_is_right_never_moves() -> None:
    primary = Primary()
    clock = primary.clock()
    for takes_s in (0.0, 0.0004, 0.01, 1.3):
        primary.takes_s = takes_s
        await clock.synchronize()
        assert clock() == EPOCH + timedelta(milliseconds=int(primary.true_s * 1000 + 1e-6))
        primary.true_s += 7.77


async def test_a_slow_answer_proves_no_more_than_it_can() -> None:
    primary = Primary(offset_s=1.0)
    primary.takes_s = 0.8
    clock = primary.clock()
    await clock.synchronize()
    assert -0.8 <= primary.off_s(clock()) <= 0.8


async def test_without_an_answer_the_time_goes_on() -> None:
    primary = Primary(offset_s=20.0)
    clock = primary.clock()
    await clock.synchronize()
    primary.away = True
    primary.true_s += 100
    with pytest.raises(Unavailable, match="reading MongoDB's time"):
        await clock.synchronize()
    assert primary.off_s(clock()) == pytest.approx(0, abs=0.002)


async def test_that_a_clock_is_wrong_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    primary = Primary()
    clock = primary.clock(wall_s=12.0)
    for _ in range(5):
        await clock.synchronize()
        primary.true_s += 10
    (told,) = caplog.messages
    assert told == "this machine's clock is 12.0 s ahead of MongoDB's, which Shoal uses: correct this machine's clock"
    primary.offset_s = 12.0
    await clock.synchronize()
    assert caplog.messages[1:] == [
        "MongoDB's clock was set forward by 12.0 s",
        "this machine's clock and MongoDB's agree again",
    ]


async def test_while_clocks_settle_a_lease_is_given_for_longer_and_lapses_later() -> None:
    primary = Primary()
    clock = primary.clock()
    await clock.synchronize()
    primary.offset_s = -600.0
    await clock.synchronize()
    assert primary.off_s(clock()) == pytest.approx(0, abs=0.002)
    assert primary.off_s(earliest(clock)) == pytest.approx(0, abs=0.002)
    assert primary.off_s(latest(clock)) == pytest.approx(60, abs=0.002)  # And not ten minutes.
    primary.true_s += 60
    assert clock() == earliest(clock) == latest(clock)
    primary.offset_s = 0.0
    await clock.synchronize()
    assert primary.off_s(earliest(clock)) == pytest.approx(-600, abs=0.002)
    assert clock() == latest(clock)


jumps = st.lists(
    st.tuples(st.floats(0, 80), st.floats(-50, 50)), min_size=1, max_size=2, unique_by=lambda jump: round(jump[0])
)


@given(
    jumps=jumps,
    phases=st.tuples(st.floats(0, SYNC_S), st.floats(0, SYNC_S)),
    walls=st.tuples(*[st.floats(-99, 99)] * 2),
)
@example(jumps=[(20.0, 30.0)], phases=(9.9, 0.1), walls=(0.0, 0.0))
@example(jumps=[(20.0, -30.0)], phases=(0.1, 9.9), walls=(0.0, 0.0))
async def test_no_living_holder_is_taken_for_dead(
    jumps: list[tuple[float, float]], phases: tuple[float, float], walls: tuple[float, float]
) -> None:
    """One instance renews a lease, another looks whether it has lapsed; MongoDB's clock jumps now and then."""
    if len(jumps) == 2 and abs(jumps[0][0] - jumps[1][0]) < 40:
        jumps = jumps[:1]  # Until the clocks have settled, what another jump does is not promised.
    primary = Primary()
    start = primary.true_s
    holder, other = (primary.clock(wall_s=wall_s) for wall_s in walls)
    await holder.synchronize()
    await other.synchronize()
    ends = latest(holder) + timedelta(seconds=LEASE_S)
    events: list[tuple[float, str, float]] = [(at, "jump", by) for at, by in jumps]
    for name, every, phase in (
        ("holder looks", SYNC_S, phases[0]),
        ("other looks", SYNC_S, phases[1]),
        ("renew", RENEW_S, 0.3),
        ("care", RECOVERY_S, 0.1),
    ):
        events += [(phase + n * every, name, 0.0) for n in range(int(130 / every))]
    for at, what, by in sorted(events):
        primary.true_s = start + at
        if what == "jump":
            primary.offset_s += by
        elif what == "holder looks":
            await holder.synchronize()
        elif what == "other looks":
            await other.synchronize()
        elif what == "renew":
            ends = latest(holder) + timedelta(seconds=LEASE_S)
        else:
            assert ends > earliest(other), f"taken for dead at {at:.1f} s"
    primary.true_s += LEASE_S + 61  # And when it dies, it is.
    assert ends <= earliest(other)


def clock_ahead(database: AsyncDatabase[dict[str, Any]], seconds: int) -> DatabaseClock:
    return DatabaseClock(database, wall_ns=lambda: time.time_ns() + seconds * NS)


@pytest.mark.mongo
@pytest.mark.parametrize("seconds", [3_600, -3_600])
async def test_an_instance_whose_clock_is_wrong_takes_no_job_from_one_that_lives(
    jobs: AsyncCollection[dict[str, Any]], seconds: int
) -> None:
    right, wrong = DatabaseClock(jobs.database), clock_ahead(jobs.database, seconds)

    def claims(name: str, clock: Callable[[], datetime]) -> Claims:
        return Claims(MongoJobs(jobs), instance(clock, name), lease_ms=5_000)

    one, other = claims("one", right), claims("other", wrong)
    await right.synchronize()
    await wrong.synchronize()
    await jobs.insert_many([document_of(job(due_at=utc_now())) for _ in range(3)])
    held, _ = await one.claim_due(2, [])
    assert len(held) == 2
    assert await other.take_lapsed(10) == []
    also, _ = await other.claim_due(10, [])
    assert len(also) == 1
    assert await one.take_lapsed(10) == []
