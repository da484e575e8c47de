"""Times of a cron expression in a time zone.

    ┌ minute  ┌ hour  ┌ day of month  ┌ month  ┌ day of week
    0         3       *               *        MON-FRI          03:00 on working days

Five fields as Debian's cron reads them, or six with seconds before them. When clocks are put forward, what falls into
the gap runs right after it; when they are put back, what is at a certain hour runs once, and what is every so many
minutes goes on through both hours (https://manpages.debian.org/cron). Times are instants, in UTC, in whole seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from shoal.errors import InvalidArgument

EXPRESSION_CHARS = 200
ZONE_CHARS = 64
_SECOND = timedelta(seconds=1)


def checked(expression: str, zone: str) -> tzinfo:
    """The zone of a schedule whose expression has a next time.

    Raises:
        InvalidArgument: names the field.
    """
    found = zone_of(zone)
    if len(expression) > EXPRESSION_CHARS:
        raise InvalidArgument(f"cron: at most {EXPRESSION_CHARS} characters, got {len(expression)}")
    if next_after(expression, found, datetime(2026, 1, 1, tzinfo=UTC)) is None:
        raise InvalidArgument(f"cron: {expression!r} never comes")
    return found


def zone_of(name: str) -> tzinfo:
    """A time zone by its name (https://www.iana.org/time-zones); empty is UTC."""
    if name in ("", "UTC"):
        return UTC
    try:
        if len(name) > ZONE_CHARS:
            raise ValueError("too long")
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as err:  # KeyError: ZoneInfoNotFoundError. OSError: a folder's name.
        raise InvalidArgument(f"time_zone: no zone {name[:80]!r}: expected a name such as Europe/Paris") from err


def next_after(expression: str, zone: tzinfo, after: datetime) -> datetime | None:
    """The first time after `after`. None: there is none.

    Raises:
        InvalidArgument: the expression is none.
    """
    return next(_times(expression, zone, after), None)


def upcoming(expression: str, zone: tzinfo, after: datetime, many: int) -> list[datetime]:
    """The next `many` times."""
    return list(islice(_times(expression, zone, after), many))


def between(expression: str, zone: tzinfo, first: datetime, last: datetime, most: int) -> list[datetime]:
    """The times from `first` to `last`, both included: the earliest `most` of them."""
    times = _times(expression, zone, first - _SECOND)
    return list(islice(takewhile(lambda time: time <= last, times), most))


def latest(expression: str, zone: tzinfo, first: datetime, last: datetime) -> datetime | None:
    """The last of the times from `first` to `last`, both included, however many there are."""
    found: datetime | None = None
    # Forwards, because the times of a day on which clocks change are defined that way; from closer and closer before.
    for back in (timedelta(minutes=2), timedelta(hours=3), timedelta(days=2), timedelta(days=63)):
        found = _last_between(expression, zone, max(first, last - back), last)
        if found is not None or last - back <= first:
            return found
    # Rarer than every other month: few of them lie in any span.
    return _last_between(expression, zone, first, last)


def _last_between(expression: str, zone: tzinfo, first: datetime, last: datetime) -> datetime | None:
    times = takewhile(lambda time: time <= last, _times(expression, zone, first - _SECOND))
    return next(iter(deque(times, maxlen=1)), None)


def _times(expression: str, zone: tzinfo, after: datetime) -> Iterator[datetime]:
    try:
        times = CronSim(expression, after.astimezone(zone))
    except (CronSimError, ValueError) as err:
        what = "expected 5 fields (minute, hour, day of month, month, day of week), or 6 with seconds first"
        raise InvalidArgument(f"cron: {expression[:80]!r}: {_said(err, what)}") from err
    try:
        for time in times:
            instant = time.astimezone(UTC)
            if instant > after:
                yield instant
    except (OverflowError, ValueError):
        return  # Beyond the year 9999.


def _said(err: Exception, fields: str) -> str:
    said = str(err) or type(err).__name__
    if said.startswith("Wrong number"):
        return f"{said}: {fields}"
    return f"{said}: no value of that field, or none that ever comes"
