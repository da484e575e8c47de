"""What an execution costs, by its rows: learned while serving.

    seconds
       |                 x          a point for each bucket of rows: running mean of rows and of seconds
       |         x                  between points: straight lines, never falling
       |   x                        before the first: as the first; beyond the last: in proportion
       +------------------- rows

One outlier moves nothing much: a sample counts for at most three times what was expected. A model that has really
become slower is believed within a dozen executions.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

_NEWEST_WEIGHT = 0.1
# Weight of the newest sample in a running mean: the last twenty or so count.

_OUTLIER_FACTOR = 3.0
_ENOUGH_SAMPLES = 8
# Executions before anybody should be refused, or made to wait, because of what was learned. Of a model whose warm-up
# tried most sizes, the first two.


@dataclass(slots=True, eq=False)
class _Bucket:
    rows: float
    mean: float
    deviation: float = 0.0
    count: int = 1

    def add(self, rows: int, seconds: float) -> None:
        self.count += 1
        weight = max(1 / self.count, _NEWEST_WEIGHT)
        seconds = min(seconds, self.mean * _OUTLIER_FACTOR)
        self.deviation += (abs(seconds - self.mean) - self.deviation) * weight
        self.mean += (seconds - self.mean) * weight
        self.rows += (rows - self.rows) * weight


@dataclass(slots=True)
class _Point:
    rows: float
    mean: float
    worst: float
    weight: int


class CostCurve:
    """Seconds of one execution by rows."""

    __slots__ = ("_buckets", "_is_stale", "_points", "_rows", "_trials", "samples")

    def __init__(self) -> None:
        self.samples = self._trials = 0
        self._buckets: dict[int, _Bucket] = {}
        self._points: list[_Point] = []
        self._rows: list[float] = []
        self._is_stale = False

    @property
    def is_known(self) -> bool:
        """Whether it has seen enough to be acted upon."""
        return self.samples >= (_ENOUGH_SAMPLES if self._trials < _ENOUGH_SAMPLES - 2 else 2)

    def add(self, rows: int, seconds: float) -> None:
        """One execution of `rows` that took `seconds`."""
        self.samples += 1
        self._put(rows, seconds)

    def add_trial(self, rows: int, seconds: float) -> None:
        """The same, before it served: nothing to act upon by itself."""
        self._trials += 1
        self._put(rows, seconds)

    def _put(self, rows: int, seconds: float) -> None:
        self._is_stale = True
        number = _bucket(rows)
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = _Bucket(rows, seconds)
        else:
            bucket.add(rows, seconds)

    def mean_of(self, rows: int) -> float | None:
        """What executions of about this size took; None when there was none."""
        bucket = self._buckets.get(_bucket(rows))
        return None if bucket is None else bucket.mean

    def expected(self, rows: int) -> float:
        """Seconds to expect; 0 when nothing is known."""
        return self._at(rows, "mean")

    def worst(self, rows: int) -> float:
        """Seconds that are hardly ever exceeded: two mean deviations more, at most twice what is expected."""
        return self._at(rows, "worst")

    def _at(self, rows: int, what: str) -> float:
        if self._is_stale:
            self._refit()
        points = self._points
        if not points:
            return 0.0
        n = bisect_left(self._rows, rows)
        if n == 0:
            first: float = getattr(points[0], what)
            return first
        if n == len(points):
            # At most in proportion: whoever asks for more than was ever seen is told the most that it may cost.
            last: float = getattr(points[-1], what)
            return last * rows / points[-1].rows
        left, right = points[n - 1], points[n]
        low: float = getattr(left, what)
        high: float = getattr(right, what)
        return low + (high - low) * (rows - left.rows) / (right.rows - left.rows)

    def _refit(self) -> None:
        self._is_stale = False
        fitted: list[_Point] = []
        for bucket in sorted(self._buckets.values(), key=lambda bucket: bucket.rows):
            worst = bucket.mean + min(2 * bucket.deviation, bucket.mean)
            fitted.append(_Point(bucket.rows, bucket.mean, worst, min(bucket.count, 20)))
            # More rows never cost less: neighbours that say so are taken together (isotonic regression).
            while len(fitted) > 1 and fitted[-2].mean >= fitted[-1].mean:
                fitted[-2:] = [_merged(*fitted[-2:])]
        for left, right in pairwise(fitted):
            right.worst = max(right.worst, left.worst)
        self._points, self._rows = fitted, [point.rows for point in fitted]


class Backlog:
    """How fast a model is when more waits than fits into a batch: whatever its batches are cut by."""

    __slots__ = ("_batches", "_deviation_s", "_rows", "batch_s")

    def __init__(self) -> None:
        self.batch_s = 0.0
        """Seconds of one such batch."""
        self._deviation_s = 0.0
        self._rows = 0.0
        self._batches = 0

    @property
    def is_known(self) -> bool:
        """Whether it has seen enough to be acted upon."""
        return self._batches >= _ENOUGH_SAMPLES

    @property
    def row_s(self) -> float:
        """Seconds for each row; 0 when nothing is known."""
        return self.batch_s / self._rows if self._rows else 0.0

    @property
    def worst_s(self) -> float:
        """Seconds of one such batch that are hardly ever exceeded."""
        return self.batch_s + min(2 * self._deviation_s, self.batch_s)

    def add(self, rows: int, seconds: float) -> None:
        """One batch that left rows in the queue."""
        self._batches += 1
        weight = max(1 / self._batches, _NEWEST_WEIGHT)
        if self._batches > 1:
            seconds = min(seconds, self.batch_s * _OUTLIER_FACTOR)
            self._deviation_s += (abs(seconds - self.batch_s) - self._deviation_s) * weight
        self.batch_s += (seconds - self.batch_s) * weight
        self._rows += (rows - self._rows) * weight


def _merged(a: _Point, b: _Point) -> _Point:
    weight = a.weight + b.weight

    def mean(x: float, y: float) -> float:
        return (x * a.weight + y * b.weight) / weight

    return _Point(mean(a.rows, b.rows), mean(a.mean, b.mean), max(a.worst, b.worst), weight)


def _bucket(rows: int) -> int:
    """Up to 8 rows each its own; then four for each doubling."""
    if rows <= 8:
        return rows
    shift = rows.bit_length() - 3
    return (shift << 3) + (rows >> shift) + 16
