"""Parsing and formatting of ages (`90m`, `24h`, `30d`), times, and sizes in bytes (`500MiB`, `20GB`)."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from shoal.errors import InvalidArgument

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {"": 1, "B": 1, **{f"{p}iB": 1 << 10 * n for n, p in enumerate("KMGT", 1)}}
_BYTES |= {f"{p}B": 1_000**n for n, p in enumerate("KMGT", 1)} | {p: 1 << 10 * n for n, p in enumerate("KMGT", 1)}


def age(written: str, option: str) -> timedelta:
    """Parse an age: `90m`, `24h`, `30d`.

    Raises:
        InvalidArgument: `written` is not an age.
    """
    number, unit = written[:-1], written[-1:]
    if unit in _SECONDS and re.fullmatch(r"[0-9]{1,9}", number):
        return timedelta(seconds=int(number) * _SECONDS[unit])
    raise InvalidArgument(f"{option} {written!r}: expected an age: 90m, 24h, 30d, 8w")


def time(written: str, option: str) -> datetime:
    """Parse a time, or an age, which gives the time that long ago.

    Raises:
        InvalidArgument: `written` is neither.
    """
    try:
        if written[-1:] in _SECONDS:
            return datetime.now(UTC) - age(written, option)
        return datetime.fromisoformat(written)
    except (InvalidArgument, ValueError, OverflowError):
        expected = "expected a time (2026-11-24T08:00) or an age (90m, 24h, 7d)"
        raise InvalidArgument(f"{option} {written!r}: {expected}") from None


def size(written: str, option: str) -> int:
    """Parse a size: `1048576`, `500MiB`, `20GB`, `2G` (GiB).

    Raises:
        InvalidArgument: `written` is not a size.
    """
    found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,3})? ?([A-Za-z]{0,3})", written)
    unit = _BYTES.get(found[3]) if found else None
    if found is None or unit is None:
        raise InvalidArgument(f"{option} {written!r}: expected bytes: 1048576, 500MiB, 20GB")
    return int(int(found[1]) * unit + float(found[2] or 0) * unit)


def span(keep: timedelta) -> str:
    """Format an age, as `age` parses it, with the largest whole unit."""
    seconds = int(keep.total_seconds())
    unit = next(unit for unit in "wdhms" if seconds % _SECONDS[unit] == 0)
    return f"{seconds // _SECONDS[unit]}{unit}"
