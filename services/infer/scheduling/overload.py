"""Batch size under overload: the size that completes the most rows in time.

    seconds since its arrival    0         waits          taken            completed     budget
                                 |--------------------------|-- cost(b) ------|--- spare ---|

With batches of b rows, a row must have arrived within the last budget - cost(b) when its batch is taken. A batch of one
of n instances thus finds at most rate * (budget - cost(b)) / n useful rows. Rows completed in time for each second and
instance are then

    min(b, rate * (budget - cost(b)) / n) / cost(b)

Large batches are cheap by the row, and too large ones leave no time to wait for them. The smallest b within two
hundredths of the best rate is chosen: spare time is worth more than the last two hundredths of throughput. But where
all offered rows can be served with headroom, it is the largest such b: requests that arrive together run together.
"""

from __future__ import annotations

import math

from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.slo import Arrivals

USABLE_SHARE = 0.9
"""Share of a budget that plans may use; the rest is spare, because clocks, networks and forecasts err."""

# The usable share while this many batches wait already. The queue keeps the instances busy, and a request that would
# be completed at the last moment is better rejected.
_BACKLOG_USABLE_SHARE = 0.6
_BACKLOG_BATCHES = 3

# Served rows over offered rows, from which all offered rows can be served with headroom.
_HEADROOM = 1.1

# Part of the best rate that the chosen size must reach.
_NEAR_BEST = 0.98

# Weight of the newest request in the mean of the budgets.
_NEWEST_WEIGHT = 0.02

# Interval at which the size is computed again.
_RECOMPUTE_S = 0.05

# 1, 2, 3, 4, 6, 8, 12, ...
_SIZES = (1, *(size for power in range(1, 13) for size in (1 << power, 3 << (power - 1))))


def usable_share(ahead_s: float, batch_s: float) -> float:
    """Return the share of a request's time that plans may use, behind `ahead_s` of batches."""
    return _BACKLOG_USABLE_SHARE if ahead_s > _BACKLOG_BATCHES * batch_s else USABLE_SHARE


class Pressure:
    """Load offered to a model while none of its instances is idle."""

    __slots__ = ("_arrivals", "_mean_inverse_budget", "_row_s", "_rows", "_until", "is_overloaded")

    def __init__(self) -> None:
        self._arrivals = Arrivals()
        self._mean_inverse_budget = 0.0  # A request without a deadline counts as 0.
        self._row_s = 0.0  # A shorter budget cannot be met, and is ignored.
        self._rows = 0
        self._until = -math.inf
        self.is_overloaded = False
        """True when batches of the last computed size cannot serve all offered rows."""

    def add(self, rows: int, budget_s: float) -> None:
        """Add an arrived request, accepted or rejected; `budget_s` is the time until its deadline."""
        self._arrivals.add(rows)
        if budget_s > self._row_s:
            self._mean_inverse_budget += (1 / max(budget_s, 1e-4) - self._mean_inverse_budget) * _NEWEST_WEIGHT

    @property
    def budget_s(self) -> float:
        """Typical time that requests have until their deadline."""
        return 1 / self._mean_inverse_budget if self._mean_inverse_budget > 1e-9 else math.inf

    def max_rows(self, now: float, cost: CostCurve, most: int, instances: int) -> int:
        """Return the rows of one batch: `most`, unless fewer complete more requests in time."""
        if now >= self._until:
            self._recompute(now, cost, most, instances)
        return self._rows

    def _recompute(self, now: float, cost: CostCurve, most: int, instances: int) -> None:
        self._until = now + _RECOMPUTE_S
        rate = self._arrivals.per_second(now) / instances
        self._rows, self.is_overloaded = most, False
        if cost.is_known:
            self._row_s = cost.expected(1)
            self._rows = best_rows(cost, most, rate, USABLE_SHARE * self.budget_s)
            self.is_overloaded = rate * cost.expected(self._rows) > self._rows


def best_rows(cost: CostCurve, most: int, rate: float, budget_s: float) -> int:
    """Return the smallest number of rows that completes nearly as many in time as any up to `most`.

    Where all offered rows can be served with headroom: the largest number that completes all of them in time.

    Args:
        rate: rows offered to an instance in a second.
        budget_s: from a row's arrival to its result; infinite: `most` is best.
    """
    if budget_s == math.inf or budget_s <= cost.expected(1) or not rate:
        return most
    sizes = [size for size in _SIZES if size < most] + [most]
    in_time = [_in_time(size, cost, rate, budget_s) for size in sizes]
    found = list(zip(sizes, in_time, strict=True))
    if max(in_time) >= _HEADROOM * rate:
        return next(size for size, rows in reversed(found) if rows >= _HEADROOM * rate)
    return next(size for size, rows in found if rows >= _NEAR_BEST * max(in_time))


def _in_time(rows: int, cost: CostCurve, rate: float, budget_s: float) -> float:
    useful = rate * max(budget_s - cost.expected(rows), 0.0)
    return min(rows, useful) / max(cost.expected(rows), 1e-9)
