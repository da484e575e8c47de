"""Who has used up a quota of storage submits nothing; what was accepted ends as ever."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from mesh.rpc.channel import connect
from services.ingest.intake.storage import StorageQuotas
from shoal.errors import ResourceExhausted
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, submit


def over(tenant: str) -> store_pb2.TenantUsage:
    return store_pb2.TenantUsage(tenant=tenant, results=9, bytes=5_000, quota_bytes=4_096)


@pytest.fixture
async def storage(own_mesh: FakeMesh) -> AsyncIterator[StorageQuotas]:
    async with connect(own_mesh.address) as channel, StorageQuotas(channel, read_s=0.02) as storage:
        yield storage


async def looked(mesh: FakeMesh, pages: int = 1) -> None:
    """Until the store was asked twice more, the second time certainly with what it says now."""
    wanted = mesh.store.looks + 2 * pages + 1
    await until(lambda: mesh.store.looks >= wanted, "it has looked")


def is_refused(storage: StorageQuotas, tenant: str) -> bool:
    with contextlib.suppress(ResourceExhausted):
        storage.admit(tenant)
        return False
    return True


async def test_those_who_are_over_are_refused_until_there_is_room(own_mesh: FakeMesh, storage: StorageQuotas) -> None:
    storage.admit("a")
    own_mesh.store.over = [over("a"), over(""), over("b")]
    await looked(own_mesh, 3)
    assert [is_refused(storage, tenant) for tenant in ("a", "", "b", "c")] == [True, True, True, False]
    with pytest.raises(
        ResourceExhausted, match=r"tenant 'a' take 5000 bytes, and 4096 are allowed.*shoal store"
    ) as err:
        storage.admit("a")
    assert err.value.retry_after_ms == 5_000
    with pytest.raises(ResourceExhausted, match="the default tenant"):
        storage.admit("")
    own_mesh.store.over = [over("b")]
    await looked(own_mesh)
    assert [is_refused(storage, tenant) for tenant in ("a", "", "b", "c")] == [False, False, True, False]


async def test_what_is_heard_in_between_counts_at_once(own_mesh: FakeMesh) -> None:
    """And for the next look too: what the store counts may be a second behind what it said."""
    async with connect(own_mesh.address) as channel:
        storage = StorageQuotas(channel)
        storage.mark_over_quota(over("a"))
        assert is_refused(storage, "a")
        await storage._read()
        assert is_refused(storage, "a")
        own_mesh.store.over = [over("b")]
        await storage._read()
        assert [is_refused(storage, tenant) for tenant in ("a", "b")] == [False, True]


async def test_while_the_store_is_away_what_it_said_last_stands(own_mesh: FakeMesh, storage: StorageQuotas) -> None:
    own_mesh.store.over = [over("a")]
    await looked(own_mesh)
    await own_mesh.down()
    assert is_refused(storage, "a")
    own_mesh.store.over = []
    await own_mesh.up()
    await until(lambda: not is_refused(storage, "a"), "the store is back, and there is room")


@pytest.mark.mongo
async def test_a_tenant_without_room_submits_nothing_by_any_door(own_mesh: FakeMesh, start_ingest: StartIngest) -> None:
    ingest = start_ingest()
    await ingest.until_ready()
    client = Client(ingest.address)
    queued = (await client.submit(tenant="a")).job
    own_mesh.store.over = [over("a")]

    async def refused() -> bool:
        try:
            await client.submit(tenant="a")
        except grpc.aio.AioRpcError as err:
            return err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "shoal store retention" in str(err.details())
        return False

    await until(refused, "ingest has heard of it")
    await client.submit(tenant="b")

    async def requests() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n, tenant in enumerate("aba"):
            yield pb.SubmitStreamRequest(sequence=n, submit=submit(tenant=tenant))

    acks: list[Any] = [ack async for ack in client.stub.SubmitStream(requests(), timeout=60)]
    assert [ack.code for ack in acks] == [8, 0, 8]
    assert (await client.ended(queued.id)).state == pb.JOB_STATE_SUCCEEDED
    await client.channel.close()
