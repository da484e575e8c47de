"""The queue of a decoupled model: bounded by calls and bytes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.statistics import Statistics
from shoal.errors import ResourceExhausted, Unavailable


class Sized:
    """A request whose size is counted each time it is read."""

    reads = 0
    parameters = SimpleNamespace(timeout_us=0, priority=0)

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size_bytes(self) -> int:
        Sized.reads += 1
        return self._size


async def test_the_bytes_that_wait_for_a_decoupled_model_are_a_running_count():
    session: Any = SimpleNamespace(streams=dict, check_running=lambda: None, poison=None, on_streams_started=None)
    limits = QueueLimits(calls=300, size_bytes=1_000)
    async with DecoupledScheduler("m", 1, session, limits, statistics=Statistics()) as scheduler:
        waiting = [asyncio.create_task(anext(scheduler.stream(Sized(4)))) for _ in range(250)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert Sized.reads <= 4 * 250
        with pytest.raises(ResourceExhausted, match="250 requests with 1000 bytes wait"):
            await anext(scheduler.stream(Sized(1)))  # type: ignore[arg-type]
        for task in waiting[:200]:
            task.cancel()
        await asyncio.wait(waiting[:200])
        again = [asyncio.create_task(anext(scheduler.stream(Sized(8)))) for _ in range(100)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="150 requests with 1000 bytes wait"):
            await anext(scheduler.stream(Sized(1)))  # type: ignore[arg-type]
    for task in (*waiting[200:], *again):
        with pytest.raises(Unavailable):
            await task
    assert scheduler._waiting_bytes == 0
