"""What is due is planned: every time once at most, and what was missed as the schedule wants it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.schedules import cron
from services.ingest.schedules.firing import submit_of
from services.ingest.schedules.schedule import FIRED_AT_ONCE, GRACE, Misfire, Schedule, SchedulePlan, plan
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.faults import submit

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def schedule(**fields: object) -> Schedule:
    made: dict[str, object] = {
        "tenant": "t",
        "name": "n",
        "cron": "*/10 * * * *",
        "zone": "UTC",
        "template": submit(labels={"a": "b"}).SerializeToString(),
        "created_at": NOON,
        "updated_at": NOON,
        "next_at": NOON,
        **fields,
    }
    return Schedule(**made)  # type: ignore[arg-type]


def minutes(many: float) -> timedelta:
    return timedelta(minutes=many)


def test_nothing_is_due_before_its_time_or_while_paused() -> None:
    assert plan(schedule(), NOON - timedelta(seconds=1)) is None
    assert plan(schedule(next_at=None), NOON) is None


def test_on_time() -> None:
    for misfire in Misfire:
        assert plan(schedule(misfire=misfire), NOON + GRACE) == SchedulePlan((NOON,), NOON + minutes(10))


def test_missed_times() -> None:
    late = NOON + minutes(35)
    skipped = plan(schedule(), late)
    assert skipped == SchedulePlan((), NOON + minutes(40), "no leader ran at 2026-01-02T12:30:00Z")
    latest = plan(schedule(misfire=Misfire.LATEST), late)
    assert latest == SchedulePlan(
        (NOON + minutes(30),), NOON + minutes(40), "no leader ran before 2026-01-02T12:30:00Z"
    )
    every = plan(schedule(misfire=Misfire.ALL), late)
    assert every == SchedulePlan(tuple(NOON + minutes(n) for n in (0, 10, 20, 30)), NOON + minutes(40))


def test_many_missed_times_are_made_up_for_in_turns() -> None:
    late = NOON + timedelta(days=365)
    some = plan(schedule(misfire=Misfire.ALL), late)
    assert some is not None
    assert len(some.fire) == FIRED_AT_ONCE
    assert some.next_at == some.fire[-1] + minutes(10)
    every_second = plan(schedule(cron="* * * * * *"), late)  # Not counted one by one.
    assert every_second is not None
    assert every_second.fire == (late,)


@given(
    st.sampled_from(list(Misfire)),
    st.sampled_from(["*/10 * * * *", "30 2 * * *", "*/45 * * * * *"]),
    st.sampled_from(["UTC", "Europe/Paris"]),
    st.lists(st.sampled_from([1, 20, 59, 600, 4_000]), max_size=40),
)
def test_however_late_leaders_come_no_time_is_fired_twice(
    misfire: Misfire, expression: str, zone: str, gaps_s: list[int]
) -> None:
    begin = datetime(2026, 3, 28, 23, tzinfo=UTC)  # Clocks change in that night.
    found = cron.zone_of(zone)
    next_at = cron.next_after(expression, found, begin)
    one = schedule(cron=expression, zone=zone, misfire=misfire, next_at=next_at)
    now, fired = begin, []
    for gap in gaps_s:
        now += timedelta(seconds=gap)
        for _ in range(200):  # Until nothing is due.
            if (planned := plan(one, now)) is None:
                break
            fired += planned.fire
            one = replace(one, next_at=planned.next_at)
        assert one.next_at is None or one.next_at > now
    times = cron.between(expression, found, begin + timedelta(seconds=1), now, 100_000)
    assert fired == sorted(set(fired))
    assert set(fired) <= set(times)
    if misfire is Misfire.ALL:
        assert fired == times
    elif all(gap <= GRACE.total_seconds() for gap in gaps_s) and expression != "*/45 * * * * *":
        assert fired == times  # Whoever looks once a minute misses none.


def test_the_job_of_a_time_is_the_same_bytes_whoever_makes_it() -> None:
    made = submit_of(schedule(), NOON)
    assert made.SerializeToString(deterministic=True) == submit_of(schedule(), NOON).SerializeToString(
        deterministic=True
    )
    assert made.idempotency_key == "schedule:n:2026-01-02T12:00:00Z"
    assert (made.tenant, dict(made.labels)) == (
        "t",
        {"a": "b", "schedule": "n", "scheduled_for": "2026-01-02T12:00:00Z"},
    )
    assert isinstance(made, pb.SubmitRequest)
