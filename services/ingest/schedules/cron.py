"""Times of a cron expression in a time zone.

    ┌ minute  ┌ hour  ┌ day of month  ┌ month  ┌ day of week
    0         3       *               *        MON-FRI          03:00 on working days

Five fields as in Debian's cron, or six with seconds first. When clocks are set forward, a time in the gap runs directly
after it. When clocks are set back, a time at a certain hour runs once, and a time every few minutes runs in both hours
(https://manpages.debian.org/cron). Times are instants, in UTC, in whole seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, tzinfo
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from shoal.errors import InvalidArgument

EXPRESSION_CHARS = 200
ZONE_CHARS = 64
_SECOND = timedelta(seconds=1)
# Days that the search for one time looks at, some microseconds each: 29 February on a given weekday takes 1,173 at the
# most, any other time fewer. Without a limit, an expression without a time would take the days of 50 years.
_MOST_DAYS = 1_300
# Longer than clocks are set back.
_FOLD = timedelta(hours=3)


def checked(expression: str, zone: str) -> tzinfo:
    """Return the time zone of a valid schedule, whose expression has a next time.

    Raises:
        InvalidArgument: the expression or the zone is invalid; the message names the field.
    """
    found = zone_of(zone)
    if len(expression) > EXPRESSION_CHARS:
        raise InvalidArgument(f"cron: at most {EXPRESSION_CHARS} characters, got {len(expression)}")
    if next_after(expression, found, datetime(2026, 1, 1, tzinfo=UTC)) is None:
        raise InvalidArgument(f"cron: {expression!r} has no next time")
    return found


def zone_of(name: str) -> tzinfo:
    """Return the time zone with this name (https://www.iana.org/time-zones); empty is UTC."""
    if name in ("", "UTC"):
        return UTC
    try:
        if len(name) > ZONE_CHARS:
            raise ValueError("too long")
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as err:  # KeyError: ZoneInfoNotFoundError. OSError: a folder's name.
        raise InvalidArgument(f"time_zone: no zone {name[:80]!r}: expected a name such as Europe/Paris") from err


def next_after(expression: str, zone: tzinfo, after: datetime) -> datetime | None:
    """Return the first time after `after`; None when there is none.

    Raises:
        InvalidArgument: the expression is invalid.
    """
    return next(_times(expression, zone, after), None)


def upcoming(expression: str, zone: tzinfo, after: datetime, many: int) -> list[datetime]:
    """Return the next `many` times."""
    return list(islice(_times(expression, zone, after), many))


def between(expression: str, zone: tzinfo, first: datetime, last: datetime, most: int) -> list[datetime]:
    """Return the earliest `most` times from `first` to `last`, both included."""
    times = _times(expression, zone, first - _SECOND)
    return list(islice(takewhile(lambda time: time <= last, times), most))


def latest(expression: str, zone: tzinfo, first: datetime, last: datetime) -> datetime | None:
    """Return the last time from `first` to `last`, both included; None when there is none."""
    for back in (timedelta(minutes=2), _FOLD):
        found = _last_between(expression, zone, max(first, last - back), last)
        if found is not None or last - back <= first:
            return found
    # A year may have a day of times each second, so they are not walked through: each step leaves half of the rest.
    low, high = first - _SECOND, last
    while high - low > _SECOND:
        middle = low + timedelta(seconds=(high - low) // _SECOND // 2)
        time = next_after(expression, zone, middle)
        if time is not None and time <= last:
            found = low = time
        else:
            high = middle
    if found is None:
        return _last_between(expression, zone, first, min(first + _FOLD, last))
    # The times of an hour that occurs twice are defined from before it on.
    return _last_between(expression, zone, max(first, found - _FOLD), last)


def _last_between(expression: str, zone: tzinfo, first: datetime, last: datetime) -> datetime | None:
    times = takewhile(lambda time: time <= last, _times(expression, zone, first - _SECOND))
    return next(iter(deque(times, maxlen=1)), None)


class _Times(CronSim):
    """Times of an expression, until none is found within _MOST_DAYS."""

    _days = 0

    def __next__(self) -> datetime:
        self._days = 0
        time: datetime = super().__next__()
        return time

    def match_day(self, d: date) -> bool:
        self._days += 1
        if self._days > _MOST_DAYS:
            raise StopIteration
        matches: bool = super().match_day(d)
        return matches


def _times(expression: str, zone: tzinfo, after: datetime) -> Iterator[datetime]:
    try:
        times = _Times(expression, after.astimezone(zone))
    except (CronSimError, ValueError) as err:
        fields = "expected 5 fields (minute, hour, day of month, month, day of week), or 6 with seconds first"
        raise InvalidArgument(f"cron: {expression[:80]!r}: {_message(err, fields)}") from err
    try:
        for time in times:
            instant = time.astimezone(UTC)
            if instant > after:
                yield instant
    # Beyond the year 9999.
    except (OverflowError, ValueError):
        return


def _message(err: Exception, fields: str) -> str:
    message = str(err) or type(err).__name__
    if message.startswith("Wrong number"):
        return f"{message}: {fields}"
    return f"{message}: not a value of that field, or without a next time"
