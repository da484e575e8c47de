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
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Upper bounds of the buckets for sizes of batches."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Reading of a histogram."""

    bounds: Sequence[float]
    counts: Sequence[int]
    """Observations of each bucket alone, the last one beyond all bounds."""
    sum: float


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

    def read(self) -> Buckets:
        """Return the counts as they are now."""
        return Buckets(self.bounds, list(self.counts), self.sum)
