"""Reads of single jobs: bounded, in turn by tenant, and whole: MongoDB does not see that a client has left."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from mesh.mongo import Document
from mesh.rpc.tenant_scope import TenantScope
from services.ingest.queries.jobs import PAYLOADS_AT_ONCE, READS_AT_ONCE, Jobs
from shoal.errors import NotFound
from tests.breakable import PATIENCE_S, until
from tests.ingest.making import job

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


class Reads:
    """A collection whose reads wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.tenants: list[str] = []
        self.interrupted = 0

    async def find_one(self, query: Document, projection: Document) -> None:
        self.tenants.append(query["tenant"])
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.interrupted += 1
            raise


async def test_many_reads_of_one_tenant_leave_room_and_are_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.ingest.queries.jobs.WAIT_S", 600.0)
    reads = Reads()
    jobs = Jobs(cast(Any, reads), cast(Any, None))

    def reading(tenant: str) -> asyncio.Task[Any]:
        return asyncio.create_task(jobs.get(JOB, TenantScope(tenant)))

    many = [reading("many") for _ in range(1_000)]
    await until(lambda: len(reads.tenants) > 1, "they read")
    other = reading("other")
    await until(lambda: "other" in reads.tenants, "the other tenant reads")
    assert reads.tenants.count("many") == READS_AT_ONCE * 2 // 3
    for task in many:
        task.cancel()
    reads.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*many, return_exceptions=True)
        with pytest.raises(NotFound):
            await other
    assert all(task.cancelled() for task in many)
    # Those that waited for a turn have left without a read.
    assert (reads.interrupted, reads.tenants.count("many")) == (0, READS_AT_ONCE * 2 // 3)


class SlowPayloads:
    """Payloads whose reads wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.begun = 0

    async def get(self, job_id: str) -> bytes:
        self.begun += 1
        await self.may_end.wait()
        return b"request"


async def test_many_reads_of_requests_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = SlowPayloads()
    jobs = Jobs(cast(Any, None), cast(Any, payloads))

    async def get(job_id: str, scope: TenantScope) -> Any:
        return job(is_apart=True, request=None)

    monkeypatch.setattr(jobs, "get", get)

    def reading(tenant: str) -> asyncio.Task[bytes]:
        return asyncio.create_task(jobs.payload(JOB, TenantScope(tenant)))

    many = [reading("many") for _ in range(200)]
    await until(lambda: payloads.begun > 1, "they read")
    most = PAYLOADS_AT_ONCE * 2 // 3
    assert payloads.begun == most
    other = reading("other")
    await until(lambda: payloads.begun == most + 1, "the other tenant reads")
    payloads.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.gather(*many, other) == [b"request"] * 201
