"""Calls that a limit of the policy has refused, by limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable

from mesh.metrics.families import Family, Kind, Reading

REFUSED = Family(
    "shoal.limits.refused",
    Kind.COUNTER,
    "{request}",
    "Calls that a limit of the policy has refused, in infer and ingest; those that a gateway has refused, in coord.",
    ("limit", "of"),
)


class RefusedCounts:
    """Counts of refused calls. Memory is bounded by the limits of the policy."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, limit: str, of: str, calls: int = 1) -> None:
        """Count calls refused by the number `of` of a limit: `requests`, `in_flight`, `bytes`, `rows`."""
        self._counts[limit, of] += calls

    def keep(self, limits: Container[str]) -> None:
        """Forget the limits that the policy does not have any more."""
        self._counts = Counter({key: count for key, count in self._counts.items() if key[0] in limits})

    def read(self) -> Iterable[Reading]:
        for labels, count in sorted(self._counts.items()):
            yield REFUSED, labels, count
