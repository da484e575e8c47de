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
        pressure.entered("a", 1, 10)
    began = pressure.began()
    clock.now += seconds
    pressure.ended(began)
    for _ in range(jobs):
        pressure.left("a", 1, 10)


def test_quick_writes_bear_a_long_line(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(5):
        write(pressure, clock, 0.05)
    for _ in range(900):
        pressure.entered("a", 1, 1)
        pressure.admit("a")
    for _ in range(200):
        pressure.entered("a", 1, 1)
    with pytest.raises(
        ResourceExhausted, match=r"1100 jobs wait to be written, and one more of this tenant would wait \d\.\d s"
    ):
        pressure.admit("a")


def test_a_database_that_hangs_is_noticed_while_it_does(pressure: WritePressure, clock: Seconds) -> None:
    write(pressure, clock, 0.01)
    pressure.entered("a", 1, 10)
    pressure.began()
    clock.now += 4.9
    pressure.admit("a")
    clock.now += 0.2
    with pytest.raises(ResourceExhausted, match="MongoDB is slow") as refused:
        pressure.admit("a")
    assert refused.value.retry_after_ms == 5_100
    clock.now += 3_600
    with pytest.raises(ResourceExhausted) as refused:
        pressure.admit("a")
    assert refused.value.retry_after_ms == 10_000


def test_large_requests_count_by_their_bytes(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 1.0)
    pressure.entered("a", 1, 5_500)
    with pytest.raises(ResourceExhausted):
        pressure.admit("a")
    pressure.left("a", 1, 5_500)
    pressure.admit("a")


def test_after_an_outage_one_is_let_in_and_the_rest_follow(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 10.0)
    pressure.admit("a")  # Nothing waits: it tries.
    pressure.entered("a", 1, 10)
    with pytest.raises(ResourceExhausted):
        pressure.admit("a")
    pressure.left("a", 1, 10)
    for _ in range(20):
        pressure.admit("a")
        write(pressure, clock, 0.01)
    pressure.entered("a", 1, 10)
    pressure.admit("a")


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


def test_a_tenant_s_jobs_count_for_others_in_turns(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 1.0)
    for _ in range(60):
        pressure.entered("a", 1, 10)
    assert pressure.wait_s("a") == pytest.approx(7.0, rel=0.01)
    with pytest.raises(ResourceExhausted):
        pressure.admit("a")
    # One job of the other tenant's is written before it.
    assert pressure.wait_s("b") == pytest.approx(1.0, rel=0.01)
    for _ in range(25):
        pressure.admit("b")
        pressure.entered("b", 1, 10)
    with pytest.raises(ResourceExhausted, match="85 jobs wait to be written, and one more of this tenant would wait"):
        pressure.admit("b")
    assert pressure.wait_s("b") == pytest.approx(6.0, rel=0.01)
    pressure.admit("c")
    for _ in range(60):
        pressure.left("a", 1, 10)
    assert pressure.wait_s("a") == pressure.wait_s("b") == pytest.approx(3.0, rel=0.01)


def test_items_and_bytes_of_others_count_in_turns(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 1.0)
    for _ in range(10):
        pressure.entered("a", 7, 900)
    assert pressure.wait_s("a") == pytest.approx(10.0, rel=0.01)
    assert pressure.wait_s("b") == pytest.approx(1.0, rel=0.01)
    for _ in range(2):
        pressure.entered("b", 1, 1)
    # Three jobs of the other tenant's, of 2,700 bytes, are written before it.
    assert pressure.wait_s("b") == pytest.approx(3.0, rel=0.01)


def test_of_very_many_tenants_all_jobs_count(pressure: WritePressure, clock: Seconds) -> None:
    for _ in range(20):
        write(pressure, clock, 1.0)
    for number in range(101):
        pressure.entered(f"{number}", 1, 10)
    assert pressure.wait_s("b") == pytest.approx(11.0, rel=0.01)
    pressure.left("0", 1, 10)
    # One job of each is written before it.
    assert pressure.wait_s("b") == pytest.approx(11.0, rel=0.01)
    for _ in range(100):
        pressure.entered("1", 1, 1)
    assert pressure.wait_s("b") == pytest.approx(11.0, rel=0.01)
    assert pressure.wait_s("1") == pytest.approx(21.0, rel=0.01)
