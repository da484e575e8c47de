"""Memory for requests that wait for their write: tenants have shares of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.ingest.config import IngestConfig
from services.ingest.intake.durable_insert import DurableInsert
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.conftest import running_ingest
from tests.ingest.faults import FakeMesh, submit

LARGE = bytes(100_000)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Writes of jobs wait until it is set."""
    may_write, write = asyncio.Event(), DurableInsert.__call__

    async def later(self: DurableInsert, jobs: Sequence[Any]) -> Any:
        await may_write.wait()
        return await write(self, jobs)

    monkeypatch.setattr(DurableInsert, "__call__", later)
    return may_write


async def submitted(stub: Any, tenant: str, data: bytes = b"data") -> str:
    """Return the id of a job."""
    response: pb.SubmitResponse = await stub.Submit(submit(data=data, tenant=tenant), timeout=30)
    return response.job.id


async def test_a_tenant_whose_stream_waits_for_memory_holds_up_nobody_else(
    mongo_uri: str, mongo_database: str, run_dir: Path, own_mesh: FakeMesh, writes: asyncio.Event
) -> None:
    settings = {"instance": "ingest-0", "listen": f"unix:{run_dir}/ingest-0.sock", "mesh": own_mesh.address}
    settings |= {"mongo": mongo_uri, "database": mongo_database, "drain_ms": "100", "pending_bytes": f"{1 << 20}"}

    async def stream() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n in range(20):
            yield pb.SubmitStreamRequest(sequence=n, submit=submit(data=LARGE, tenant="many"))

    async with running_ingest(IngestConfig.model_validate(settings), None) as stub:
        heavy = stub.SubmitStream(stream())
        # Those before it still find room.
        pending: list[asyncio.Task[str]] = []
        while not (refused := [task for task in pending if task.done()]):
            pending.append(asyncio.ensure_future(submitted(stub, "many", LARGE)))
            await asyncio.wait(pending, timeout=0.1)
            assert len(pending) < 50
        with pytest.raises(grpc.aio.AioRpcError, match="this tenant's, which may hold twice what is free") as caught:
            await refused[0]
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        others = [asyncio.ensure_future(submitted(stub, tenant)) for tenant in ("few", "others", "few")]
        done, _ = await asyncio.wait(others, timeout=0.5)
        assert not done, "nobody is refused, and nothing is written yet"
        writes.set()
        assert len({await other for other in others}) == 3
        acknowledged = [response.sequence async for response in heavy]
        assert sorted(acknowledged) == list(range(20))
        assert [type(found) for found in await asyncio.gather(*pending, return_exceptions=True)][:-1] == (
            [str] * (len(pending) - 1)
        )
