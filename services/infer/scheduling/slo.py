"""Batches for a goal: every request answered in time, at the highest throughput.

    now            latest feasible start                 due (of the earliest)
     |------ wait ------|<------- cost of the batch ------->|
            more rows come, if they are worth it

What waits is ordered by due time. A batch is the longest front whose cost still fits before the earliest due time in
it. It waits for company only where that pays: other work already keeps the instances busy, rows are likely to come
before the latest feasible start, and the cost curve says that they make each row cheaper. A lone request on an idle server
therefore runs at once. Requests that can be in time no more do not make others late: they neither shorten a batch nor
hasten it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from services.infer.scheduling.batcher import BatchCandidate, BatchPolicy, Decision, Run, Wait
from services.infer.scheduling.cost import CostCurve

_HANDOVER_S = 0.0005
# From the decision to the model's first step, and from its last to the answer.

_MIN_LOAD = 0.5
# Instances that are busy less than this of the time serve what comes, whatever the size of their batches.

_MIN_GAIN = 1.05
# A row must become at least this much cheaper to be worth waiting for.

_WINDOW_S = 0.1
# How far back the rate of arrivals looks.

_SLICE_S = 0.005


class Arrivals:
    """How many rows come in a second, of late."""

    __slots__ = ("_arrived_rows", "_since", "rate")

    def __init__(self) -> None:
        self.rate = 0.0
        self._arrived_rows = 0
        self._since = -math.inf

    def add(self, rows: int) -> None:
        self._arrived_rows += rows

    def per_second(self, now: float) -> float:
        """The rate, brought up to `now`."""
        passed = now - self._since
        if passed == math.inf:
            self._since, self._arrived_rows = now, 0
        elif passed >= _SLICE_S:
            keep = math.exp(-passed / _WINDOW_S)
            self.rate = self.rate * keep + (self._arrived_rows / passed) * (1 - keep)
            self._since, self._arrived_rows = now, 0
        return self.rate


def decide(
    front: Sequence[BatchCandidate], now: float, policy: BatchPolicy, cost: CostCurve, *, rate: float, instances: int
) -> Decision:
    """What to do with the requests that make the next batch.

    Args:
        front: at least one request, and no more than may run together; earliest due first.
        rate: rows that come in a second.
        instances: executions that may run at the same time.
    """
    if not cost.is_known:
        return Run(len(front), "slo")
    count, rows, due = _fitting_prefix(front, now, cost)
    if count < len(front):
        return Run(count, "slo")
    if rows >= policy.max_rows:
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
    """How many requests can run together with none of them late that need not be; their rows, and the earliest due."""
    rows: list[int] = []
    due: list[float] = []
    total, earliest = 0, math.inf
    alone: dict[int, float] = {}
    for request in front:
        if request.rows not in alone:
            alone[request.rows] = now + cost.worst(request.rows)
        if alone[request.rows] <= request.due < earliest:
            earliest = request.due
        total += request.rows
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
