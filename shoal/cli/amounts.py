"""Amounts as people write them: ages (`90m`, `24h`, `30d`), times, and bytes (`500MiB`, `20GB`)."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from shoal.errors import InvalidArgument

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {"": 1, "B": 1, **{f"{p}iB": 1 << 10 * n for n, p in enumerate("KMGT", 1)}}
_BYTES |= {f"{p}B": 1_000**n for n, p in enumerate("KMGT", 1)} | {p: 1 << 10 * n for n, p in enumerate("KMGT", 1)}


def age(given: str, option: str) -> timedelta:
    """`90m`, `24h`, `30d`.

    Raises:
        InvalidArgument: it is none.
    """
    number, unit = given[:-1], given[-1:]
    if unit in _SECONDS and re.fullmatch(r"[0-9]{1,9}", number):
        return timedelta(seconds=int(number) * _SECONDS[unit])
    raise InvalidArgument(f"{option} {given!r}: expected an age: 90m, 24h, 30d, 8w")


def time(given: str, option: str) -> datetime:
    """A time, or one that lies an age back.

    Raises:
        InvalidArgument: it is neither.
    """
    try:
        if given[-1:] in _SECONDS:
            return datetime.now(UTC) - age(given, option)
        return datetime.fromisoformat(given)
    except (InvalidArgument, ValueError, OverflowError):
        expected = "expected a time (2026-11-24T08:00) or an age (90m, 24h, 7d)"
        raise InvalidArgument(f"{option} {given!r}: {expected}") from None


def size(given: str, option: str) -> int:
    """`1048576`, `500MiB`, `20GB`, `2G` (of 1,024).

    Raises:
        InvalidArgument: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,3})? ?([A-Za-z]{0,3})", given)
    unit = _BYTES.get(found[3]) if found else None
    if found is None or unit is None:
        raise InvalidArgument(f"{option} {given!r}: expected bytes: 1048576, 500MiB, 20GB")
    return int(int(found[1]) * unit + float(found[2] or 0) * unit)


def span(keep: timedelta) -> str:
    """An age as it may be given: the largest unit that fits."""
    seconds = int(keep.total_seconds())
    unit = next(unit for unit in "wdhms" if seconds % _SECONDS[unit] == 0)
    return f"{seconds // _SECONDS[unit]}{unit}"
