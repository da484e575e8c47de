"""Batches as tasks of the loop: they end when nobody waits for them, and their instance is free again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.scheduling.execution import Tally
from services.infer.scheduling.task_worker import TaskWorker
from shoal.errors import Unavailable


@dataclass(eq=False)
class Waiting:
    is_abandoned: bool = False
    on_abandoned: object = None

    def abandon(self) -> None:
        self.is_abandoned = True
        if self.on_abandoned is not None:
            self.on_abandoned()


class Slow:
    """Runs a batch until it is told to end."""

    def __init__(self) -> None:
        self.tally, self.may_run_on_loop = Tally(), False
        self.ends = asyncio.Event()
        self.was_cancelled = False

    async def outcomes(self, batch: Sequence[Waiting]) -> list[InferenceResult]:
        try:
            await self.ends.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return [InferenceResult((), ExecutionTimes()) for _ in batch]


class Bench:
    def __init__(self) -> None:
        self.execution = Slow()
        self.worker = TaskWorker(self.execution, asyncio.get_running_loop(), "m-0")
        self.outcomes: asyncio.Future = asyncio.get_running_loop().create_future()

    def run(self, *jobs: Waiting) -> None:
        self.worker.run(jobs, lambda outcomes, seconds: self.outcomes.set_result(outcomes))


async def test_a_batch_is_completed():
    bench = Bench()
    jobs = [Waiting(), Waiting()]
    bench.run(*jobs)
    bench.execution.ends.set()
    assert [type(outcome) for outcome in await bench.outcomes] == [InferenceResult, InferenceResult]
    assert [job.on_abandoned for job in jobs] == [None, None]


async def test_a_batch_is_cancelled_when_its_last_caller_has_left():
    bench = Bench()
    jobs = [Waiting(), Waiting()]
    bench.run(*jobs)
    await asyncio.sleep(0)
    jobs[0].abandon()
    await asyncio.sleep(0)
    assert not bench.execution.was_cancelled
    jobs[1].abandon()
    assert [type(outcome) for outcome in await bench.outcomes] == [Unavailable, Unavailable]
    assert bench.execution.was_cancelled


async def test_a_batch_cancelled_before_it_starts_frees_the_worker():
    bench = Bench()
    job = Waiting()
    bench.run(job)
    job.abandon()
    assert [type(outcome) for outcome in await bench.outcomes] == [Unavailable]


async def test_closing_cancels_the_running_batch():
    bench = Bench()
    bench.run(Waiting())
    await asyncio.sleep(0)
    bench.worker.close()
    assert [type(outcome) for outcome in await bench.outcomes] == [Unavailable]


async def test_it_wakes_once_and_not_while_it_runs():
    bench = Bench()
    woken: list[str] = []
    is_woken = asyncio.Event()
    bench.worker.wake_in(0.0, lambda: woken.append("replaced"))
    bench.worker.wake_in(0.0, lambda: (woken.append("last"), is_woken.set()))
    await is_woken.wait()
    bench.worker.wake_in(0.0, lambda: woken.append("busy"))
    bench.run(Waiting())
    bench.execution.ends.set()
    await bench.outcomes
    bench.worker.wake_in(0.0, lambda: woken.append("closed"))
    bench.worker.close()
    other = asyncio.Event()
    TaskWorker(bench.execution, asyncio.get_running_loop(), "m-1").wake_in(0.0, other.set)
    await other.wait()
    assert woken == ["last"]
