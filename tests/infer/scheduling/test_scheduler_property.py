"""What always holds of the scheduler, whatever comes, in whatever order: in simulated time, with every policy."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.rules import Level, Rules
from shoal.errors import DeadlineExceeded, Internal, ResourceExhausted
from tests.infer.scheduling.virtual_time import Bench, call, run
from tests.long_form import by_form


@dataclass(frozen=True)
class Arrival:
    """One call of a story."""

    gap_s: float
    rows: int
    key: str
    tenant: str
    priority: int
    timeout_us: int
    deadline_s: float
    cancel_s: float
    is_poison: bool


@dataclass
class Told:
    """What became of it."""

    id: int
    arrival: Arrival
    at: float
    expires: float = math.inf
    deadline: float = math.inf
    outcomes: list[Any] = field(default_factory=list)
    cancelled_at: float = math.inf
    place: int = 0
    """Its place in the order of the delivered outcomes."""


def times(*seconds: float) -> st.SearchStrategy[float]:
    return st.sampled_from(seconds)


arrivals = st.lists(
    st.builds(
        Arrival,
        gap_s=times(0.0, 0.0, 0.0, 0.0003, 0.001, 0.02),
        rows=st.integers(1, 5),
        key=st.sampled_from("aaab"),
        tenant=st.sampled_from(["", "", "gold", "free"]),
        priority=st.integers(0, 4),
        timeout_us=st.sampled_from([0, 0, 0, 500, 5_000]),
        deadline_s=times(math.inf, math.inf, 0.05, 0.004, 0.001),
        cancel_s=times(math.inf, math.inf, math.inf, 0.0, 0.0005, 0.003),
        is_poison=st.sampled_from([False] * 9 + [True]),
    ),
    max_size=60,
)


def long_story(seed: int, calls: int, rate: float, calm: bool) -> list[Arrival]:
    """Many calls, about `rate` a second, in bursts; `calm`: none is poison, cancelled or in a hurry."""
    dice = random.Random(seed)

    def rarely(*values: Any, usual: Any) -> Any:
        return usual if calm or dice.random() < 0.8 else dice.choice(values)

    return [
        Arrival(
            gap_s=0.0 if dice.random() < 0.5 else dice.expovariate(rate / 2),
            rows=dice.choice([1, 1, 1, 2, 3]),
            key=dice.choice("aaaaaab"),
            tenant=dice.choice(["", "gold", "free", "free"]),
            priority=dice.randint(0, 4),
            timeout_us=rarely(1_000, 10_000, usual=0),
            deadline_s=rarely(0.05, 0.01, usual=1.0),
            cancel_s=rarely(0.0, 0.001, 0.01, usual=math.inf),
            is_poison=rarely(True, usual=False) and dice.random() < 0.3,
        )
        for _ in range(calls)
    ]


long_stories = st.builds(
    long_story,
    seed=st.integers(0, 1 << 32),
    calls=st.integers(100, 300),
    rate=st.sampled_from([100.0, 1000.0, 10_000.0]),
    calm=st.booleans(),
)

policies = st.one_of(
    st.just(BatchPolicy(8, 1 << 20)),
    st.just(BatchPolicy(1, 1 << 20)),
    st.builds(
        BatchPolicy,
        max_rows=st.integers(1, 12),
        max_bytes=st.sampled_from([40, 1 << 20]),
        delay_s=times(0.0, 0.0005, 0.01),
        preferred=st.frozensets(st.integers(1, 8), max_size=2),
    ),
    st.builds(BatchPolicy, max_rows=st.integers(1, 12), max_bytes=st.just(1 << 20), slo_s=times(0.002, 0.01, 0.1)),
)

levels = st.builds(
    Level,
    timeout_s=times(math.inf, math.inf, 0.002),
    delays=st.booleans(),
    allows_override=st.booleans(),
    calls=st.sampled_from([0, 0, 4]),
)

rules = st.builds(
    Rules,
    levels=st.lists(levels, min_size=1, max_size=3).map(tuple),
    aging_s=times(math.inf, 1.0, 0.001),
    preserves_order=st.booleans(),
    weights=st.just({"gold": 4.0}),
)


async def play(story: list[Arrival], bench: Bench, rules: Rules) -> list[Told]:
    loop = asyncio.get_running_loop()
    told: list[Told] = []
    places = count()

    async def one(one: Told) -> None:
        a = one.arrival
        made = call(one.id, a.rows, key=a.key, timeout_us=a.timeout_us, priority=a.priority)
        try:
            one.outcomes.append(await bench.scheduler.submit(made, one.deadline, a.tenant))
            one.place = next(places)
        except Exception as err:
            one.outcomes.append(err)
        except asyncio.CancelledError as err:
            one.outcomes.append(err)

    def cancel(one: Told, task: asyncio.Task[None]) -> None:
        if task.cancel():
            one.cancelled_at = loop.time()

    async with bench.scheduler:
        tasks = []
        for id, arrival in enumerate(story, 1):
            if arrival.gap_s:
                await asyncio.sleep(arrival.gap_s)
            now = loop.time()
            level = rules.levels[rules.level(arrival.priority)]
            made = Told(id, arrival, now, deadline=now + arrival.deadline_s)
            timeout = level.timeout_s
            if arrival.timeout_us and level.allows_override:
                timeout = min(timeout, arrival.timeout_us / 1e6)
            made.expires = made.deadline if level.delays else min(made.deadline, now + timeout)
            if arrival.is_poison:
                bench.model.poison.add(float(id))
            told.append(made)
            task = asyncio.create_task(one(made))
            tasks.append(task)
            if arrival.cancel_s != math.inf:
                loop.call_later(arrival.cancel_s, cancel, made, task)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return told


@settings(max_examples=by_form(100, 300), deadline=None)
@given(
    story=arrivals | long_stories,
    policy=policies,
    rules=rules,
    instances=st.integers(1, 3),
    calls=st.sampled_from([3, 2048]),
    each_s=times(0.0001, 0.001),
    fixed_s=times(0.0, 0.002),
)
def test_any_traffic_keeps_the_schedulers_promises(story, policy, rules, instances, calls, each_s, fixed_s):
    async def main():
        limits = QueueLimits(calls=calls)
        bench = Bench(lambda rows: fixed_s + rows * each_s, policy, limits, rules, instances=instances)
        return await play(story, bench, rules), bench

    told, bench = run(main())
    check(told, bench, policy, rules)


def check(told: list[Told], bench: Bench, policy: BatchPolicy, rules: Rules) -> None:
    by_id = {one.id: one for one in told}
    for one in told:
        check_outcome(one)
    for at, values in bench.model.runs:
        ids = list(dict.fromkeys(int(value) for value in values))
        # Rows lie in the order of their calls, whole.
        assert values == [id + n / 1000 for id in ids for n in range(by_id[id].arrival.rows)]
        if len(ids) > 1:
            assert len(values) <= policy.max_rows
            assert len(values) * 8 <= policy.max_bytes
            assert len({by_id[id].arrival.key for id in ids}) == 1
        for id in ids:
            assert at < by_id[id].expires
            assert at <= by_id[id].cancelled_at
    assert bench.statistics.expired_executed == 0
    succeeded = [one for one in told if not isinstance(one.outcomes[0], BaseException)]
    executed = [int(value) for _, values in bench.model.runs for value in values if value == int(value)]
    innocent = [id for id in executed if not by_id[id].arrival.is_poison]
    if not any(one.arrival.is_poison for one in told):
        # None twice; nothing for nobody, but for those who left while it ran.
        assert len(innocent) == len(set(innocent))
    assert {one.id for one in succeeded} <= set(innocent)
    left = {one.id for one in told if one.cancelled_at < math.inf}
    assert set(innocent) - {one.id for one in succeeded} <= left | {one.id for one in told if one.expires < math.inf}
    assert bench.statistics.success.count >= len(succeeded)
    check_order(told, executed, policy, rules)
    if rules.preserves_order:
        # A cancelled caller gets a result that exists already, before those of earlier requests are delivered.
        for tenant in {one.arrival.tenant for one in succeeded}:
            stayed = [one for one in succeeded if one.arrival.tenant == tenant and one.cancelled_at == math.inf]
            places = [one.place for one in stayed]
            assert places == sorted(places)


def check_outcome(one: Told) -> None:
    assert len(one.outcomes) == 1, "exactly one outcome"
    (outcome,) = one.outcomes
    if isinstance(outcome, asyncio.CancelledError):
        assert one.cancelled_at < math.inf
    elif isinstance(outcome, DeadlineExceeded):
        assert one.expires < math.inf
    elif isinstance(outcome, ResourceExhausted):
        assert outcome.retry_after_ms is not None
        assert outcome.retry_after_ms > 0
    elif isinstance(outcome, Internal):
        assert one.arrival.is_poison
    else:
        assert not isinstance(outcome, BaseException), outcome
        assert not one.arrival.is_poison
        assert outcome.outputs[0][:, 0].tolist() == [2 * (one.id + n / 1000) + 1 for n in range(one.arrival.rows)]
        assert outcome.fired


def check_order(told: list[Told], executed: list[int], policy: BatchPolicy, rules: Rules) -> None:
    """First come, first run, within tenant, level and key; but for goals (due time) and levels that delay."""
    if policy.has_goal or any(level.delays for level in rules.levels):
        return
    first: dict[int, int] = {}
    for place, id in enumerate(executed):
        first.setdefault(id, place)
    groups: dict[Any, list[int]] = {}
    for one in told:
        if one.id in first:
            a = one.arrival
            groups.setdefault((a.tenant, rules.level(a.priority), a.key), []).append(first[one.id])
    assert all(places == sorted(places) for places in groups.values())
