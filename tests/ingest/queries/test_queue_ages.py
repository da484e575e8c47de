"""Ages and numbers of queued jobs by tenant, as the metrics have them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from services.ingest import metrics
from services.ingest.metrics import QueueAges, labelled
from services.ingest.tenant_queue import TenantQueueKey
from tests.breakable import until

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def test_the_oldest_tenants_are_counted_and_no_others(monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics, "TENANTS", 2)
    counted: list[str] = []

    class Store:
        async def tenant_queues(self, after: str, limit: int) -> list[tuple[TenantQueueKey, datetime]]:
            due = {"a": 5, "b": 90, "c": 30, "d": -10}
            return [(TenantQueueKey(name, "m", 0), NOW - timedelta(seconds=age)) for name, age in due.items()]

    async def count(tenant: str, most: int) -> int:
        counted.append(tenant)
        return min(most, {"b": 3, "c": 70_000}[tenant])

    store: Any = Store()
    clock: Any = lambda: NOW  # noqa: E731
    ready = asyncio.Event()
    async with QueueAges(store, count, clock, ready) as ages:
        await asyncio.sleep(0)
        assert (ages.read_age_s, ages.jobs) == (-1.0, {}), "nothing is read before MongoDB is prepared"
        ready.set()
        await until(lambda: len(ages.jobs) == 2, "the queue is read")
    assert ages.ages == {"b": 90, "c": 30, "a": 5, "d": 0}
    assert [*ages.jobs.items()] == [("b", 3), ("c", 10_000)]
    assert counted == ["b", "c"]


def test_a_tenant_with_the_name_of_all_others_has_one_series_with_them(monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics, "TENANTS", 2)
    assert labelled([("b", 90), ("other", 30), ("a", 5)]) == {"b": 90, "other": 30}
    assert labelled([("b", 90), ("c", 30), ("other", 5), ("a", 1)]) == {"b": 90, "c": 30, "other": 5}
    assert labelled([("b", 90), ("c", 30)]) == {"b": 90, "c": 30}
