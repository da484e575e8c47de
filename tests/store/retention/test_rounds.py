"""Retention rounds: only the holder of the leader lease sweeps, and a leader that is gone is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from mesh.mongo import connect
from mesh.mongo_lease import EXPIRED, LEASES, LeaderLease
from services.store.config import StoreConfig
from services.store.documents import Collection, Collections
from services.store.retention.rounds import LEASE_MS, RENEW_MS, RetentionRounds
from services.store.retention.sweep import Lease, Swept
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.store.conftest import running_store, store_config
from tests.store.test_result_rpc import put, result
from tests.store.test_store_process import process

pytestmark = pytest.mark.mongo

TTL_MS = 60_000


class FakeSweep:
    """Counts the tokens under which it was called; answers as a test says."""

    def __init__(self) -> None:
        self.tokens: list[int | None] = []
        self.fails = 0
        self.more = 0

    async def apply(self, lease: Lease) -> Swept:
        self.tokens.append(lease.token)
        if self.fails:
            self.fails -= 1
            raise Unavailable("as the test wants it")
        self.more = max(0, self.more - 1)
        return Swept(results=1, more=self.more > 0)


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    async with connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        yield collections


def lease_of(collections: Collections, holder: str) -> LeaderLease:
    ready = asyncio.Event()
    ready.set()
    return LeaderLease(collections.db[LEASES], "store", holder, ready=ready, ttl_ms=TTL_MS, renew_ms=100)


async def test_the_leader_sweeps_and_then_its_successor(collections: Collections) -> None:
    first, second = FakeSweep(), FakeSweep()
    first.fails = 3
    follower = lease_of(collections, "second")
    leader = lease_of(collections, "first")
    async with AsyncExitStack() as stack:
        async with leader, RetentionRounds(first, leader, 0.1):  # type: ignore[arg-type]
            await until(lambda: leader.is_held, "the first leads")
            await stack.enter_async_context(follower)
            await stack.enter_async_context(RetentionRounds(second, follower, 0.1))  # type: ignore[arg-type]
            await until(lambda: len(first.tokens) >= 6, "the leader sweeps, and goes on after failures")
            assert (set(first.tokens), second.tokens) == ({1}, [])
        await until(lambda: len(second.tokens) >= 3, "its successor sweeps")
        assert (set(first.tokens), set(second.tokens)) == ({1}, {2})


async def test_the_leader_sweeps_again_at_once_while_there_is_more(collections: Collections) -> None:
    sweep = FakeSweep()
    sweep.more = 20
    async with lease_of(collections, "one") as lease, RetentionRounds(sweep, lease, 86_400.0):  # type: ignore[arg-type]
        await until(lambda: sweep.more == 0 and len(sweep.tokens) == 20, "all is swept in one go")


async def test_a_leader_that_is_killed_is_replaced_within_its_lease(
    config: StoreConfig,
    mongo_uri: str,
    mongo_database: str,
    run_dir: Path,
    tmp_path: Path,
    python: str,
) -> None:
    """A real process is killed while it leads: another instance applies the rules that were set."""
    other = store_config(mongo_uri, mongo_database, run_dir / "store-1.sock", tmp_path / "blobs", retention_ms=100)
    async with connect(mongo_uri) as client:
        leases, results = client[mongo_database][LEASES], client[mongo_database].results
        with process(config, python, tmp_path / "log", SHOAL_STORE_RETENTION_MS="100") as leader:

            async def leads() -> bool:
                document = await leases.find_one({"_id": "store"})
                return document is not None and document["holder"].startswith("local/store-0")

            await until(leads, "the first instance leads")
            async with running_store(other.model_copy(update={"instance": "store-1"})) as store:
                await put(store, result("old"))
                rule = pb.RetentionRule(collection=pb.RetentionRule.COLLECTION_RESULTS)
                rule.keep.FromTimedelta(timedelta(minutes=1))
                await store.stub.SetRetention(pb.SetRetentionRequest(rule=rule))
                leader.kill()
                died = await leases.find_one({"_id": "store"})
                await results.update_many({}, {"$set": {"recorded_at": EXPIRED}})
                # The lease, a look at it, and half a minute for a busy machine.
                within_s = (LEASE_MS + RENEW_MS) / 1_000 + 30
                await until(lambda: _is_removed(results), "its successor removes the result", within_s)
                taken = await leases.find_one({"_id": "store"})
                assert taken["token"] == died["token"] + 1
                assert taken["holder"].startswith("local/store-1")


async def _is_removed(results: Collection) -> bool:
    return await results.find_one({"_id": "old", "removed_at": {"$exists": True}}) is not None
