"""Overload: the requests for which there is capacity are completed in time. In simulated time."""

from __future__ import annotations

import asyncio
import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.infer.requests.outcome import InferenceResult
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.overload import Pressure, best_rows
from services.infer.scheduling.queue import QueueLimits
from shoal.errors import DeadlineExceeded, ResourceExhausted
from tests.infer.scheduling.test_slo import offered
from tests.infer.scheduling.virtual_time import Bench, call, run
from tests.long_form import by_form

STEADY = (1.0,)
JITTER = (0.8, 0.9, 1.0, 1.0, 1.1, 1.2)
SIZES = (1, 2, 4, 8, 16, 32, 64)


def curve(fixed_s: float, row_s: float) -> CostCurve:
    made = CostCurve()
    for size in (*SIZES, 64):
        made.add(size, fixed_s + row_s * size)
    return made


def in_time(rows: int, cost: CostCurve, rate: float, budget_s: float) -> float:
    useful = rate * max(budget_s - cost.expected(rows), 0.0)
    return min(min(rows, useful) / cost.expected(rows), rate)  # No more are completed than arrive.


def served(fixed_s: float, row_s: float, deadline_s: float, over: float, jitter: tuple[float, ...]):
    """Forty full batches' worth of time at `over` times their rate; outcomes, and what full batches would come to."""
    chance, dice = random.Random(3), random.Random(7)

    def cost(rows: int) -> float:
        return (fixed_s + rows * row_s) * chance.choice(jitter)

    capacity = 64 / (fixed_s + 64 * row_s)
    seconds = 40 * 64 / capacity

    async def main():
        bench = Bench(cost, BatchPolicy(64, 1 << 30), QueueLimits())
        for size in SIZES:  # As a model that has been warmed up.
            bench.scheduler.cost.add_trial(size, fixed_s + size * row_s)
        gaps = [dice.expovariate(over * capacity) for _ in range(int(over * capacity * seconds))]
        return await offered(bench, gaps, deadline_s=deadline_s), bench

    outcomes, bench = run(main())
    return outcomes, bench, capacity * seconds


@pytest.mark.parametrize(
    ("over", "jitter"),
    by_form([(1.2, STEADY), (5.0, JITTER)], [*product((1.2, 5.0), (STEADY, JITTER))]),
    ids=lambda value: {STEADY: "steady", JITTER: "jittery"}.get(value),
)
@pytest.mark.parametrize(
    ("fixed_s", "row_s", "deadline_s"),
    [(0.02, 0.001, 0.5), (0.0004, 0.00065, 0.05), (0.0005, 0.00011, 0.05)],
    ids=["long deadlines", "a full batch takes nearly as long as there is", "batching pays"],
)
def test_nearly_all_of_the_capacity_is_completed_in_time(fixed_s, row_s, deadline_s, over, jitter):
    outcomes, bench, capacity = served(fixed_s, row_s, deadline_s, over, jitter)
    succeeded = [seconds for seconds, outcome in outcomes if not isinstance(outcome, Exception)]
    on_time = sum(seconds <= deadline_s for seconds in succeeded)
    assert on_time >= 0.88 * capacity
    # Hardly anything is run in vain (the jitter is twice what plans leave to spare); whoever is refused is told so
    # while it can still go elsewhere.
    assert len(succeeded) - on_time <= 0.04 * on_time
    refused = [(seconds, err) for seconds, err in outcomes if isinstance(err, ResourceExhausted)]
    assert len(refused) > 0.95 * (len(outcomes) - len(succeeded))
    assert sum(seconds < deadline_s / 5 for seconds, _ in refused) > 0.75 * len(refused)
    assert all(err.retry_after_ms > 0 for _, err in refused)
    expired = sum(isinstance(err, DeadlineExceeded) for _, err in outcomes)
    assert (bench.statistics.shed, bench.statistics.expired) == (len(refused), expired)
    assert bench.statistics.expired_executed == 0


def test_a_batch_that_leaves_little_time_to_wait_for_it_is_still_run_full_enough():
    # One row takes 30 ms of the 50 that there are, 32 rows take 35: only what comes in the last 10 ms of a run is of
    # use to the next. Batches of one would complete 33 a second, batches of 64 are too late for nearly all.
    outcomes, _, capacity = served(0.03, 0.00015, 0.05, 2.0, (1.0,))
    on_time = sum(seconds <= 0.05 for seconds, outcome in outcomes if not isinstance(outcome, Exception))
    assert on_time > 0.4 * capacity


async def at_once(bench: Bench, count: int) -> list[InferenceResult]:
    deadline = asyncio.get_running_loop().time() + 0.05
    return list(await asyncio.gather(*[bench.scheduler.submit(call(n), deadline) for n in range(count)]))


def test_requests_that_arrive_together_run_together_after_the_overload():
    def cost(rows: int) -> float:
        return 0.001 + rows * 0.0001

    async def main():
        bench = Bench(cost, BatchPolicy(64, 1 << 30), QueueLimits())
        for size in SIZES:
            bench.scheduler.cost.add_trial(size, cost(size))
        async with bench.scheduler:
            for _ in range(200):  # More come while the model is busy.
                rush = asyncio.gather(*[at_once(bench, 4) for _ in range(2)])
                await asyncio.sleep(0.001)
                await asyncio.gather(at_once(bench, 4), rush)
            found = []
            for pause_s in (0.2, 1.0, 60.0):
                await asyncio.sleep(pause_s)
                found.append([outcome.times.rows for outcome in await at_once(bench, 16)])
        return found

    assert run(main()) == [[16] * 16] * 3


def test_requests_without_deadlines_get_the_largest_batches():
    pressure = Pressure()
    for n in range(1000):
        pressure.add(1, math.inf)
        assert pressure.max_rows(n / 100, curve(0.001, 0.001), 64, 1) == 64
    assert pressure.budget_s == math.inf


def test_a_few_short_deadlines_do_not_shrink_all_batches():
    cost, pressure = curve(0.001, 0.0006), Pressure()
    for n in range(5000):
        pressure.add(1, 0.05 if n % 50 == 0 else math.inf)
    assert pressure.max_rows(1.0, cost, 64, 1) == 64
    for _ in range(5000):
        pressure.add(1, 0.05)
    assert pressure.max_rows(2.0, cost, 64, 1) < 40


def test_hopeless_deadlines_do_not_shrink_batches():
    """A caller whose deadlines are shorter than one row takes is refused, and that is all."""
    cost, pressure = curve(0.001, 0.0001), Pressure()
    sizes = []
    for n in range(4_000):
        now = n / 20_000
        pressure.add(1, 0.05)
        sizes.append(pressure.max_rows(now, cost, 64, 1))
        if n > 2_000:
            pressure.add(1, 0.0005)
    assert pressure.budget_s == pytest.approx(0.05, rel=0.01)
    assert set(sizes[3_000:]) == set(sizes[1_000:2_000])


@given(
    fixed_s=st.floats(1e-5, 0.05),
    row_s=st.floats(1e-6, 0.005),
    rate=st.floats(1.0, 1e5),
    budget_s=st.floats(0.001, 1.0),
)
def test_no_other_size_gets_many_more_completed_in_time(fixed_s, row_s, rate, budget_s):
    cost = curve(fixed_s, row_s)
    best = best_rows(cost, 64, rate, budget_s)
    assert 1 <= best <= 64
    if cost.expected(1) < budget_s:
        most = max(in_time(rows, cost, rate, budget_s) for rows in SIZES)
        assert in_time(best, cost, rate, budget_s) >= 0.97 * most


def test_batches_are_not_shrunk_before_costs_are_known():
    pressure = Pressure()
    pressure.add(1, 0.01)
    assert pressure.max_rows(0.0, CostCurve(), 48, 1) == 48


def test_an_expired_request_is_never_counted_as_run():
    outcomes, bench, _ = served(0.0004, 0.00065, 0.002, 3.0, JITTER)
    assert sum(isinstance(outcome, DeadlineExceeded | ResourceExhausted) for _, outcome in outcomes) > 0
    assert bench.statistics.expired_executed == 0
