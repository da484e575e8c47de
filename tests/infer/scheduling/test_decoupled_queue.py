"""The queue of a decoupled model: bounded by calls and bytes, and shared by the tenants, as its places are."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from services.infer.requests.request_memory import UNCOUNTED
from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.statistics import Statistics
from shoal.errors import ResourceExhausted, Unavailable


class Sized:
    """A request whose size is counted each time it is read."""

    reads = 0
    parameters = SimpleNamespace(timeout_us=0, priority=0)
    memory = UNCOUNTED
    tensors: ClassVar[dict[str, Any]] = {}
    outputs = ()

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
    assert scheduler._waiting.size_bytes == 0


class Link:
    """Streams of a process whose requests never end by themselves."""

    is_over, process = False, SimpleNamespace()

    def __init__(self) -> None:
        self.numbers = itertools.count(1)

    def start(self, *_: Any) -> int:
        return next(self.numbers)

    def send_control(self, *_: Any) -> None: ...


class Clients:
    """Requests of tenants to a model with `places`."""

    def __init__(self, places: int, calls: int = 100) -> None:
        link = Link()
        limits = SimpleNamespace(streams=places, execution_s=math.inf)
        session: Any = SimpleNamespace(
            streams=lambda: [link],
            check_running=lambda: None,
            poison=None,
            on_streams_started=None,
            limits=limits,
            wants_requests=False,
        )
        self.scheduler = DecoupledScheduler("m", 1, session, QueueLimits(calls=calls), statistics=Statistics())
        self.tasks: list[asyncio.Task[Any]] = []

    async def ask(self, *tenants: str) -> list[asyncio.Task[Any]]:
        made = [
            asyncio.create_task(anext(self.scheduler.stream(Sized(4), tenant=tenant)))  # type: ignore[arg-type]
            for tenant in tenants
        ]
        self.tasks += made
        await asyncio.sleep(0)
        return made

    @property
    def held(self) -> Counter[str]:
        return Counter(stream.tenant for stream in self.scheduler._streams)

    def end_one(self, tenant: str) -> None:
        """End a request of a tenant in the model."""
        self.scheduler._release(next(stream for stream in self.scheduler._streams if stream.tenant == tenant))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_a_tenant_leaves_places_to_others():
    clients = Clients(4)
    async with clients.scheduler:
        await clients.ask(*["flood"] * 6)
        assert clients.held == {"flood": 3}
        await clients.ask("other", "other")
        assert clients.held == {"flood": 3, "other": 1}
        clients.end_one("flood")
        assert clients.held == {"flood": 2, "other": 1}
        clients.end_one("flood")
        assert clients.held == {"flood": 2, "other": 1}
        clients.end_one("other")
        assert clients.held == {"flood": 2, "other": 1}
        await clients.close()


async def test_requests_without_a_tenant_take_all_places():
    clients = Clients(4)
    async with clients.scheduler:
        await clients.ask(*[""] * 6)
        assert clients.held == {"": 4}
        await clients.close()


async def test_tenants_take_turns_for_a_place():
    clients = Clients(1)
    async with clients.scheduler:
        await clients.ask(*["flood"] * 6, "other", "other")
        order = []
        for _ in range(5):
            (tenant,) = clients.held
            order.append(tenant)
            clients.end_one(tenant)
        assert order == ["flood", "flood", "other", "flood", "other"]
        await clients.close()


async def test_in_a_full_queue_the_tenant_with_the_most_requests_loses_its_newest():
    clients = Clients(1, calls=3)
    async with clients.scheduler:
        flood = await clients.ask(*["flood"] * 4)
        (other,) = await clients.ask("other")
        with pytest.raises(ResourceExhausted, match="3 requests with 12 bytes wait"):
            await flood[3]
        (refused,) = await clients.ask("flood")
        with pytest.raises(ResourceExhausted):
            await refused
        assert not any(task.done() for task in (*flood[:3], other))
        assert clients.scheduler._statistics.shed == 2
        await clients.close()
