"""Choice of the due schedules of a round: the tenants in turn, so that none waits for the many of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def turns(due: Sequence[tuple[str, str]], most: int) -> dict[str, list[str]]:
    """Return up to `most` schedules by tenant: of each tenant its first, then of each its second, and so on.

    `due` has (tenant, schedule) pairs, the longest due first; so has each tenant's list.
    """
    earlier: Counter[str] = Counter()
    ranked: list[tuple[int, str, str]] = []
    for tenant, schedule in due:
        ranked.append((earlier[tenant], tenant, schedule))
        earlier[tenant] += 1
    ranked.sort(key=lambda entry: entry[0])
    chosen: dict[str, list[str]] = {}
    for _, tenant, schedule in ranked[:most]:
        chosen.setdefault(tenant, []).append(schedule)
    return chosen
