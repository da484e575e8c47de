"""Deadline heap of queued entries: one heap, and so one timer, for all of them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count
from typing import Generic, Protocol, TypeVar

_SLACK = 64


class Expiring(Protocol):
    """An entry that may expire while it waits."""

    @property
    def is_waiting(self) -> bool: ...


W = TypeVar("W", bound=Expiring)


class DeadlineHeap(Generic[W]):
    """Deadline heap; entries that no longer wait are dropped lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, W]] = []
        self._numbers = count()
        self._compact_at = _SLACK

    def add(self, at: float, entry: W) -> None:
        if len(self._heap) >= self._compact_at:
            self._compact()
        heapq.heappush(self._heap, (at, next(self._numbers), entry))

    def next(self) -> float:
        """Return the earliest deadline; infinite when no entry waits."""
        heap = self._heap
        while heap and not heap[0][2].is_waiting:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def first(self) -> W | None:
        """Return the entry with the earliest deadline, if any."""
        return self._heap[0][2] if self.next() != math.inf else None

    def until(self, now: float) -> Iterator[W]:
        """Remove and yield the entries whose deadline is at or before `now`, in order."""
        while self.next() <= now:
            yield heapq.heappop(self._heap)[2]

    def _compact(self) -> None:
        # Most requests are completed long before their deadline: without this, they would be held until then.
        self._heap = [entry for entry in self._heap if entry[2].is_waiting]
        heapq.heapify(self._heap)
        self._compact_at = 2 * len(self._heap) + _SLACK
