"""What is known of the database refuses submits in time, and lets them in again by itself."""

from __future__ import annotations

import pytest

from services.ingest.intake.disk import Disk
from services.ingest.intake.pressure import WritePressure
from shoal.errors import ResourceExhausted
from tests.clocks import Seconds


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def pressure(clock: Seconds) -> WritePressure:
    return WritePressure(5.0, group_items=10, group_bytes=1_000, clock=clock)


def write(pressure: WritePressure, clock: Seconds, seconds: float, jobs: int = 1) -> None:
    for _ in range(jobs):
        pressure.entered(10)
    began = pressure.began()
    clock.now += seconds
    pressure.ended(began)
    pressure.left(jobs, 10 * jobs)


def test_quick_writes_bear_a_long_line(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(5):
        write(pressure, clock, 0.05)
    for _ in range(900):
        pressure.entered(1)
        pressure.admit()
    for _ in range(200):
        pressure.entered(1)
    with pytest.raises(ResourceExhausted, match=r"1100 jobs wait to be written, and one more would wait \d\.\d s"):
        pressure.admit()


def test_a_database_that_hangs_is_noticed_while_it_does(pressure: WritePressure, clock: Seconds) -> None:
    write(pressure, clock, 0.01)
    pressure.entered(10)
    pressure.began()
    clock.now += 4.9
    pressure.admit()
    clock.now += 0.2
    with pytest.raises(ResourceExhausted, match="MongoDB is slow") as refused:
        pressure.admit()
    assert refused.value.retry_after_ms == 5_100
    clock.now += 3_600
    with pytest.raises(ResourceExhausted) as refused:
        pressure.admit()
    assert refused.value.retry_after_ms == 10_000


def test_large_requests_count_by_their_bytes(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 1.0)
    pressure.entered(5_500)
    with pytest.raises(ResourceExhausted):
        pressure.admit()
    pressure.left(1, 5_500)
    pressure.admit()


def test_after_an_outage_one_is_let_in_and_the_rest_follow(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 10.0)
    pressure.admit()  # Nothing waits: it tries.
    pressure.entered(10)
    with pytest.raises(ResourceExhausted):
        pressure.admit()
    pressure.left(1, 10)
    for _ in range(20):
        pressure.admit()
        write(pressure, clock, 0.01)
    pressure.entered(10)
    pressure.admit()


def test_a_disk_that_is_short_stays_so_until_there_is_more() -> None:
    disk = Disk(None, 100 << 20)  # type: ignore[arg-type] # Not asked here.
    disk.admit()
    disk.observe(101 << 20)
    disk.admit()
    disk.observe(99 << 20)
    with pytest.raises(ResourceExhausted, match="MongoDB's disk has 99 MiB left, and 100 MiB are reserved") as refused:
        disk.admit()
    assert refused.value.retry_after_ms
    disk.observe(110 << 20)
    with pytest.raises(ResourceExhausted, match="has 110 MiB left"):
        disk.admit()
    disk.observe(125 << 20)
    disk.admit()
