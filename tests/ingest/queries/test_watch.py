"""Many watchers of one job: they share its reads, and other work goes on between them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

from mesh.rpc.tenant_scope import TenantScope
from services.ingest.job import Job, Lease, State, claim
from services.ingest.queries.watch import Watch
from tests.breakable import PATIENCE_S
from tests.ingest.making import START, job

WATCHERS = 300


class OneJob:
    """A job and its watchers, without MongoDB."""

    def __init__(self) -> None:
        self.job = job()
        self.reads = 0
        self.events: list[asyncio.Event] = []

    async def get(self, job_id: str, scope: TenantScope) -> Job:
        self.reads += 1
        await asyncio.sleep(0)
        return self.job

    @contextmanager
    def of(self, job_id: str, tenant: str | None) -> Iterator[asyncio.Event]:
        self.events.append(asyncio.Event())
        yield self.events[-1]

    def claim(self) -> None:
        self.job = claim(self.job, Lease("l", "local/ingest-0", "p", START + timedelta(hours=1)), START)
        for event in self.events:
            event.set()


async def test_watchers_of_one_job_share_a_read_and_take_turns() -> None:
    one = OneJob()
    watch = Watch(cast("Any", one), cast("Any", one))
    scope = TenantScope("a")
    streams = [watch.follow(one.job.id, scope) for _ in range(WATCHERS)]
    order: list[str] = []

    async def next_of(stream: Any) -> State:
        state = (await anext(stream)).state
        order.append("watcher")
        return state

    async def bystander() -> None:
        while order.count("watcher") < WATCHERS:
            await asyncio.sleep(0)
            order.append("bystander")

    async with asyncio.timeout(PATIENCE_S):
        for stream in streams:
            assert (await anext(stream)).state is State.QUEUED
        following = [asyncio.create_task(next_of(stream)) for stream in streams]
        await asyncio.sleep(0)
        one.reads = 0
        one.claim()
        await bystander()
        assert set(await asyncio.gather(*following)) == {State.RUNNING}
    assert one.reads == 1
    # Between any two of them, other work had its turn.
    assert "watcher watcher" not in " ".join(order)
    for stream in streams:
        await stream.aclose()
