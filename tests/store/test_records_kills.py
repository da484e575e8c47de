"""kill -9 of the store, again and again, under a stream, under exports, while retention removes: a real process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet as pq
import pytest

from mesh import mongo
from mesh.mongo_lease import EXPIRED, LEASES
from mesh.removal_guard import MARKS
from mesh.rpc.channel import connect
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.results.result_documents import document
from shoal.client import AsyncClient, RetryPolicy
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc
from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.long_form import by_form
from tests.store.conftest import serving, upload
from tests.store.test_store_process import process

pytestmark = pytest.mark.mongo

COUNT = 3_000
KILLS = by_form(2, 4)
YEAR_AGO = datetime(2025, 11, 24, tzinfo=UTC)
NAMED = [f"j{n:05}" for n in range(COUNT)]


class Killed:
    """A store process; `now()` kills it and starts it again."""

    def __init__(self, process: Process, address: str) -> None:
        self.address = address
        self.count = 0
        self._process = process

    def now(self) -> None:
        self._process.kill()
        self._process.start()
        self.count += 1

    async def until_ready(self) -> None:
        async with connect(self.address) as channel:
            await until(lambda: serving(channel), "the store serves")


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    """The database with COUNT results of a year ago, among three tenants."""
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        docs = []
        for n, job in enumerate(NAMED):
            result = pb.Result(job_id=job, outcome=1, model_name="m", tenant=f"t{n % 3}", labels={"n": str(n % 2)})
            answer = pb.Result(job_id=job).response.SerializeToString()
            docs.append(document(result, YEAR_AGO + timedelta(milliseconds=n // 7), answer))
        await collections.results.insert_many(docs)
        # An earlier process has removed what was old until now: otherwise the year would count as a jump of the clock.
        await client[mongo_database][MARKS].insert_one({"_id": "results", "at": datetime.now(UTC)})
        yield collections


@pytest.fixture
async def store(collections: Collections, config: StoreConfig, python: str, tmp_path: Path) -> AsyncIterator[Killed]:
    address = f"127.0.0.1:{free_port()}"
    env = {
        "SHOAL_STORE_LISTEN": address,
        "SHOAL_STORE_RETENTION_MS": "100",
        "SHOAL_STORE_NOTICE_MS": "0",
        "SHOAL_STORE_EXPORTS": (tmp_path / "exports").as_uri(),
    }
    with process(config, python, tmp_path / "store.log", **env) as running:
        killed = Killed(running, address)
        await killed.until_ready()
        yield killed


def client_of(store: Killed) -> AsyncClient:
    return AsyncClient(store.address, retry=RetryPolicy(attempts=400, stream_attempts=400, longest_wait_s=0.5))


async def test_a_stream_has_each_result_once(store: Killed) -> None:
    kills, seen = by_form((1, 2_900), (1, 700, 1_500, 2_900)), list[str]()
    async with client_of(store) as client:
        async for result in client.results.stream():
            seen.append(result.job_id)
            if len(seen) in kills:
                store.now()
    assert store.count == len(kills)
    assert seen == NAMED


@pytest.mark.parametrize("by_the_store", [False, True])
async def test_an_export_has_each_row_once(store: Killed, tmp_path: Path, by_the_store: bool) -> None:
    folder = tmp_path / "exports" / "here"
    killed_at: set[int] = set()
    async with client_of(store) as client:
        to = folder.as_uri() if by_the_store else folder
        async for at in client.results.export(to, part_rows=250):
            if at.parts in by_form((1, 9), (1, 4, 9)) and at.parts not in killed_at:
                killed_at.add(at.parts)
                store.now()
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == 12
    assert [row for file in files for row in pq.read_table(file).column("job_id").to_pylist()] == NAMED
    assert (folder / "_manifest.json").exists()
    assert store.count >= 2


async def test_retention_removes_whole_batches_or_nothing(store: Killed, collections: Collections) -> None:
    """Killed in the middle of removing, it goes on; at the end exactly the right ones are gone, and counted so."""
    standing: Any = {"recorded_at": {"$exists": True}}
    async with connect(store.address) as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        await stub.ListUsage(pb.ListUsageRequest(recount=True), timeout=30)
        rule = pb.RetentionRule(collection=pb.RetentionRule.COLLECTION_RESULTS, tenant="t1")
        await stub.SetRetention(pb.SetRetentionRequest(rule=rule), timeout=30)
        rule.ClearField("tenant")
        rule.keep.FromTimedelta(timedelta(days=30))
        await stub.SetRetention(pb.SetRetentionRequest(rule=rule), timeout=30)
        for kill in range(KILLS):
            left = await collections.results.count_documents(standing)

            async def is_under_way(left: int = left) -> bool:
                return await collections.results.count_documents(standing) < left or left == COUNT // 3

            # A transaction of the process that was killed is open for up to ten seconds.
            await until(is_under_way, "it removes", 60, every_s=0.05)
            store.now()
            # As if its time had passed: `retention/test_rounds.py` waits for that.
            await collections.db[LEASES].update_one({"_id": "store"}, {"$set": {"expires_at": EXPIRED}})
            await store.until_ready()
            assert store.count == kill + 1

        async def is_done() -> bool:
            return await collections.results.count_documents(standing) == COUNT // 3

        await until(is_done, "all is removed", 60, every_s=0.2)
        assert await collections.results.distinct("tenant", standing) == ["t1"]
        assert await collections.results.count_documents({"removed_at": {"$exists": True}}) == 2 * COUNT // 3
        assert await collections.results.count_documents({}) == COUNT
        usage = {one.tenant: one.results for one in (await stub.ListUsage(pb.ListUsageRequest(), timeout=30)).usages}
        assert usage == {"t0": 0, "t1": COUNT // 3, "t2": 0}


async def test_payloads_are_counted_exactly(store: Killed, collections: Collections) -> None:
    """Killed while payloads come, move and go: at the end what was counted is what is there, without a recount."""
    dice = random.Random(1)
    is_over = False
    made = 0

    async def changing(stub: Any, n: int) -> None:
        nonlocal made
        while not is_over:
            data, name = os.urandom(2_000), f"job/{n}/{dice.randrange(8)}"
            with contextlib.suppress(grpc.aio.AioRpcError):
                if dice.random() < 0.4:
                    await stub.ReleaseArtifacts(pb.ReleaseArtifactsRequest(references=[name]), timeout=5)
                else:
                    await stub.PutArtifact(upload(data, reference=name, tenant=f"t{dice.randrange(3)}"), timeout=5)
                    made += 1

    async with connect(store.address) as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        tasks = [asyncio.create_task(changing(stub, n)) for n in range(8)]
        for kill in range(KILLS):
            wanted = made + 60
            await until(lambda wanted=wanted: made >= wanted, "payloads come")  # type: ignore[misc]
            store.now()
            await store.until_ready()
            assert store.count == kill + 1
        is_over = True
        await asyncio.gather(*tasks)

        async def is_exact() -> bool:
            found = (await stub.ListUsage(pb.ListUsageRequest(), timeout=30)).usages
            counted = {one.tenant: (one.payloads, one.payload_bytes) for one in found if one.payloads}
            there: dict[str, tuple[int, int]] = {}
            async for doc in collections.references.find():
                count, nbytes = there.get(doc["tenant"], (0, 0))
                there[doc["tenant"]] = (count + 1, nbytes + doc["size"] + 512)
            return counted == there

        await until(is_exact, "all is counted")
        assert await collections.usage_changes.count_documents({}) == 0
