"""Batches that take long: a request joins one only where that saves time.

A batch of large rows may take as long as its rows one after the other. Then it saves nothing, and everybody waits for
all of it: beside 16 callers with texts of a megabyte, a caller with ten bytes waited 12 s. So the seconds of a run are
learned by the bytes of its input, as soon as runs take more than a tenth of a second:

    seconds
       |             x            a point for each bucket of bytes: half the last run, half those before
       |       x                  between points: straight lines
       |   x                      before the first, and beyond the last: in proportion
       +------------------- bytes

A request joins when a batch with it takes a tenth of a second at most, or a tenth less than two separate runs. Where
joining does not pay, two requests of about one size run together now and then all the same: the first such run may have
been slow for other reasons, and models and machines change.
"""

from __future__ import annotations

from bisect import bisect_left

from services.infer.scheduling.cost import size_bucket

LONG_S = 0.1
"""Shorter batches are as large as the policy allows."""

# Least part of the time of two runs that one run of both must save.
_SAVED = 0.1

_LEAST_S = 1e-6

# Inputs of a batch before anything is known about large ones.
_FIRST_BYTES = 512 << 10

# Pauses between runs of two requests that may save nothing: each is twice as long as the last.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class LongBatches:
    """Seconds of a model's runs by bytes of input, as far as they are long."""

    __slots__ = ("_by_bucket", "_pause_s", "_points", "_sizes", "_trial_at", "from_bytes")

    def __init__(self) -> None:
        self.from_bytes = _FIRST_BYTES
        """Batches with less input are not long: for them, `joins` need not be asked."""
        self._by_bucket: dict[int, tuple[float, float]] = {}
        self._points: list[tuple[float, float]] = []
        self._sizes: list[float] = []
        self._trial_at = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def add(self, requests: int, size_bytes: int, seconds: float, now: float) -> None:
        """Learn from a run of `requests` requests that took `seconds`."""
        if seconds <= LONG_S and size_bytes <= self.from_bytes:
            return
        if requests > 1 and seconds > LONG_S:
            self._trial_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        size, number = max(size_bytes, 1), size_bucket(size_bytes)
        seconds = max(seconds, _LEAST_S)
        known_size, known_s = self._by_bucket.get(number, (size, seconds))
        self._by_bucket[number] = (known_size + size) / 2, (known_s + seconds) / 2
        self._points = sorted(self._by_bucket.values())
        self._sizes = [point[0] for point in self._points]
        self.from_bytes = self._first_long()

    def joins(self, size_bytes: int, more: int, *, is_alone: bool, now: float) -> bool:
        """Return True when a request of `more` bytes should join a batch of `size_bytes`.

        `is_alone`: the batch is a single request so far.
        """
        both = size_bytes + more
        if not self._points:
            return both <= self.from_bytes
        seconds = self._expected(both)
        if seconds <= max(LONG_S, (1 - _SAVED) * (self._expected(size_bytes) + self._expected(more))):
            return True
        return is_alone and now >= self._trial_at and size_bytes <= 2 * more <= 4 * size_bytes

    def _expected(self, size_bytes: int) -> float:
        n = bisect_left(self._sizes, size_bytes)
        if 0 < n < len(self._points):
            (low, low_s), (high, high_s) = self._points[n - 1 : n + 1]
            return low_s + (high_s - low_s) * (size_bytes - low) / (high - low)
        size, seconds = self._points[min(n, len(self._points) - 1)]
        return seconds * size_bytes / size

    def _first_long(self) -> int:
        """Return the least size that is expected to take `LONG_S`."""
        low = low_s = 0.0
        for size, seconds in self._points:
            if seconds > LONG_S:
                return int(low + (size - low) * (LONG_S - low_s) / (seconds - low_s))
            low, low_s = size, seconds
        return int(low * LONG_S / low_s)
