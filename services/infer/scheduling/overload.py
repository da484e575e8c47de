"""How large a batch may be while more is asked than can be done, so that as much as possible is answered in time.

    seconds since its arrival    0         waits          taken            answered      budget
                                 |--------------------------|-- cost(b) ------|--- spare ---|

With batches of b rows, a row that is taken must have come within the last budget - cost(b): of the rows offered only so
many are of use when an instance turns to them. In time are then, for each second and instance,

    min(b, rate * (budget - cost(b)) / instances) / cost(b)

Large batches are cheap by the row, and too large ones leave no time to wait for them. The least b that reaches nearly
the most is taken: what is left to spare is worth more than a hundredth of throughput. But where all that comes can be
done with ease, it is the largest b with which that is so: requests that came together are not kept waiting for each other.
"""

from __future__ import annotations

import math

from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.slo import Arrivals

SPARE = 0.9
"""The part of a budget that plans may use up: clocks, networks and forecasts err."""

_BACKLOG_SPARE = 0.6
_BACKLOG_BATCHES = 3
# The part that is used up where so many batches wait already: they keep the instances busy, and what would come in at
# the last moment is better refused.

_HEADROOM = 1.1
# So many times the rows that are offered.

_NEAR_BEST = 0.98
_NEWEST_WEIGHT = 0.02
# Weight of the newest request in the mean of the budgets.

_RECOMPUTE_S = 0.05
# So often a new size is looked for.

_SIZES = (1, *(size for power in range(1, 13) for size in (1 << power, 3 << (power - 1))))
# 1, 2, 3, 4, 6, 8, 12, ...


def spare_of(ahead_s: float, batch_s: float) -> float:
    """The part of its time that a request may be planned to take, when `ahead_s` of work in batches waits before it."""
    return _BACKLOG_SPARE if ahead_s > _BACKLOG_BATCHES * batch_s else SPARE


class Pressure:
    """What is asked of a model while none of its instances is free."""

    __slots__ = ("_arrivals", "_mean_inverse_budget", "_row_s", "_rows", "_until", "is_overloaded")

    def __init__(self) -> None:
        self._arrivals = Arrivals()
        self._mean_inverse_budget = 0.0  # Mean of 1 / budget: requests without a deadline count as in no hurry at all.
        self._row_s = 0.0  # One row takes so long: who has less cannot be helped, and says nothing of the others.
        self._rows = 0
        self._until = -math.inf
        self.is_overloaded = False
        """More came, when `max_rows` last looked, than can be done in batches of so many rows."""

    def add(self, rows: int, budget_s: float) -> None:
        """A request that came, whether it was taken or not; `budget_s`: until its deadline."""
        self._arrivals.add(rows)
        if budget_s > self._row_s:
            self._mean_inverse_budget += (1 / max(budget_s, 1e-4) - self._mean_inverse_budget) * _NEWEST_WEIGHT

    @property
    def budget_s(self) -> float:
        """How long requests have, by and large."""
        return 1 / self._mean_inverse_budget if self._mean_inverse_budget > 1e-9 else math.inf

    def max_rows(self, now: float, cost: CostCurve, most: int, instances: int) -> int:
        """Rows for one batch: `most`, unless less gets more requests answered in time."""
        if now >= self._until:
            self._recompute(now, cost, most, instances)
        return self._rows

    def _recompute(self, now: float, cost: CostCurve, most: int, instances: int) -> None:
        self._until = now + _RECOMPUTE_S
        rate = self._arrivals.per_second(now) / instances
        self._rows, self.is_overloaded = most, False
        if cost.is_known:
            self._row_s = cost.expected(1)
            self._rows = best_rows(cost, most, rate, SPARE * self.budget_s)
            self.is_overloaded = rate * cost.expected(self._rows) > self._rows


def best_rows(cost: CostCurve, most: int, rate: float, budget_s: float) -> int:
    """The least number of rows that gets nearly as many answered in time as any up to `most`.

    Where that is more than come, with ease: the largest that gets all of them answered in time.

    Args:
        rate: rows that are offered to an instance in a second.
        budget_s: from a row's arrival to its answer; infinite: `most` is best.
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
