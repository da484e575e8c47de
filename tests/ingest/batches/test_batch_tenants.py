"""Batches of several tenants: the many batches of one delay or refuse none of another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.ingest.batches.batch import Batch
from services.ingest.batches.batch_turns import BatchTurns
from services.ingest.batches.submission import SUBMITS_AT_ONCE, Submissions
from shoal.errors import AlreadyExists, ResourceExhausted
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import PATIENCE_S, until
from tests.ingest.batches.conftest import BatchClient, BatchMesh
from tests.ingest.batches.making import batch, write_lines


def lines(path: Path, first: int, count: int) -> str:
    return write_lines(path, [{"x": [first + n] * 4} for n in range(count)])


async def test_tenants_take_turns_and_leave_each_other_room(
    client: BatchClient, mesh: BatchMesh, tmp_path: Path
) -> None:
    """Batches of `many` have been there before that of `one`, in chunks that run until the test lets them end."""
    running: dict[int, asyncio.Event] = {}

    async def waits(rows: list[int], context: Any) -> None:
        running[rows[0]] = may_end = asyncio.Event()
        await may_end.wait()

    mesh.infer.before = waits
    for n in range(4):
        url = lines(tmp_path / f"{n}.jsonl", 100 * n, 4)
        await client.submit_batch(url, f"file://{tmp_path}/many{n}", tenant="many", chunk_rows=1)
    await until(lambda: len(running) == 2, "the chunks of a tenant that is alone")
    other = await client.submit_batch(
        lines(tmp_path / "one.jsonl", 1_000, 2), f"file://{tmp_path}/one", tenant="one", chunk_rows=1
    )
    await until(lambda: 1_000 in running, "a chunk beside those that run")
    assert len(running) == 3
    running[1_000].set()
    await until(lambda: 1_001 in running, "the other one, before those that have waited for longer")
    running[1_001].set()
    assert (await client.batch_ended(other.id)).rows_ok == 2
    mesh.infer.before = None
    for may_end in running.values():
        may_end.set()


def test_tenants_and_their_batches_have_turns(tmp_path: Path) -> None:
    many = [batch(tmp_path, id=f"a{n}", tenant="a") for n in range(3)]
    active = [*many, batch(tmp_path, id="b0", tenant="b"), batch(tmp_path, id="c0", tenant="c")]
    turns, served = BatchTurns(), []
    for _ in range(9):
        turns.take(following := min(active, key=turns.key))
        served.append(following.id)
    assert served == ["a0", "b0", "c0", "a1", "b0", "c0", "a2", "b0", "c0"]
    turns.keep(many[:1])
    assert [turns.key(each) == (0, 0) for each in active] == [False, False, False, True, True]


class Active:
    """Active batches by tenant."""

    def __init__(self, **tenants: int) -> None:
        self._tenants = tenants

    async def count_active(self, tenant: str = "") -> int:
        return self._tenants.get(tenant, 0) if tenant else sum(self._tenants.values())


@pytest.mark.parametrize(
    ("active", "tenant", "refusal"),
    [
        ({"many": 665}, "many", ""),
        ({"many": 666}, "many", "666 batches of tenant 'many'"),
        ({"many": 666}, "one", ""),
        ({"many": 666, "one": 333}, "new", ""),
        ({"many": 666}, "", ""),
        ({"many": 666, "one": 334}, "new", "1000 batches"),
    ],
)
async def test_a_tenant_leaves_active_batches_to_others(active: dict[str, int], tenant: str, refusal: str) -> None:
    nothing: Any = None
    batches: Any = Active(**active)
    submissions = Submissions(
        batches, nothing, nothing, nothing, clock=nothing, new_id=nothing, instance="", on_accepted=nothing
    )
    if not refusal:
        await submissions._check_active(tenant)
        return
    with pytest.raises(ResourceExhausted, match=refusal):
        await submissions._check_active(tenant)


async def test_submits_of_one_tenant_leave_room_to_others_and_are_not_interrupted(tmp_path: Path) -> None:
    may_end, begun, interrupted = asyncio.Event(), list[str](), list[str]()

    class Slow:
        async def find_by_key(self, tenant: str, key: str) -> Batch:
            begun.append(tenant)
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                interrupted.append(tenant)
                raise
            return batch(tmp_path, tenant=tenant, digest=b"another")

    nothing: Any = None
    batches: Any = Slow()
    submissions = Submissions(
        batches, nothing, nothing, nothing, clock=nothing, new_id=nothing, instance="", on_accepted=nothing
    )

    def submitting(tenant: str) -> asyncio.Task[tuple[Batch, bool]]:
        request = pb.SubmitBatchRequest(
            inputs=["file:///in.npz"], output="file:///out", model_name="m", tenant=tenant, idempotency_key="k"
        )
        return asyncio.create_task(submissions.submit(request))

    many = [submitting("many") for _ in range(200)]
    await until(lambda: len(begun) > 1, "they are checked")
    other = submitting("other")
    await until(lambda: "other" in begun, "the other tenant's is checked")
    assert begun.count("many") == SUBMITS_AT_ONCE // 2
    for task in many:
        task.cancel()
    may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*many, return_exceptions=True)
        with pytest.raises(AlreadyExists):
            await other
    assert all(task.cancelled() for task in many)
    assert (interrupted, begun.count("many")) == ([], SUBMITS_AT_ONCE // 2)
