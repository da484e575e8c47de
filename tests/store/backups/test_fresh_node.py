"""A node that nobody has used yet counts as empty, whatever its services keep for themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from pymongo import AsyncMongoClient

from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import IngestProcess
from tests.ingest.faults import mesh_at
from tests.store.conftest import running_store, sha256, store_config

pytestmark = pytest.mark.mongo


async def test_a_fresh_node_takes_a_backup(mongo_uri: str, mongo_database: str, run_dir: Path, tmp_path: Path) -> None:
    allowed = {"backups": (tmp_path / "backups").as_uri()}
    place = f"{allowed['backups']}/mine"
    old = store_config(mongo_uri, f"{mongo_database}_old", run_dir / "old.sock", tmp_path / "old", **allowed)
    async with running_store(old) as store:
        await store.put(b"abc")
        steps = [step async for step in store.stub.BackUp(pb.BackUpRequest(to=place))]
        assert steps[-1].progress.complete

    config = store_config(mongo_uri, mongo_database, run_dir / "store-0.sock", tmp_path / "new", **allowed)
    async with running_store(config) as store, mesh_at(run_dir), AsyncMongoClient(mongo_uri) as client:
        mesh = f"unix:{run_dir}/outbound.sock"
        with IngestProcess(run_dir, 0, mongo_uri, mongo_database, mesh) as ingest:
            await ingest.until_ready()

            async def has_a_leader() -> bool:
                return await client[mongo_database]["leads"].find_one({"_id": "ingest"}) is not None

            await until(has_a_leader, "ingest has settled")
            steps = [step async for step in store.stub.Restore(pb.RestoreRequest(source=place))]
            assert steps[-1].progress.complete
            assert await store.get(sha256(b"abc")) == (3, b"abc")
            again = store.stub.Restore(pb.RestoreRequest(source=place))
            with pytest.raises(Exception, match="not empty"):
                [step async for step in again]
