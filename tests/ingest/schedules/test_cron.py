"""Times of cron expressions, over the days on which clocks change."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from cronsim import CronSim
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.schedules import cron
from shoal.errors import InvalidArgument

PARIS = cron.zone_of("Europe/Paris")
expressions = st.sampled_from(
    [
        "* * * * *",
        "*/7 * * * *",
        "30 2 * * *",
        "0 */3 * * *",
        "15 2 * * SUN",
        "0 0 29 2 *",
        "0 0 L * *",
        "*/20 * * * * *",
        "0 30 2 * * *",
        "5 4 1 */2 MON",
        "*/20 30 2 1 * *",
        "*/5 0-3 * * SUN#4",
    ]
)
zones = st.sampled_from(["UTC", "Europe/Paris", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"])
moments = st.integers(1_577_836_800, 1_956_528_000).map(lambda s: datetime.fromtimestamp(s, UTC))  # 2020 to 2032.


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def texts(times: list[datetime]) -> list[str]:
    return [time.isoformat().removesuffix("+00:00") for time in times]


def test_a_zone_is_where_the_hours_are() -> None:
    assert texts(cron.upcoming("0 3 * * MON-FRI", PARIS, at("2026-01-02T12:00"), 2)) == [
        "2026-01-05T02:00:00",
        "2026-01-06T02:00:00",
    ]
    assert texts(cron.upcoming("0 3 * * *", PARIS, at("2026-07-01T12:00"), 1)) == ["2026-07-02T01:00:00"]


def test_what_falls_into_the_gap_runs_after_it() -> None:
    # 2026-03-29: 02:00 becomes 03:00.
    assert texts(cron.upcoming("30 2 * * *", PARIS, at("2026-03-28T12:00"), 2)) == [
        "2026-03-29T01:00:00",
        "2026-03-30T00:30:00",
    ]


def test_an_hour_that_comes_twice_counts_once_for_a_certain_time() -> None:
    # 2026-10-25: 03:00 becomes 02:00.
    certain = cron.between("30 2 * * *", PARIS, at("2026-10-24T12:00"), at("2026-10-25T12:00"), 9)
    assert texts(certain) == ["2026-10-25T00:30:00"]
    often = cron.between("*/30 * * * *", PARIS, at("2026-10-25T00:00"), at("2026-10-25T02:00"), 9)
    assert len(often) == 5


@given(expressions, zones, moments)
def test_times_rise_and_lie_ahead(expression: str, zone: str, after: datetime) -> None:
    times = cron.upcoming(expression, cron.zone_of(zone), after, 5)
    assert times == sorted(set(times))
    assert all(time > after and time.microsecond == 0 for time in times)
    assert times[0] == cron.next_after(expression, cron.zone_of(zone), after)


@given(expressions, zones, moments, st.integers(0, 40 * 86_400))
def test_the_latest_is_the_last_of_them(expression: str, zone: str, last: datetime, seconds: int) -> None:
    if expression.startswith("*"):
        seconds %= 86_400  # So many are not listed in a test.
    found = cron.zone_of(zone)
    first = (last - timedelta(seconds=seconds)).replace(microsecond=0)
    every = cron.between(expression, found, first, last, 100_000)
    assert cron.latest(expression, found, first, last) == (every[-1] if every else None)


@pytest.mark.parametrize(
    ("expression", "last"),
    [
        ("* * * 1 1 *", "2026-01-01T23:59:59"),
        ("* * * * * MON#5", "2026-11-30T23:59:59"),
        ("0 0 29 2 *", "2024-02-29T00:00:00"),
        ("0 0 1 1 *", "2026-01-01T00:00:00"),
    ],
)
def test_the_latest_in_years_is_found_in_few_steps(expression: str, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, times = 0, cron._times

    def counted(*args: Any) -> Iterator[datetime]:
        nonlocal steps
        for time in times(*args):
            steps += 1
            yield time

    monkeypatch.setattr(cron, "_times", counted)
    now = at("2026-12-03T12:00")
    assert cron.latest(expression, UTC, now - timedelta(days=3_650), now) == at(last)
    # Those of three hours, of which each may have 3,600.
    assert steps < 12_000
    assert cron.latest(expression, UTC, now - timedelta(hours=5), now) is None


@pytest.mark.parametrize("expression", ["0 0 */31 * MON#2", "0 0 */31 2 MON#2", "* * * */16 * SAT#2"])
@pytest.mark.parametrize("zone", ["", "Europe/Paris"])
def test_an_expression_without_a_time_is_refused_after_few_days(
    expression: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0

    def counted(times: Any, day: date) -> bool:
        nonlocal looked_at
        looked_at += 1
        return matches(times, day)

    matches = CronSim.match_day
    monkeypatch.setattr(CronSim, "match_day", counted)
    with pytest.raises(InvalidArgument, match="no next time"):
        cron.checked(expression, zone)
    assert looked_at <= 1_300


def test_the_rarest_times_are_found() -> None:
    # A Sunday, the 29th of February: 2100 has none.
    found = cron.upcoming("0 0 29 2 */7", UTC, at("2027-01-01T00:00"), 6)
    assert [time.year for time in found] == [2032, 2060, 2088, 2128, 2156, 2184]


@pytest.mark.parametrize(
    ("expression", "zone", "says"),
    [
        ("", "", "cron: '': Wrong number of fields"),
        ("* * * *", "", "cron: .*Wrong number of fields"),
        ("61 * * * *", "", "cron: '61 .*: Bad minute"),
        ("* * * * FUNDAY", "", "Bad day-of-week"),
        ("*/0 * * * *", "", "Bad minute"),
        ("0 0 31 2 *", "", "cron: "),
        ("@daily", "", "Wrong number of fields"),
        ("* " * 200, "", "cron: at most 200 characters, got 400"),
        ("9" * 190 + " * * * *", "", "cron: "),
        ("* * * * *", "Mars/Olympus", "time_zone: no zone 'Mars/Olympus'"),
        ("* * * * *", "../../etc/passwd", "time_zone: no zone"),
        ("* * * * *", "Europe", "time_zone: no zone"),
        ("* * * * *", "x" * 100_000, "time_zone: no zone"),
        ("* * * * *", "a\0b", "time_zone: no zone"),
    ],
    ids=range(14),
)
def test_what_is_wrong_is_named(expression: str, zone: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        cron.checked(expression, zone)


def test_a_bad_value_is_not_called_a_bad_number_of_fields() -> None:
    for expression in ("61 * * * *", "0 0 31 2 *"):
        with pytest.raises(InvalidArgument) as refused:
            cron.checked(expression, "")
        assert "expected 5 fields" not in str(refused.value)
    with pytest.raises(InvalidArgument, match="expected 5 fields"):
        cron.checked("@daily", "")
