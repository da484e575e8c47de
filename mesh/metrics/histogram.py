"""Histograms as plain arrays: an observation is one bisection and one addition."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of the buckets for durations of calls, in seconds."""
PART_SECONDS = (*(0.00001, 0.00003, 0.0001, 0.0003, 0.001), *(0.003, 0.01, 0.03, 0.1, 1.0))
"""Upper bounds of the buckets for parts of an execution, in seconds: copies take microseconds. Fewer than of SECONDS,
since there may be 500 models."""
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Upper bounds of the buckets for sizes of batches."""


EXEMPLAR_S = 60.0
"""Time for which a bucket keeps its exemplar: the collector gets one a bucket and minute."""


@dataclass(frozen=True, slots=True)
class Exemplar:
    """An observation of a sampled trace, by which a bucket leads to a request."""

    value: float
    trace_id: int
    span_id: int
    at_s: float
    """Unix time."""


class Exemplars:
    """The exemplar of each bucket: the first observation of a sampled trace in a minute."""

    __slots__ = ("_bounds", "_by_bucket")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = bounds
        self._by_bucket: list[Exemplar | None] = [None] * (len(bounds) + 1)

    def add(self, value: float, trace_id: int, span_id: int, now_s: float) -> None:
        """Keep an observation, unless its bucket has an exemplar of this minute."""
        bucket = bisect_left(self._bounds, value)
        kept = self._by_bucket[bucket]
        if kept is None or now_s - kept.at_s >= EXEMPLAR_S:
            self._by_bucket[bucket] = Exemplar(value, trace_id, span_id, now_s)

    def read(self) -> tuple[Exemplar | None, ...]:
        """Return the exemplars by bucket; nothing without any."""
        return tuple(self._by_bucket) if any(self._by_bucket) else ()


@dataclass(frozen=True, slots=True)
class Buckets:
    """Reading of a histogram."""

    bounds: Sequence[float]
    counts: Sequence[int]
    """Observations of each bucket alone, the last one beyond all bounds."""
    sum: float
    exemplars: Sequence[Exemplar | None] = ()
    """By bucket; empty without any."""


class Histogram:
    """Counts of observations by bucket."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count `count` observations of `value`."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def read(self, exemplars: Sequence[Exemplar | None] = ()) -> Buckets:
        """Return the counts as they are now, with these exemplars."""
        return Buckets(self.bounds, list(self.counts), self.sum, exemplars)
