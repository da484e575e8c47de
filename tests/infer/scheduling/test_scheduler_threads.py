"""The scheduler with real threads and the real clock: callers that leave, run out, or bring poison, at once."""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np
import pytest

from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.execution import Execution
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.rules import Level, Rules
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from shoal.errors import DeadlineExceeded, Internal, ResourceExhausted
from tests.infer.scheduling.virtual_time import SIGNATURE, X, Y, call


class Model(Session):
    """y = 2x + 1, after a while of work. Numbers that end in 13 are poison."""

    inputs, outputs, text = (X,), (Y,), False

    def __init__(self, *, only_computes: bool) -> None:
        self.only_computes = only_computes
        self._matrix = np.ones((60, 60))

    def run(self, inputs, outputs):
        x = inputs["x"]
        for _ in range(5):
            self._matrix @ self._matrix
        if any(value % 100 == 13 for value in x[:, 0].tolist()):
            raise ModelFailed("thirteen")
        return [2 * x + 1]

    def close(self) -> None: ...


POLICIES = {
    "eager": BatchPolicy(16, 1 << 20),
    "delay": BatchPolicy(16, 1 << 20, delay_s=0.0004, preferred=frozenset({4})),
    "goal": BatchPolicy(16, 1 << 20, slo_s=0.02),
    "alone": BatchPolicy(1, 1 << 20),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("only_computes", [True, False], ids=["loop", "thread"])
@pytest.mark.parametrize("ordered", [False, True])
async def test_under_fire(policy, only_computes, ordered):
    dice = random.Random(f"{policy} {only_computes} {ordered}")
    model, statistics = Model(only_computes=only_computes), Statistics()
    rules = Rules((Level(),) * (1 if ordered else 3), preserves_order=ordered, weights={"gold": 3.0})
    scheduler = Scheduler(
        "m",
        lambda: Execution("m", model, SIGNATURE, time.monotonic),
        POLICIES[policy],
        QueueLimits(calls=100),
        rules,
        instances=2,
        statistics=statistics,
    )
    fates: dict[str, int] = {}

    async def one(id: int) -> None:
        deadline = time.monotonic() + dice.choice([0.001, 0.01, 30.0, 30.0])
        made = call(id, dice.randint(1, 3), key=dice.choice("aab"), priority=dice.randint(0, 3))
        try:
            result = await scheduler.submit(made, deadline, dice.choice(["", "gold", "free"]))
        except (DeadlineExceeded, ResourceExhausted, Internal) as err:
            fate = type(err).__name__
            assert fate != "Internal" or id % 100 == 13
        else:
            fate = "succeeded"
            assert result.outputs[0][:, 0].tolist() == (2 * made.inputs["x"] + 1)[:, 0].tolist()
        fates[fate] = fates.get(fate, 0) + 1

    async with scheduler:
        tasks = []
        for id in range(1, 1500):
            task = asyncio.create_task(one(id))
            tasks.append(task)
            if dice.random() < 0.1:
                asyncio.get_running_loop().call_later(dice.choice([0.0, 0.001]), task.cancel)
            if dice.random() < 0.1:
                await asyncio.sleep(0)
            if len(tasks) % 50 == 0:
                await asyncio.wait(tasks[-30:], return_when=asyncio.FIRST_COMPLETED)
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert [r for r in outcomes if r is not None and not isinstance(r, asyncio.CancelledError)] == []
    cancelled = sum(isinstance(r, asyncio.CancelledError) for r in outcomes)
    assert sum(fates.values()) + cancelled == len(tasks)
    assert fates["succeeded"] > 0
    assert statistics.expired_executed == 0
    assert len(scheduler._queue) == 0
    assert not scheduler._undelivered
