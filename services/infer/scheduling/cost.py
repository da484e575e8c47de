"""Execution costs of a model by rows, learned while serving.

    seconds
       |                 x          a point for each bucket of rows: running mean of rows and of seconds
       |         x                  between points: straight lines, never falling
       |   x                        before the first: as the first; beyond the last: in proportion
       +------------------- rows

One outlier changes little: a sample counts for at most three times the expected seconds. A model that has really become
slower is believed within a dozen executions.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

# Weight of the newest sample in a running mean: the last twenty or so count.
_NEWEST_WEIGHT = 0.1

_OUTLIER_FACTOR = 3.0

# Executions before requests are rejected or delayed because of learned costs. Two suffice for a model whose warm-up
# tried most sizes.
_ENOUGH_SAMPLES = 8


_BARRED_FACTOR, _LONGEST_BAR_S = 1_000, 3_600.0


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
        """True once there are enough samples for decisions."""
        return self.samples >= (_ENOUGH_SAMPLES if self._trials < _ENOUGH_SAMPLES - 2 else 2)

    def add(self, rows: int, seconds: float) -> None:
        """Add one execution of `rows` that took `seconds`."""
        self.samples += 1
        self._put(rows, seconds)

    def add_trial(self, rows: int, seconds: float) -> None:
        """Add one execution of the warm-up, which alone is not enough for decisions."""
        self._trials += 1
        self._put(rows, seconds)

    def _put(self, rows: int, seconds: float) -> None:
        self._is_stale = True
        number = size_bucket(rows)
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = _Bucket(rows, seconds)
        else:
            bucket.add(rows, seconds)

    def mean_of(self, rows: int) -> float | None:
        """Return the mean seconds of executions of about this size; None without a sample."""
        bucket = self._buckets.get(size_bucket(rows))
        return None if bucket is None else bucket.mean

    def expected(self, rows: int) -> float:
        """Return the expected seconds; 0 without samples."""
        return self._at(rows, "mean")

    def worst(self, rows: int) -> float:
        """Return seconds that are rarely exceeded: the mean and two mean deviations, at most twice the mean."""
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
            # Beyond the largest sample, cost grows at most in proportion: return that bound.
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
            # More rows never cost less: neighbours that contradict are merged (isotonic regression).
            while len(fitted) > 1 and fitted[-2].mean >= fitted[-1].mean:
                fitted[-2:] = [_merged(*fitted[-2:])]
        for left, right in pairwise(fitted):
            right.worst = max(right.worst, left.worst)
        self._points, self._rows = fitted, [point.rows for point in fitted]


class LoopCost:
    """Decides whether a batch may run on the event loop: by the processor time of runs with as much input.

    Input within a factor of two, in rows and in bytes, has one mean. Input of another size is measured on a worker
    first: a model with a free dimension may take a thousand times as long for it. The content of an input may do the
    same. So a run that holds the loop too long bars the model from the loop for a thousand times as long: such runs
    take at most a thousandth of the loop's time, and a pause of the interpreter costs a fast model a few seconds.
    """

    __slots__ = ("_barred_until", "_means")

    def __init__(self) -> None:
        self._means: dict[int, list[float]] = {}
        """Number and mean of the last runs, by size."""
        self._barred_until = 0.0

    def is_below(self, limit_s: float, rows: int, size_bytes: int, now: float) -> bool:
        """Return True when a run of about this size is expected to take less than `limit_s`."""
        known = self._means.get(size_bucket(rows) << 6 | size_bytes.bit_length())
        return known is not None and known[1] < limit_s and now >= self._barred_until

    def add(self, rows: int, size_bytes: int, seconds: float) -> None:
        """Add a run that took `seconds` of a processor."""
        size = size_bucket(rows) << 6 | size_bytes.bit_length()
        known = self._means.get(size)
        if known is None:
            self._means[size] = [1, seconds]
            return
        count, mean = known
        known[0] = count = count + 1
        known[1] = mean + (min(seconds, mean * _OUTLIER_FACTOR) - mean) * max(1 / count, _NEWEST_WEIGHT)

    def add_stall(self, seconds: float, now: float) -> None:
        """Bar the model from the loop, which a run has held for `seconds`."""
        self._barred_until = now + min(seconds * _BARRED_FACTOR, _LONGEST_BAR_S)


class Backlog:
    """Speed of a model while more rows wait than fit into a batch, whatever bounds its batches."""

    __slots__ = ("_batches", "_deviation_s", "_rows", "batch_s")

    def __init__(self) -> None:
        self.batch_s = 0.0
        """Seconds of one batch."""
        self._deviation_s = 0.0
        self._rows = 0.0
        self._batches = 0

    @property
    def is_known(self) -> bool:
        """True once there are enough samples for decisions."""
        return self._batches >= _ENOUGH_SAMPLES

    @property
    def row_s(self) -> float:
        """Seconds of one row; 0 without samples."""
        return self.batch_s / self._rows if self._rows else 0.0

    @property
    def worst_s(self) -> float:
        """Seconds of one batch that are rarely exceeded."""
        return self.batch_s + min(2 * self._deviation_s, self.batch_s)

    def add(self, rows: int, seconds: float) -> None:
        """Add one batch that left rows in the queue."""
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


def size_bucket(rows: int) -> int:
    """Return the bucket of a size: its own up to 8 rows, then four for each doubling."""
    if rows <= 8:
        return rows
    shift = rows.bit_length() - 3
    return (shift << 3) + (rows >> shift) + 16
