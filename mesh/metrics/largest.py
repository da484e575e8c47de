"""Counts by a label that callers choose: the largest have a series each, and all others share one.

    add ──kept──> a row of its own
      └──other──> the shared row, and a count as a candidate ──settle──> replaces the smallest kept, if larger

A replaced key's row is dropped and not added to the shared one: a rate over the sum of all series stays true.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import nlargest
from operator import itemgetter

from mesh.metrics.families import LABEL_CHARS

OTHER = "other"
"""Label of the shared row."""

LARGEST = 50
"""Rows of their own, by default: enough to name who uses a node, and as many lines a scrape for each family."""


def largest(amounts: Iterable[tuple[str, float]], size: int = LARGEST) -> list[tuple[str, float]]:
    """Return the sums of the `size` keys with the most, then that of all others as OTHER, if there are any."""
    sums: dict[str, float] = {}
    for key, amount in amounts:
        key = key[:LABEL_CHARS]
        sums[key] = sums.get(key, 0) + amount
    shared = sums.pop(OTHER, 0)
    found = nlargest(size, sums.items(), key=itemgetter(1))
    if shared or len(sums) > size:
        found.append((OTHER, shared + sum(sums.values()) - sum(amount for _, amount in found)))
    return found


class Largest:
    """Rows of `width` sums by key. Memory is bounded by `size`, whatever keys come."""

    __slots__ = ("_candidates", "_kept", "_other", "_other_settled", "_settled", "_size", "_width")

    def __init__(self, width: int, size: int = LARGEST) -> None:
        self._width = width
        self._size = size
        self._kept: dict[str, list[float]] = {}
        # First sum of each row when the rows were last settled: growth since then is what counts.
        self._settled: dict[str, float] = {}
        self._other: list[float] = [0.0] * width
        self._candidates: dict[str, float] = {}
        self._other_settled = 0.0

    def row(self, key: str) -> list[float]:
        """Return the sums that a key's events are added to. The first one decides who is large: add to it, too."""
        row = self._kept.get(key)
        if row is not None:
            return row
        if len(key) > LABEL_CHARS:
            return self.row(key[:LABEL_CHARS])
        if len(self._kept) < self._size and key != OTHER:
            row = self._kept[key] = [0.0] * self._width
            return row
        candidates = self._candidates
        # Four times as many as rows: a key that is large comes early and often.
        if key in candidates or len(candidates) < 4 * self._size:
            candidates[key] = candidates.get(key, 0.0) + 1
        return self._other

    def settle(self) -> None:
        """Replace the smallest rows by larger candidates. Called when the rows are read."""
        grown = {key: row[0] - self._settled.get(key, 0.0) for key, row in self._kept.items()}
        smallest = sorted(grown, key=grown.__getitem__)
        # Keys that change with every event are never large. Otherwise, they would renew all idle rows at every read.
        least = max(1.0, (self._other[0] - self._other_settled) / (4 * self._size))
        for key in sorted(self._candidates, key=self._candidates.__getitem__, reverse=True):
            if key == OTHER or not smallest or self._candidates[key] <= max(least, grown[smallest[0]]):
                break
            del self._kept[smallest.pop(0)]
            self._kept[key] = [0.0] * self._width
        self._candidates.clear()
        self._settled = {key: row[0] for key, row in self._kept.items()}
        self._other_settled = self._other[0]

    def rows(self) -> Iterator[tuple[str, Sequence[float]]]:
        """Yield each key's sums; the shared row last, once it has any."""
        yield from self._kept.items()
        if any(self._other):
            yield OTHER, self._other
