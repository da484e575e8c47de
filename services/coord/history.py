"""Figures of the last hour by model, tenant and instance, in plain arrays. Pure: the caller tells the time.

    rows of 5 s ──add──> a ring of 720 slots for each field of each name ──points──> points of one or several slots

A name costs its rings at once (23 kB for a model). Where memory has no place for one more, a name that is gone is
dropped, then the one that has been idle for the longest time; a name with requests is never dropped for an idle one.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.rates import Row

EVERY_S = 5.0
"""Time of one slot."""
SLOTS = 720
"""Slots of an hour."""
BYTES = 18 << 20
"""Bytes of all rings and names. 500 models, 100 tenants and 50 instances take 13 MiB."""
POINTS, VALUES = 60, 100_000
"""Points of a series that are returned unasked, and most points of one field: a response has 3.2 MB."""
FIELDS: Mapping[str, tuple[str, ...]] = {
    "model": ("rate", "errors", "p50_ms", "p99_ms", "batch", "queue", "queue_age_s", "shed"),
    "tenant": ("rate", "memory_bytes", "queue_age_s"),
    "instance": ("rate", "errors", "cpu", "memory_bytes", "queue", "stalls"),
}
"""Fields of a Row that are kept, by the kind of a name. Of `errors`, the failures a second are kept."""
# Objects of a name besides its rings: its key, its entry in the table, and the head of the array.
_NAME_BYTES = 500
_GREATEST = ("p99_ms", "queue", "queue_age_s", "memory_bytes")
_NAN = math.nan
_BLANK = array("f", [_NAN])


@dataclass(slots=True)
class _Kept:
    """The rings of a name: those of its fields, one after the other."""

    values: array[float]
    seen: int
    """Slot in which the name was last present."""
    active: int
    """Slot of the last requests; -1: there were none."""

    @property
    def size(self) -> int:
        return len(self.values) * self.values.itemsize + _NAME_BYTES


@dataclass(frozen=True, slots=True)
class Points:
    """Points of all names of a kind."""

    step_s: float
    first: int
    """Slots since the beginning, before the first point."""
    end: int
    """Slots since the beginning, to the end of the last point."""
    rows: Mapping[str, Mapping[str, list[float]]]
    """Values by name and field, oldest first; NaN where there is none."""


class History:
    """The last hour. The first slot ends EVERY_S after the beginning."""

    def __init__(self, limit_bytes: int = BYTES) -> None:
        self._limit = limit_bytes
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._size = 0
        self.slots = 0
        """Slots since the beginning: those that have no figures count, too."""
        self.left_out = 0
        """Names of the last slot that have no place."""

    def add(self, slot: int, rows: Mapping[str, Iterable[Row]]) -> None:
        """Add the rows of a slot, by the kind of their names. Slots that were passed over have no figures."""
        slot = max(slot, self.slots)
        self._blank(max(self.slots, slot - SLOTS + 1), slot + 1)
        self.slots = slot + 1
        found = {(kind, row.name): row for kind, each in rows.items() for row in each}
        for key, row in found.items():
            if (kept := self._kept.get(key)) is not None:
                kept.seen = slot
                if row.rate:
                    kept.active = slot
        self._drop([key for key, kept in self._kept.items() if slot - kept.seen >= SLOTS])
        self._admit({key: row for key, row in found.items() if key not in self._kept}, slot)
        for key in found.keys() & self._kept.keys():
            self._write(key[0], self._kept[key].values, found[key], slot % SLOTS)
        self.left_out = len(found.keys() - self._kept.keys())

    def _blank(self, first: int, end: int) -> None:
        """Remove the figures of these slots, at most SLOTS."""
        at = first % SLOTS
        last = at + end - first
        # The ring may end between them.
        pieces = [(at, min(SLOTS, last), _BLANK * (min(SLOTS, last) - at)), (0, last - SLOTS, _BLANK * (last - SLOTS))]
        for kept in self._kept.values():
            for begin in range(0, len(kept.values), SLOTS):
                for start, stop, blank in pieces if last > SLOTS else pieces[:1]:
                    kept.values[begin + start : begin + stop] = blank

    def _admit(self, new: Mapping[tuple[str, str], Row], slot: int) -> None:
        """Make rings for new names, the busiest first, in the place of names that are gone or have been idle longer."""
        victims: list[tuple[tuple[int, int], tuple[str, str]]] | None = None
        for (kind, name), row in sorted(new.items(), key=lambda each: -each[1].rate):
            active = slot if row.rate else -1
            size = len(FIELDS[kind]) * SLOTS * _BLANK.itemsize + _NAME_BYTES + len(name.encode())
            if self._size + size > self._limit:
                if victims is None:
                    # The last one is the first to go: gone before present, then the one idle for longer.
                    ranked = ((self._rank(kept, slot), key) for key, kept in self._kept.items())
                    victims = sorted(ranked, reverse=True)
                while victims and self._size + size > self._limit and victims[-1][0] < (1, active):
                    self._drop([victims.pop()[1]])
            if self._size + size <= self._limit:
                self._kept[kind, name] = _Kept(_BLANK * (len(FIELDS[kind]) * SLOTS), slot, active)
                self._size += size

    @staticmethod
    def _rank(kept: _Kept, slot: int) -> tuple[int, int]:
        return (1, kept.active) if kept.seen == slot else (0, kept.seen)

    def _drop(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in keys:
            self._size -= self._kept.pop(key).size + len(key[1].encode())

    @staticmethod
    def _write(kind: str, values: array[float], row: Row, at: int) -> None:
        for number, field in enumerate(FIELDS[kind]):
            value = row.errors * row.rate if field == "errors" else getattr(row, field)
            values[number * SLOTS + at] = _NAN if value is None else value

    def points(self, kind: str, seconds: float = 0.0, most: int = 0) -> Points:
        """Return the points of every name of a kind that has figures in this time.

        Args:
            kind: a key of FIELDS.
            seconds: time before the end of the last slot; 0: all that there is.
            most: most points of a series; 0: POINTS. There are fewer where all series would have more than VALUES.
        """
        there = min(self.slots, SLOTS)
        count = min(there, math.ceil(seconds / EVERY_S)) if seconds else there
        named = sorted((name, kept) for (of, name), kept in self._kept.items() if of == kind)
        most = max(1, min(most or POINTS, SLOTS, VALUES // max(1, len(named))))
        step = max(1, math.ceil(count / most))
        begin = self.slots - count
        # From the end, so that each point but the first one has all its slots.
        edges = [*range(count, 0, -step), 0][::-1] if count else [0]
        rows = {}
        for name, kept in named:
            fields = {field: _ring(kept.values, number, begin, count) for number, field in enumerate(FIELDS[kind])}
            if not all(math.isnan(value) for value in fields["rate"]):
                rows[name] = _combined(fields, edges) if step > 1 else _shares(fields)
        return Points(step * EVERY_S, begin, self.slots, rows)


def _ring(values: array[float], number: int, begin: int, count: int) -> array[float]:
    """Return the values of a field in `count` slots from `begin`."""
    own = values[number * SLOTS : (number + 1) * SLOTS]
    at = begin % SLOTS
    return (own[at:] + own[:at])[:count]


def _shares(fields: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return the fields, with the share of requests that failed in the place of the failures a second."""
    found = {field: list(values) for field, values in fields.items()}
    if "errors" in found:
        pairs = zip(found["errors"], found["rate"], strict=True)
        found["errors"] = [failed / rate if rate else failed for failed, rate in pairs]
    return found


def _combined(fields: Mapping[str, array[float]], edges: Sequence[int]) -> dict[str, list[float]]:
    """Return points of the slots between two edges each."""
    found = {}
    for field, values in fields.items():
        how: Callable[[Sequence[float]], float] = max if field in _GREATEST else sum if field == "stalls" else _mean
        found[field] = [_of(values[first:end], how) for first, end in pairwise(edges)]
    return _shares(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of(values: Sequence[float], how: Callable[[Sequence[float]], float]) -> float:
    """Return one number of the values, without those that are missing."""
    # A sum is NaN when a value is.
    if math.isnan(sum(values)):
        values = [value for value in values if not math.isnan(value)]
    return how(values) if values else _NAN
