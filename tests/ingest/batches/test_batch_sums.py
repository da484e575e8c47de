"""Watchers of batches: what they cost MongoDB does not grow with their number, nor do they delay each other."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.rpc.tenant_scope import EVERY_TENANT, Scopes, TenantScope
from services.ingest.batches.batch import Batch, BatchState, Totals
from services.ingest.batches.batch_control import BatchControl
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.chunk_repository import ChunkRepository
from services.ingest.batches.rpc import BatchesRpc
from services.ingest.queries.jobs import Filter
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.tenant_header import TENANT_HEADER
from tests.breakable import until
from tests.ingest.batches.making import START, batch


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls wait for their turns, however slow the machine is."""
    monkeypatch.setattr("services.ingest.batches.batch_control.WAIT_S", 600.0)


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


async def test_many_cancellations_together_read_as_often_as_a_few_and_respond_in_time(tmp_path: Path) -> None:
    batches, now = OneBatch(batch(tmp_path, totals=Totals())), 0.0
    sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
    numbers = itertools.count()

    async def sleep(seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(sleepers, (now + seconds, next(numbers), woken))
        await woken

    control = BatchControl(
        cast(BatchRepository, batches),
        cast(ChunkRepository, None),
        on_change=lambda: None,
        max_watches=1,
        monotonic=lambda: now,
        sleep=sleep,
    )
    calls = [asyncio.create_task(control.cancel(batches.batch.id, "")) for _ in range(200)]
    while waiting := sum(not call.done() for call in calls):
        if len(sleepers) == waiting:
            now, _, woken = heapq.heappop(sleepers)
            woken.set_result(None)
        await asyncio.sleep(0)
    # Each reads twice at the beginning, and at most 3 times later: 60 times alone.
    assert batches.reads <= 1_000
    assert now == 3


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


async def test_a_sum_goes_on_when_its_client_leaves(tmp_path: Path) -> None:
    events: list[str] = []
    may_end = asyncio.Event()

    class Slow:
        async def totals(self, batch_id: str) -> Totals:
            events.append("begins")
            await may_end.wait()
            events.append("ends")
            return Totals()

    control = BatchControl(
        cast(BatchRepository, None), cast(ChunkRepository, Slow()), on_change=lambda: None, max_watches=1
    )
    view = asyncio.create_task(control._view(batch(tmp_path)))
    await until(lambda: bool(events), "it is summed")
    view.cancel()
    may_end.set()
    await asyncio.wait([view])
    assert view.cancelled()
    assert events == ["begins", "ends"]


async def test_a_submitted_batch_is_read_in_the_turn_of_its_tenant(tmp_path: Path) -> None:
    read: list[str | None] = []

    class Batches:
        async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> Batch:
            read.append(scope.tenant)
            return batch(tmp_path, totals=Totals())

    class Submissions:
        async def submit(self, request: pb.SubmitBatchRequest, scope: TenantScope) -> tuple[Batch, bool]:
            return batch(tmp_path), False

    class OfATenant:
        def invocation_metadata(self) -> list[tuple[str, str]]:
            return [(TENANT_HEADER, "acme")]

    control = BatchControl(
        cast(BatchRepository, Batches()), cast(ChunkRepository, None), on_change=lambda: None, max_watches=1
    )
    components = SimpleNamespace(control=control, submissions=Submissions(), clock=lambda: START)
    rpc = BatchesRpc(cast(Any, components), Scopes("shoal.ingest.v1.IngestService"))
    await rpc.SubmitBatch(pb.SubmitBatchRequest(), cast(Any, OfATenant()))
    assert read == ["acme"]


@pytest.mark.parametrize(("kind", "commands"), [("cancel", 2), ("pause", 1), ("page", 1)])
async def test_many_calls_of_one_tenant_leave_room_to_others(tmp_path: Path, kind: str, commands: int) -> None:
    begun: list[str | None] = []
    wake = asyncio.Event()

    class Slow:
        async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> Batch:
            begun.append(scope.tenant)
            await wake.wait()
            return batch(tmp_path, totals=Totals(), state=BatchState.CANCELLED)

        async def request_end(self, batch_id: str, ending: object) -> None: ...

        async def change_state(
            self, batch_id: str, before: BatchState, after: BatchState, reason: str, scope: TenantScope
        ) -> Batch:
            begun.append(scope.tenant)
            await wake.wait()
            return batch(tmp_path, totals=Totals(), state=after)

        async def page(self, requested: Filter, size: int, before: str) -> tuple[list[Batch], bool]:
            begun.append(requested.tenant)
            await wake.wait()
            return [], False

    control = BatchControl(
        cast(BatchRepository, Slow()), cast(ChunkRepository, None), on_change=lambda: None, max_watches=1
    )

    def call(tenant: str) -> asyncio.Task[object]:
        scope = TenantScope(tenant)
        if kind == "cancel":
            return asyncio.create_task(control.cancel("b", "", scope))
        if kind == "pause":
            return asyncio.create_task(control.pause("b", "", scope))
        return asyncio.create_task(control.page(Filter(tenant=tenant), 0, ""))

    calls = [call("many") for _ in range(1_000)]
    await until(lambda: len(begun) > 1, "they begin")
    calls.append(call("other"))
    await until(lambda: "other" in begun, "the other tenant's begins")
    assert begun.count("many") == 5
    wake.set()
    await asyncio.gather(*calls)
    assert begun.count("many") == commands * 1_000
