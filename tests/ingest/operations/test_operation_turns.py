"""Calls about operations: bounded, in turn by tenant, and whole: MongoDB does not see that a client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from mesh.mongo import Document, connect, ensure_collection
from services.ingest.job import State
from services.ingest.operations.operation import Action, Operation, Selection
from services.ingest.operations.operation_repository import (
    COUNTS_AT_ONCE,
    INDEXES,
    JOB_OPERATIONS,
    RUNNING_OF_TENANT,
    VALIDATOR,
    OperationRepository,
)
from services.ingest.queries.filters import JobFilter
from shoal.errors import ResourceExhausted
from tests.breakable import PATIENCE_S, until

NOW = datetime(2026, 11, 28, tzinfo=UTC)


def selection(tenant: str) -> Selection:
    return Selection(JobFilter(states=frozenset({State.QUEUED}), tenant=tenant))


class Counts:
    """A collection whose counts wait until they may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.tenants: list[str] = []
        self.interrupted = 0

    async def count_documents(self, query: Document, **_: Any) -> int:
        self.tenants.append(query["tenant"])
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.interrupted += 1
            raise
        return 7


async def test_many_counts_of_one_tenant_leave_room_and_are_not_interrupted() -> None:
    counts = Counts()
    repository = OperationRepository(cast(Any, None), cast(Any, counts), lambda: NOW)

    def counting(tenant: str) -> asyncio.Task[tuple[int, bool]]:
        return asyncio.create_task(repository.count(selection(tenant), NOW))

    many = [counting("many") for _ in range(200)]
    await until(lambda: len(counts.tenants) > 1, "they count")
    other = counting("other")
    await until(lambda: "other" in counts.tenants, "the other tenant counts")
    assert counts.tenants.count("many") == COUNTS_AT_ONCE // 2
    for task in many:
        task.cancel()
    counts.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*many, return_exceptions=True)
        assert await other == (7, False)
    assert all(task.cancelled() for task in many)
    assert (counts.interrupted, counts.tenants.count("many")) == (0, COUNTS_AT_ONCE // 2)


@pytest.fixture
async def repository(mongo_uri: str, mongo_database: str) -> AsyncIterator[OperationRepository]:
    async with connect(mongo_uri) as client:
        operations = await ensure_collection(
            client[mongo_database], JOB_OPERATIONS, validator=VALIDATOR, indexes=INDEXES
        )
        yield OperationRepository(operations, client[mongo_database]["jobs"], lambda: NOW)


async def test_starts_at_one_moment_do_not_exceed_the_limit(repository: OperationRepository) -> None:
    def operation(n: int) -> Operation:
        return Operation(f"o{n:02}", "acme", Action.CANCEL, selection("acme"), "", b"", started_at=NOW, updated_at=NOW)

    starts = (repository.start(operation(n)) for n in range(30))
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    assert outcomes.count(None) == len(await repository.running()) == RUNNING_OF_TENANT
    assert all(isinstance(each, ResourceExhausted) for each in outcomes if each is not None)
