"""Cancellations: bounded, in turn by tenant, and whole when their clients leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from mesh.rpc.tenant_scope import TenantScope
from services.ingest.dispatch.cancel import CANCELLED_AT_ONCE, JobCanceller
from services.ingest.job import Job, Lease, State, take_over
from tests.breakable import PATIENCE_S, until
from tests.ingest.making import START, job


class SlowClaims:
    """Claims that wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.taken: list[str] = []
        self.interrupted = 0

    async def take_to_cancel(self, job_id: str, reason: str) -> Job | None:
        self.taken.append(job_id)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.interrupted += 1
            raise
        return take_over(job(id=job_id), Lease("l", "i", "p", START), reason)


async def test_many_cancellations_of_one_tenant_leave_room_and_are_not_interrupted() -> None:
    claims = SlowClaims()
    ended: list[str] = []

    async def get(job_id: str, scope: TenantScope) -> Job:
        return job(id=job_id)

    async def follow(job_id: str, scope: TenantScope) -> AsyncIterator[Job]:
        yield job(id=job_id, state=State.CANCELLED)

    jobs, dispatcher, watch = (
        SimpleNamespace(get=get),
        SimpleNamespace(end=lambda taken, how: ended.append(taken.id)),
        SimpleNamespace(follow=follow),
    )
    canceller = JobCanceller(*cast(Any, (jobs, claims, dispatcher, watch)), clock=lambda: START)

    def cancelling(job_id: str, tenant: str) -> asyncio.Task[Job]:
        return asyncio.create_task(canceller.cancel(job_id, "why", TenantScope(tenant)))

    many = [cancelling(f"many-{number}", "many") for number in range(200)]
    await until(lambda: len(claims.taken) > 1, "they are taken over")
    other = cancelling("other", "other")
    await until(lambda: "other" in claims.taken, "the other tenant's is taken over")
    begun = len(claims.taken) - 1
    assert begun < CANCELLED_AT_ONCE
    for task in many:
        task.cancel()
    claims.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*many, return_exceptions=True)
        assert (await other).state is State.CANCELLED
    assert all(task.cancelled() for task in many)
    assert (claims.interrupted, len(claims.taken), sorted(ended)) == (0, begun + 1, sorted(claims.taken))
