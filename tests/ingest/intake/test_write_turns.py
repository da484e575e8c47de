"""One tenant's submits with many dependencies wait for their write; another one's is in the next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.ingest.config import IngestConfig
from services.ingest.dependencies.references import MOST
from services.ingest.intake.durable_insert import DurableInsert
from services.ingest.intake.intake import DEPENDENCIES_OF_AN_ITEM, GROUP_ITEMS
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.conftest import running_ingest
from tests.ingest.faults import FakeMesh, submit


async def test_submits_with_many_dependencies_hold_up_nobody_else(
    mongo_uri: str, mongo_database: str, run_dir: Path, own_mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"instance": "ingest-0", "listen": f"unix:{run_dir}/ingest-0.sock", "mesh": own_mesh.address}
    settings |= {"mongo": mongo_uri, "database": mongo_database, "drain_ms": "100"}
    written: list[list[str]] = []
    may_write, write = asyncio.Event(), DurableInsert.__call__
    may_write.set()

    async def later(self: DurableInsert, jobs: Sequence[Any]) -> Any:
        written.append([job.tenant for job in jobs])
        await may_write.wait()
        return await write(self, jobs)

    monkeypatch.setattr(DurableInsert, "__call__", later)

    async def submitted(tenant: str, depends_on: Sequence[pb.Dependency] = ()) -> str:
        response: pb.SubmitResponse = await stub.Submit(
            submit(data=b"data", tenant=tenant, depends_on=depends_on), timeout=60
        )
        return response.job.id

    async with running_ingest(IngestConfig.model_validate(settings), None) as stub:
        ids = await asyncio.gather(*(submitted("many") for _ in range(MOST)))
        dependencies = [pb.Dependency(job_id=job_id) for job_id in ids]
        may_write.clear()
        written.clear()
        submits = [asyncio.ensure_future(submitted("many", dependencies))]
        while not written:
            await asyncio.sleep(0.01)
        submits += [asyncio.ensure_future(submitted("many", dependencies)) for _ in range(60)]
        # On a connection, calls begin in the order in which they were made.
        await asyncio.sleep(0.5)
        submits.append(asyncio.ensure_future(submitted("few")))
        await asyncio.sleep(0.5)
        assert written == [["many"]]
        may_write.set()
        assert len({await each for each in submits}) == 62
    in_one_write = GROUP_ITEMS // (1 + MOST // DEPENDENCIES_OF_AN_ITEM)
    assert written[1] == ["many", "few", *["many"] * (in_one_write - 1)]
    assert [len(group) for group in written] == [1, in_one_write + 1, in_one_write, 62 - 2 - 2 * in_one_write]
