"""Batches that take long: they are as large as saves time, and others do not wait for what saves none."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest

from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.execution import Execution
from services.infer.scheduling.long_batches import LONG_S, LongBatches
from services.infer.scheduling.queue import QueuedRequest, QueueLimits
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from tests.infer.scheduling.test_fairness_property import Receiver, queue
from tests.infer.scheduling.virtual_time import SIGNATURE, Model, SimulatedWorker, call, run

MB = 1_000_000
Cost = Callable[[Sequence[int]], float]


def proportional(sizes: Sequence[int]) -> float:
    """Of texts: 0.6 s for a megabyte, and nothing is saved."""
    return 0.001 + sum(sizes) * 0.6e-6


def constant(sizes: Sequence[int]) -> float:
    """Of a device that is far from full."""
    return 0.4


def parallel(sizes: Sequence[int]) -> float:
    """Of four processors, each with a row at a time."""
    return 0.3 * math.ceil(len(sizes) / 4)


class Worker(SimulatedWorker):
    """An instance whose batches take as long as the bytes of their requests say, and that remembers these."""

    def __init__(
        self, execution: Execution, loop: asyncio.AbstractEventLoop, cost: Cost, runs: list[list[int]]
    ) -> None:
        super().__init__(execution, loop, lambda rows: 0)
        self._cost_of, self._runs = cost, runs

    def seconds(self, jobs: Sequence[Any]) -> float:
        sizes = [job.request.size_bytes for job in jobs]
        self._runs.append(sizes)
        return self._cost_of(sizes)


def request(size_bytes: int) -> InferenceRequest:
    return replace(call(1), size_bytes=size_bytes)


class World:
    """A scheduler in simulated time, with callers that send their next request on a response."""

    def __init__(self, cost: Cost, policy: BatchPolicy | None = None) -> None:
        self.clock = asyncio.get_running_loop().time
        self.runs: list[list[int]] = []
        model = Model(self.clock)
        self.scheduler = Scheduler(
            "m",
            lambda: Execution("m", model, SIGNATURE, self.clock),
            policy or BatchPolicy(64, 64 << 20),
            QueueLimits(),
            Rules(),
            statistics=Statistics(),
            clock=self.clock,
            worker=lambda execution, loop, name: Worker(execution, loop, cost, self.runs),
        )

    async def call(self, size_bytes: int, times: int, tenant: str = "", pause_s: float = 0.0) -> list[float]:
        """Return the seconds of each call."""
        waits = []
        for _ in range(times):
            begun = self.clock()
            await self.scheduler.submit(request(size_bytes), tenant=tenant)
            waits.append(self.clock() - begun)
            await asyncio.sleep(pause_s)
        return waits


def runs_of(cost: Cost, callers: int, size_bytes: int = MB, times: int = 60) -> tuple[list[int], float]:
    """Return the number of requests in each batch, and the seconds of all."""

    async def main() -> tuple[list[int], float]:
        world = World(cost)
        async with world.scheduler:
            await asyncio.gather(*[world.call(size_bytes, times) for _ in range(callers)])
        return [len(sizes) for sizes in world.runs], world.clock()

    return run(main())


def test_large_rows_that_save_nothing_together_run_alone():
    made, _ = runs_of(proportional, 16)
    assert sum(made) == 16 * 60
    # Now and then two run together: it is tried again.
    assert max(made) == 2
    assert made.count(2) < 20


@pytest.mark.parametrize("size_bytes", [100, MB])
@pytest.mark.parametrize("cost", [constant, parallel])
def test_a_batch_is_as_large_as_saves_time(cost, size_bytes):
    """Whoever sends the next request on a response joins every other batch: both together have sixteen at best."""
    made, seconds = runs_of(cost, 16, size_bytes)
    assert sum(made) == 16 * 60
    assert seconds < 1.1 * 60 * (cost([MB] * 15) + cost([MB]))


def test_a_slow_first_run_is_forgotten():
    """A model may compile what it runs for the first time."""
    seen = set()

    def compiling(sizes: Sequence[int]) -> float:
        is_new = len(sizes) not in seen
        seen.add(len(sizes))
        return 4.0 if is_new else 0.4

    made, _ = runs_of(compiling, 16, times=200)
    assert mean(made[len(made) // 2 :]) > 7.9


def test_short_batches_are_as_large_as_the_policy_allows():
    made, _ = runs_of(lambda sizes: 0.001 * len(sizes), 64, 100)
    assert mean(made) > 30


def test_a_caller_with_little_waits_for_one_large_row():
    async def main() -> tuple[list[float], int]:
        world = World(proportional)
        async with world.scheduler:
            heavy = [asyncio.ensure_future(world.call(MB, 40, "heavy")) for _ in range(16)]
            await asyncio.sleep(0.1)
            waits = await world.call(10, 50, "light", pause_s=0.05)
            done = sum(len(sizes) for sizes in world.runs if sizes[0] == MB)
            await asyncio.gather(*heavy)
        return waits, done

    waits, done = run(main())
    # One text of a megabyte takes 0.6 s; two run together now and then.
    assert sorted(waits)[-8] < 0.62
    assert max(waits) < 1.3
    # The large ones go on meanwhile.
    assert done >= 25


def test_with_a_queue_delay_a_batch_that_is_cut_waits_for_nobody():
    async def main() -> tuple[list[float], list[list[int]]]:
        world = World(proportional, BatchPolicy(64, 64 << 20, delay_s=0.2))
        async with world.scheduler:
            await world.call(MB, 1)
            await asyncio.gather(*[world.call(MB, 1) for _ in range(6)])
            begun = world.clock()
            await asyncio.gather(*[world.call(MB, 1) for _ in range(4)])
        return world.clock() - begun, world.runs

    seconds, runs = run(main())
    assert max(map(len, runs)) <= 2
    # Only the last one, with none behind it, waits for others.
    assert seconds < 4 * 0.601 + 0.2 + 0.01


def test_the_first_batch_of_large_rows_is_small():
    """Before anything is known: sixteen texts may take ten seconds."""
    long = LongBatches()
    assert long.joins(300_000, 200_000, is_alone=True, now=0.0)
    assert not long.joins(300_000, 300_000, is_alone=True, now=0.0)


def test_what_is_known_to_be_fast_is_not_long():
    long = LongBatches()
    long.add(1, MB, 0.01, 0.0)
    assert long.from_bytes == pytest.approx(10 * MB)
    assert long.joins(4 * MB, 5 * MB, is_alone=False, now=0.0)
    assert not long.joins(8 * MB, 8 * MB, is_alone=False, now=0.0)


def test_a_run_that_was_long_by_chance_is_forgotten():
    long = LongBatches()
    long.add(1, 100, 0.8, 0.0)
    assert long.from_bytes < 100
    for _ in range(4):
        long.add(1, 100, 0.001, 0.0)
    assert long.from_bytes > 100


def test_trials_become_rare_and_are_of_two_of_about_one_size():
    long, now, trials = LongBatches(), 0.0, []
    long.add(1, MB, 0.6, now)
    while now < 600:
        if long.joins(MB, MB, is_alone=True, now=now):
            trials.append(now)
            now += 1.2
            long.add(2, 2 * MB, 1.2, now)
        else:
            now += 0.6
            long.add(1, MB, 0.6, now)
    assert 10 < len(trials) < 20
    assert trials[-1] - trials[-2] > 59
    now += 100
    assert long.joins(MB, MB, is_alone=True, now=now)
    assert not long.joins(2 * MB, MB, is_alone=False, now=now)
    assert not long.joins(10, MB, is_alone=True, now=now)
    assert not long.joins(MB, 10, is_alone=True, now=now)


def test_a_request_of_no_bytes_and_a_run_of_no_time_are_learned():
    long = LongBatches()
    long.add(1, 0, 2 * LONG_S, 0.0)
    long.add(1, 1 << 30, 0.0, 0.0)
    long.add(1, 0, 0.0, 0.0)
    assert long.from_bytes >= 0
    assert long.joins(1 << 20, 1 << 20, is_alone=True, now=0.0)


def test_tenants_and_connections_share_by_bytes_where_rows_are_large():
    """For a row of a megabyte, another tenant has 62 rows of little."""
    waiting = queue()
    for n in range(100):
        waiting.add(QueuedRequest(request(MB), float(n), math.inf, Receiver()), "heavy", lambda: 7)
        waiting.add(QueuedRequest(request(10), float(n), math.inf, Receiver()), "light", lambda: 7)
    order = []
    while len(order) < 100:
        batch = waiting.take(100.0, max_rows=1)
        order += [queued.tenant for queued in batch.requests]
    assert order.count("heavy") == 2
