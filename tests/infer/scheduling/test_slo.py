"""A stated goal is met, at the highest throughput; what cannot be met is refused in time. In simulated time."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.scheduling import slo
from services.infer.scheduling.batcher import BatchPolicy, Run, Wait
from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.rules import Level, Rules
from shoal.errors import DeadlineExceeded, ResourceExhausted
from tests.infer.scheduling.virtual_time import Bench, call, run

MS = 1e-3


@dataclass(frozen=True)
class Call:
    rows: int
    due: float


def curve(fixed_s: float, row_s: float, most: int = 64) -> CostCurve:
    made = CostCurve()
    for rows in range(1, most + 1):
        made.add(rows, fixed_s + row_s * rows)
    return made


GOAL = BatchPolicy(64, 1 << 30, slo_s=0.05)


def decide(calls, now, cost, *, rate=0.0, instances=1, is_full=False):
    return slo.decide(calls, now, GOAL, cost, rate=rate, instances=instances, is_full=is_full)


def test_a_lone_request_on_an_idle_server_runs_immediately():
    assert decide([Call(1, 0.05)], 0.0, curve(5 * MS, 1e-5)) == Run(1, "idle")


def test_on_a_busy_server_it_waits_as_long_as_the_goal_allows():
    decision = decide([Call(1, 0.05)], 0.0, curve(5 * MS, 1e-5), rate=1000.0)
    assert isinstance(decision, Wait)
    assert 0.04 < decision.until < 0.045
    assert decide([Call(1, 0.05)], decision.until, curve(5 * MS, 1e-5), rate=1000.0) == Run(1, "slo")


def test_it_does_not_wait_for_rows_that_find_no_room():
    assert decide([Call(1, 0.05)], 0.0, curve(5 * MS, 1e-5), rate=1000.0, is_full=True) == Run(1, "full")


def test_it_does_not_wait_while_the_instances_are_hardly_busy():
    # Three would come before the latest start; but serving them one by one takes a third of the time.
    assert decide([Call(1, 0.05)], 0.0, curve(5 * MS, 1e-5), rate=70.0) == Run(1, "idle")
    assert isinstance(decide([Call(1, 0.05)], 0.0, curve(5 * MS, 1e-5), rate=140.0), Wait)


def test_the_earliest_goal_goes_first():
    async def main():
        bench = Bench(lambda rows: 0.01, BatchPolicy(1, 1 << 30, slo_s=0.1), QueueLimits())
        async with bench.scheduler:
            deadlines = [math.inf, math.inf, 0.05, 0.08]
            await asyncio.gather(*(bench.scheduler.submit(call(n), at) for n, at in enumerate(deadlines)))
        return [int(values[0]) for _, values in bench.model.runs]

    # All are there before the first runs.
    assert run(main()) == [2, 3, 0, 1]


def test_it_does_not_wait_where_more_rows_gain_nothing():
    # In proportion to rows: a batch is no cheaper than its calls.
    assert decide([Call(1, 0.05)], 0.0, curve(0.0, 5 * MS), rate=1000.0) == Run(1, "idle")


def test_it_does_not_wait_before_costs_are_known():
    assert isinstance(decide([Call(1, 0.05)], 0.0, curve(1.0, 1.0, most=3), rate=1e6), Run)


def test_a_batch_is_as_large_as_its_earliest_goal_allows():
    calls = [Call(1, 0.0085)] + [Call(1, 0.05)] * 30
    assert decide(calls, 0.0, curve(0.0, 1 * MS)) == Run(8, "slo")


def test_a_request_that_is_late_anyway_delays_no_other():
    # The first can be in time no more: it neither hastens nor shortens the batch.
    calls = [Call(1, -1.0)] + [Call(1, 0.05)] * 30
    assert decide(calls, 0.0, curve(0.0, 1 * MS)) == Run(31, "idle")


@given(
    dues=st.lists(st.tuples(st.integers(1, 4), st.floats(-0.1, 0.2)), min_size=1, max_size=16),
    fixed=st.sampled_from([0.0, 0.001, 0.02]),
    each=st.sampled_from([0.0001, 0.002, 0.01]),
    rate=st.sampled_from([0.0, 100.0, 10_000.0]),
    instances=st.integers(1, 4),
)
def test_no_decision_makes_a_feasible_request_late(dues, fixed, each, rate, instances):
    cost = curve(fixed, each)
    calls = [Call(rows, due) for rows, due in sorted(dues, key=lambda one: one[1])]
    decision = decide(calls, 0.0, cost, rate=rate, instances=instances)
    feasible = [one for one in calls if cost.worst(one.rows) <= one.due]
    if isinstance(decision, Run):
        batch = calls[: decision.count]
        seconds = cost.worst(sum(one.rows for one in batch))
        assert len(batch) == 1 or all(seconds <= one.due for one in batch if one in feasible)
    else:
        seconds = cost.worst(sum(one.rows for one in calls))
        assert all(decision.until + seconds <= one.due for one in feasible)
        assert decision.until > 0.0


async def offered(bench: Bench, gaps: list[float], *, deadline_s: float = math.inf) -> list[tuple[float, object]]:
    """Submits a call after each gap; how long each was here, and its outcome."""
    loop = asyncio.get_running_loop()

    async def one(id: int) -> tuple[float, object]:
        began = loop.time()
        try:
            outcome: object = await bench.scheduler.submit(call(id), began + deadline_s)
        except (ResourceExhausted, DeadlineExceeded) as err:
            outcome = err
        return loop.time() - began, outcome

    async with bench.scheduler:
        tasks = []
        for id, gap in enumerate(gaps):
            if gap:
                await asyncio.sleep(gap)
            tasks.append(asyncio.create_task(one(id)))
        return list(await asyncio.gather(*tasks))


def warm(bench: Bench, cost) -> None:
    """It has served before."""
    for rows in range(1, 65):
        bench.scheduler.cost.add(rows, cost(rows))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    load=st.sampled_from([0.1, 0.4, 0.7]),
    fixed_s=st.sampled_from([0.0005, 0.003]),
    row_s=st.sampled_from([0.00005, 0.0003]),
    slack=st.sampled_from([2.5, 5.0]),
    instances=st.integers(1, 2),
)
def test_feasible_requests_are_in_time(seed, load, fixed_s, row_s, slack, instances):
    dice = random.Random(seed)

    def cost(rows: int) -> float:
        return fixed_s + rows * row_s

    goal = slack * cost(32)
    rate = load * instances * 32 / cost(32)
    gaps = [dice.expovariate(rate) for _ in range(400)]

    async def main():
        policy = BatchPolicy(32, 1 << 30, slo_s=goal)
        bench = Bench(cost, policy, QueueLimits(), instances=instances)
        warm(bench, cost)
        return await offered(bench, gaps), bench

    outcomes, bench = run(main())
    late = [seconds for seconds, outcome in outcomes if isinstance(outcome, Exception) or seconds > goal * 1.0001]
    assert late == []
    assert bench.statistics.shed == 0


def test_waiting_pays_in_fewer_runs():
    def cost(rows: int) -> float:
        return 0.004 + rows * 0.00001

    def runs(slo_s: float) -> int:
        async def main():
            bench = Bench(cost, BatchPolicy(64, 1 << 30, slo_s=slo_s), QueueLimits(), instances=4)
            warm(bench, cost)
            outcomes = await offered(bench, [0.0005] * 2000)
            assert all(seconds <= slo_s for seconds, _ in outcomes)
            return len(bench.model.runs)

        return run(main())

    assert runs(0.05) < 0.6 * runs(math.inf)


@pytest.mark.parametrize("slo_s", [0.05, 0.002])
def test_a_lone_request_never_waits(slo_s):
    async def main():
        bench = Bench(lambda rows: 0.003, BatchPolicy(64, 1 << 30, slo_s=slo_s), QueueLimits())
        return await offered(bench, [0.005] * 100)

    assert all(seconds == pytest.approx(0.003) for seconds, _ in run(main()))


def test_an_idle_server_rejects_no_request_whatever_the_learned_costs():
    async def main():
        bench = Bench(lambda rows: 1.0, BatchPolicy(1, 1 << 30), QueueLimits())
        for _ in range(20):
            bench.scheduler.cost.add(1, 1.0)
            bench.scheduler._backlog.add(1, 1.0)
        return await offered(bench, [0.0], deadline_s=0.01)

    ((_, outcome),) = run(main())
    assert not isinstance(outcome, Exception)


def test_a_goal_that_cannot_be_met_rejects_no_request():
    async def main():
        bench = Bench(lambda rows: 0.1, BatchPolicy(1, 1 << 30, slo_s=0.01), QueueLimits())
        return await offered(bench, [0.0] * 50)

    assert not any(isinstance(outcome, Exception) for _, outcome in run(main()))


def test_results_keep_the_order_of_arrival_with_preserve_ordering():
    async def main():
        slow = iter([0.5, 0.1, 0.1, 0.1])
        rules = Rules(preserves_order=True)
        bench = Bench(lambda rows: next(slow), BatchPolicy(1, 1 << 30), QueueLimits(), rules, instances=2)
        order = []
        async with bench.scheduler:
            tasks = [asyncio.create_task(bench.scheduler.submit(call(n))) for n in range(4)]
            for n, task in enumerate(tasks):
                task.add_done_callback(lambda task, n=n: order.append((n, asyncio.get_running_loop().time())))
            await asyncio.gather(*tasks)
        return order

    assert [n for n, _ in run(main())] == [0, 1, 2, 3]


def test_with_preserve_ordering_the_queue_of_a_tenant_delays_no_answer_to_another():
    async def main():
        bench = Bench(lambda rows: 0.1, BatchPolicy(1, 1 << 30), QueueLimits(), Rules(preserves_order=True))
        order = []
        async with bench.scheduler:

            async def one(tenant, n):
                await bench.scheduler.submit(call(n), tenant=tenant)
                order.append(tenant + str(n))

            flood = [asyncio.create_task(one("flood", n)) for n in range(20)]
            await asyncio.sleep(0)
            await one("other", 0)
            await asyncio.gather(*flood)
        return order

    order = run(main())
    assert order.index("other0") < 3
    assert [each for each in order if each != "other0"] == [f"flood{n}" for n in range(20)]


def test_a_level_that_delays_runs_what_timed_out_after_the_others():
    async def main():
        rules = Rules(levels=(Level(timeout_s=0.5, delays=True),), aging_s=math.inf)
        bench = Bench(lambda rows: 1.0, BatchPolicy(1, 1 << 30), QueueLimits(), rules)
        async with bench.scheduler:
            tasks = []
            for n in range(3):
                tasks.append(asyncio.create_task(bench.scheduler.submit(call(n))))
                await asyncio.sleep(0.3)
            await asyncio.gather(*tasks)
        return [int(values[0]) for _, values in bench.model.runs]

    # At 1.0, the second has waited 0.7 s: it lets the third go first.
    assert run(main()) == [0, 2, 1]


@pytest.mark.parametrize("delay_us", [100, 300, 900, 2500])
def test_delays_below_a_millisecond_are_what_they_say(delay_us):
    async def main():
        bench = Bench(lambda rows: 0.001, BatchPolicy(8, 1 << 30, delay_s=delay_us / 1e6), QueueLimits())
        outcomes = await offered(bench, [0.0, delay_us / 2e6, 0.0])
        return outcomes, bench.model.runs

    outcomes, runs = run(main())
    assert runs == [(pytest.approx(delay_us / 1e6), [0.0, 1.0, 2.0])]
    assert {outcome.fired for _, outcome in outcomes} == {"delay"}
