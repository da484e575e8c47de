"""Reads of single jobs: in shared queries, in turn by tenant, whole: MongoDB does not see that a client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import bson
import pytest
from bson.codec_options import CodecOptions
from pymongo.errors import AutoReconnect

from mesh.mongo import Document
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.ingest.documents import document_of
from services.ingest.job import Job
from services.ingest.queries.jobs import (
    BYTES_OF_A_QUERY,
    JOBS_OF_A_QUERY,
    PAYLOADS_AT_ONCE,
    QUERIES_AT_ONCE,
    Jobs,
    weight_of,
)
from shoal.errors import NotFound, Unavailable
from tests.breakable import PATIENCE_S, until
from tests.ingest.making import job

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01ARZ3NDEKTSV4RRFFQ69G5FAW"
MISSING = "01ARZ3NDEKTSV4RRFFQ69G5FAX"


class Reads:
    """A collection whose queries wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.asked: list[list[str]] = []
        self.interrupted = 0
        self.error: Exception | None = None
        self.labels: tuple[tuple[str, str], ...] = ()
        self.codec_options: CodecOptions[Document] = CodecOptions(tz_aware=True)

    async def find_raw_batches(self, query: Document, projection: Document, batch_size: int) -> AsyncIterator[bytes]:
        self.asked.append(asked := query["_id"]["$in"])
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.interrupted += 1
            raise
        if self.error is not None:
            raise self.error
        found = [document_of(self.job(job_id)) for job_id in asked if job_id != MISSING]
        yield b"".join(map(bson.encode, found))

    def job(self, job_id: str) -> Job:
        return job(id=job_id, tenant="many", labels=self.labels)


def ids(count: int) -> list[str]:
    return [f"01ARZ3NDEKTSV4RRFFQ{number:07}" for number in range(count)]


@pytest.fixture
async def reads() -> AsyncIterator[Reads]:
    reads = Reads()
    yield reads
    reads.may_end.set()


@pytest.fixture
async def jobs(reads: Reads) -> AsyncIterator[Jobs]:
    async with Jobs(cast(Any, reads), cast(Any, None)) as jobs:
        yield jobs


async def test_many_reads_share_queries_and_another_tenants_is_in_the_next_query(reads: Reads, jobs: Jobs) -> None:
    many = [asyncio.create_task(jobs.get(job_id, TenantScope("many"))) for job_id in ids(1_000)]
    await until(lambda: len(reads.asked) == QUERIES_AT_ONCE, "they read")
    other = asyncio.create_task(jobs.get(OTHER, TenantScope("other")))
    await asyncio.sleep(0)
    reads.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(*many)
        with pytest.raises(NotFound):
            # It exists, and is another tenant's.
            await other
    assert [each.id for each in found] == ids(1_000)
    assert OTHER in reads.asked[QUERIES_AT_ONCE]
    assert max(map(len, reads.asked)) == JOBS_OF_A_QUERY
    assert len(reads.asked) <= 1_001 // JOBS_OF_A_QUERY + 1 + QUERIES_AT_ONCE


async def test_queries_of_a_tenant_with_large_jobs_have_few_until_its_jobs_are_small_again(
    reads: Reads, jobs: Jobs
) -> None:
    async def read_all() -> list[int]:
        before = len(reads.asked)
        await asyncio.gather(*(jobs.get(job_id, TenantScope("many")) for job_id in ids(1_000)))
        return [len(asked) for asked in reads.asked[before:]]

    reads.may_end.set()
    reads.labels = (("k", "v" * 5_000),)
    few = BYTES_OF_A_QUERY // weight_of(reads.job(JOB))
    assert 1 < few < JOBS_OF_A_QUERY
    async with asyncio.timeout(PATIENCE_S):
        # Those that begin before one has ended.
        assert set((await read_all())[QUERIES_AT_ONCE:-1]) == {few}
        reads.labels = ()
        sizes = await read_all()
    assert (sizes[0], max(sizes)) == (few, JOBS_OF_A_QUERY)


async def test_reads_of_one_job_get_what_their_scope_may_see(reads: Reads, jobs: Jobs) -> None:
    reads.may_end.set()
    scopes = [EVERY_TENANT, TenantScope("many"), TenantScope("other"), TenantScope("")]
    found = await asyncio.gather(*(jobs.get(JOB, scope) for scope in scopes), return_exceptions=True)
    assert [isinstance(each, NotFound) for each in found] == [False, False, True, True]


async def test_reads_whose_callers_have_left_are_not_interrupted_and_those_that_wait_are_dropped(
    reads: Reads, jobs: Jobs
) -> None:
    many = [asyncio.create_task(jobs.get(job_id, TenantScope("many"))) for job_id in ids(1_000)]
    await until(lambda: len(reads.asked) == QUERIES_AT_ONCE, "they read")
    begun = sum(map(len, reads.asked))
    for task in many:
        task.cancel()
    await asyncio.wait(many, timeout=PATIENCE_S)
    assert all(task.cancelled() for task in many)
    last = asyncio.create_task(jobs.get(JOB, TenantScope("many")))
    await asyncio.sleep(0)
    reads.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        assert (await last).id == JOB
    assert (reads.interrupted, sum(map(len, reads.asked))) == (0, begun + 1)


async def test_an_error_of_a_query_is_that_of_each_read_and_the_next_reads_again(reads: Reads, jobs: Jobs) -> None:
    reads.error = AutoReconnect("gone")
    reads.may_end.set()
    gone = await asyncio.gather(*(jobs.get(job_id) for job_id in ids(5)), return_exceptions=True)
    assert [type(each) for each in gone] == [Unavailable] * 5
    reads.error = None
    found = await asyncio.gather(jobs.get(JOB), jobs.get(MISSING), return_exceptions=True)
    assert [type(each) for each in found] == [Job, NotFound]


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
