"""Watchers of batches: what they cost MongoDB does not grow with their number, nor do they delay each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.ingest.batches.batch import Batch, BatchState, Totals
from services.ingest.batches.batch_control import BatchControl
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.chunk_repository import ChunkRepository
from tests.breakable import until
from tests.ingest.batches.making import batch


class Chunks:
    """Chunks whose sum takes a second."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    async def totals(self, batch_id: str) -> Totals:
        self.reads += 1
        await asyncio.sleep(0)
        self.now += 1
        return Totals(rows=self.reads)


async def test_a_slow_sum_is_made_once_for_all_watchers_and_rarely(tmp_path: Path) -> None:
    chunks, one = Chunks(), batch(tmp_path)
    control = BatchControl(
        cast(BatchRepository, None),
        cast(ChunkRepository, chunks),
        on_change=lambda: None,
        max_watches=1,
        monotonic=lambda: chunks.now,
    )
    views = await asyncio.gather(*(control._view(one) for _ in range(100)))
    assert ({view.totals.rows for view in views}, chunks.reads) == ({1}, 1)
    chunks.now += 19
    assert (await control._view(one)).totals.rows == 1
    chunks.now += 2
    assert (await control._view(one)).totals.rows == 2


async def test_the_many_watchers_of_a_tenant_read_as_often_as_a_few(tmp_path: Path) -> None:
    pauses: dict[str, list[float]] = {"many": [], "one": []}
    tenant_of_task: dict[asyncio.Task[None] | None, str] = {}
    wake = asyncio.Event()

    class Batches:
        async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> Batch:
            return batch(tmp_path, id=batch_id, totals=Totals())

    async def sleep(seconds: float) -> None:
        pauses[tenant_of_task[asyncio.current_task()]].append(seconds)
        await wake.wait()

    control = BatchControl(
        cast(BatchRepository, Batches()),
        cast(ChunkRepository, None),
        on_change=lambda: None,
        max_watches=10_000,
        sleep=sleep,
    )

    async def follow(tenant: str) -> None:
        async for _ in control.follow("01JDG3W6ZKQ1N8X9T4B7R2M5P0", TenantScope(tenant)):
            pass

    async with asyncio.TaskGroup() as tasks:
        following = []
        for count, tenant in ((50, "many"), (950, "many"), (1, "one")):
            before = len(pauses[tenant])
            for _ in range(count):
                following.append(task := tasks.create_task(follow(tenant)))
                tenant_of_task[task] = tenant
            await until(lambda: len(pauses[tenant]) == before + count, "they wait")  # noqa: B023
        await until(lambda: len(pauses["many"]) == 1_000 and pauses["one"] == [0.5], "all wait")
        assert pauses["many"][:50] == [0.5] * 50
        assert pauses["many"][-1] == 10
        for task in following:
            task.cancel()


class OneBatch:
    """A batch that does not end."""

    def __init__(self, one: Batch) -> None:
        self.batch = one
        self.reads = 0

    async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> Batch:
        self.reads += 1
        return self.batch

    async def request_end(self, batch_id: str, ending: object) -> None: ...


async def test_many_cancellations_together_read_as_often_as_a_few(tmp_path: Path) -> None:
    batches, now = OneBatch(batch(tmp_path, totals=Totals())), 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        await asyncio.sleep(0)
        now += seconds / 1_000

    control = BatchControl(
        cast(BatchRepository, batches),
        cast(ChunkRepository, None),
        on_change=lambda: None,
        max_watches=1,
        monotonic=lambda: now,
        sleep=sleep,
    )
    await asyncio.gather(*(control.cancel(batches.batch.id, "") for _ in range(1_000)))
    # Each reads twice at the beginning, and at most 2 or 3 times later: 60 times alone.
    assert batches.reads <= 5_000


async def test_sums_of_a_tenant_with_many_batches_leave_room_to_others(tmp_path: Path) -> None:
    summed: list[str] = []
    wake = asyncio.Event()

    class Slow:
        async def totals(self, batch_id: str) -> Totals:
            summed.append(batch_id)
            await wake.wait()
            return Totals()

    control = BatchControl(
        cast(BatchRepository, None), cast(ChunkRepository, Slow()), on_change=lambda: None, max_watches=1
    )
    many = [batch(tmp_path, id=f"many-{n}", tenant="many") for n in range(200)]
    views = [asyncio.create_task(control._view(each)) for each in many]
    await until(lambda: len(summed) > 1, "they are summed")
    views.append(asyncio.create_task(control._view(batch(tmp_path, id="other", tenant="other"))))
    await until(lambda: "other" in summed, "the other tenant's is summed")
    assert len(summed) == 3
    wake.set()
    await asyncio.gather(*views)
    # All are kept.
    assert len(control._sums) == 201


async def test_many_cancellations_of_one_tenant_leave_room_to_others(tmp_path: Path) -> None:
    begun: list[str | None] = []
    wake = asyncio.Event()

    class Slow:
        async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> Batch:
            begun.append(scope.tenant)
            await wake.wait()
            return batch(tmp_path, totals=Totals(), state=BatchState.CANCELLED)

        async def request_end(self, batch_id: str, ending: object) -> None: ...

    control = BatchControl(
        cast(BatchRepository, Slow()), cast(ChunkRepository, None), on_change=lambda: None, max_watches=1
    )
    calls = [asyncio.create_task(control.cancel("b", "", TenantScope("many"))) for _ in range(1_000)]
    await until(lambda: len(begun) > 1, "they are read")
    calls.append(asyncio.create_task(control.cancel("b", "", TenantScope("other"))))
    await until(lambda: "other" in begun, "the other tenant's is read")
    assert begun.count("many") == 5
    wake.set()
    await asyncio.gather(*calls)
    assert begun.count("many") == 2_000
