"""Calls that a limit of the policy has refused, by limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from mesh.metrics.families import Family, Kind, Reading

REFUSED = Family(
    "shoal.limits.refused",
    Kind.COUNTER,
    "{request}",
    "Calls that a limit of the policy has refused, in infer and ingest; those that a gateway has refused, in coord.",
    ("limit", "of"),
)


class RefusedCounts:
    """Counts of refused calls. `keep` bounds their memory by the limits of the policy."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, limit: str, of: str, calls: int = 1) -> None:
        """Count calls refused by the number `of` of a limit: `requests`, `in_flight`, `bytes`, `rows`."""
        self._counts[limit, of] += calls

    def keep(self, has: Callable[[str], bool]) -> None:
        """Forget the limits that the policy does not have any more; `has` returns True for the others."""
        self._counts = Counter({key: count for key, count in self._counts.items() if has(key[0])})

    def read(self) -> Iterable[Reading]:
        for labels, count in sorted(self._counts.items()):
            yield REFUSED, labels, count
