"""Batches for a goal: every request completed in time, at the highest throughput.

    now            latest feasible start                 due (of the earliest)
     |------ wait ------|<------- cost of the batch ------->|
            more rows arrive, if they are worth it

Queued requests are ordered by due time. A batch is the longest front whose cost still fits before the earliest due time
in it. The batch waits for more rows only where that pays: other work keeps the instances busy, rows are likely to
arrive before the latest feasible start, and the cost curve says that they make each row cheaper. A lone request on an
idle server therefore runs immediately. Requests that can no longer be in time do not delay others: they neither
shorten a batch nor hasten it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from services.infer.scheduling.batcher import BatchCandidate, BatchPolicy, Decision, Run, Wait
from services.infer.scheduling.cost import CostCurve

# From the decision to the model's first step, and from its last step to the response.
_HANDOVER_S = 0.0005

# Instances that are busy less than this part of the time can serve batches of any size.
_MIN_LOAD = 0.5

# A row must become at least this much cheaper to be worth waiting for.
_MIN_GAIN = 1.05

# Time constant of the arrival rate.
_WINDOW_S = 0.1

_SLICE_S = 0.005


class Arrivals:
    """Recent rate of arriving rows."""

    __slots__ = ("_arrived_rows", "_since", "rate")

    def __init__(self) -> None:
        self.rate = 0.0
        self._arrived_rows = 0
        self._since = -math.inf

    def add(self, rows: int) -> None:
        self._arrived_rows += rows

    def per_second(self, now: float) -> float:
        """Return the rate, updated to `now`."""
        passed = now - self._since
        if passed == math.inf:
            self._since, self._arrived_rows = now, 0
        elif passed >= _SLICE_S:
            keep = math.exp(-passed / _WINDOW_S)
            self.rate = self.rate * keep + (self._arrived_rows / passed) * (1 - keep)
            self._since, self._arrived_rows = now, 0
        return self.rate


def decide(
    front: Sequence[BatchCandidate],
    now: float,
    policy: BatchPolicy,
    cost: CostCurve,
    *,
    rate: float,
    instances: int,
    is_full: bool,
) -> Decision:
    """Decide about the requests of the next batch.

    Args:
        front: at least one request, and no more than may run together; earliest due first.
        rate: rows that arrive in a second.
        instances: executions that may run at the same time.
        is_full: as for `batcher.decide`.
    """
    if not cost.is_known:
        return Run(len(front), "slo")
    count, rows, due = _fitting_prefix(front, now, cost)
    if count < len(front):
        return Run(count, "slo")
    if is_full or rows >= policy.max_rows:
        return Run(count, "full")
    latest = due - cost.worst(rows) - _HANDOVER_S
    if due == math.inf or latest <= now:
        return Run(count, "slo")
    return Wait(latest) if _waiting_pays(rows, latest - now, policy, cost, rate, instances) else Run(count, "idle")


def _waiting_pays(rows: int, seconds: float, policy: BatchPolicy, cost: CostCurve, rate: float, instances: int) -> bool:
    each_s = cost.expected(rows) / rows
    if rate * each_s / instances < _MIN_LOAD:
        return False
    more = min(math.floor(rate * seconds), policy.max_rows - rows)
    return more >= 1 and each_s > _MIN_GAIN * cost.expected(rows + more) / (rows + more)


def _fitting_prefix(front: Sequence[BatchCandidate], now: float, cost: CostCurve) -> tuple[int, int, float]:
    """Return the number of requests that can run together in time, their rows, and the earliest due time."""
    rows: list[int] = []
    due: list[float] = []
    total, earliest = 0, math.inf
    alone: dict[int, float] = {}
    for queued in front:
        if queued.rows not in alone:
            alone[queued.rows] = now + cost.worst(queued.rows)
        if alone[queued.rows] <= queued.due < earliest:
            earliest = queued.due
        total += queued.rows
        rows.append(total)
        due.append(earliest)
    # A longer front takes longer and is due earlier: what fits is a prefix.
    low, high = 1, len(front)
    while low < high:
        middle = (low + high + 1) // 2
        if now + cost.worst(rows[middle - 1]) <= due[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low, rows[low - 1], due[low - 1]
