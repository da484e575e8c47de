"""Large requests travel by reference: ingest as a process, beside a real store."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo_clock import utc_now
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import ArtifactStore, Client, FakeMesh, mesh_at
from tests.long_form import by_form
from tests.store.conftest import Store, running_store, store_config

pytestmark = pytest.mark.mongo

_UNAVAILABLE, _INVALID = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT
_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
LARGE = 600 << 10
Database = AsyncDatabase[dict[str, Any]]


@pytest.fixture
async def store(mongo_uri: str, mongo_database: str, run_dir: Path, tmp_path: Path) -> AsyncIterator[Store]:
    config = store_config(mongo_uri, f"{mongo_database}_store", run_dir / "store-0.sock", tmp_path / "blobs")
    async with running_store(config) as running:
        yield running


@pytest.fixture
async def mesh(run_dir: Path, store: Store) -> AsyncIterator[FakeMesh]:
    async with mesh_at(run_dir, ArtifactStore(store.stub)) as mesh:
        yield mesh


@pytest.fixture
async def database(mongo_uri: str, mongo_database: str) -> AsyncIterator[Database]:
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as client:
        yield client[mongo_database]


async def references(store: Store) -> list[str]:
    page = await store.stub.ListReferences(store_pb2.ListReferencesRequest())
    return [reference.name for reference in page.references]


def blobs(store: Store) -> list[Path]:
    return [path for path in (store.root / "artifacts").rglob("*") if path.is_file()]


async def test_a_large_request_is_an_artifact_until_its_job_has_ended(
    mesh: FakeMesh, store: Store, start_ingest: StartIngest, database: Database
) -> None:
    data, small = os.urandom(LARGE), os.urandom(100 << 10)
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        mesh.infer.model, model = _held, mesh.infer.model
        first = await client.submit(data=data)
        await client.submit(data=small)
        assert await references(store) == [f"job/{database.name}/{first.job.id}"]
        (blob,) = blobs(store)
        assert data in blob.read_bytes()
        (payload,) = [document async for document in database["payloads"].find()]
        assert payload.keys() == {"_id", "artifact"}
        kept = await client.stub.GetPayload(pb.GetPayloadRequest(id=first.job.id))
        assert kept.request.raw_input_contents[0] == data

        mesh.infer.model = model
        assert (await client.ended(first.job.id)).state == pb.JOB_STATE_SUCCEEDED
        assert mesh.store.results[first.job.id].response.raw_output_contents[0] == data

        async def is_released() -> bool:
            return await references(store) == []

        await until(is_released, "the reference is released")
        await client.channel.close()


async def _held(request: Any, context: Any) -> None:
    await context.abort(_UNAVAILABLE, "not now", (("retry-after-ms", "20"),))


async def test_what_failed_is_kept_and_equal_requests_are_one_artifact(
    mesh: FakeMesh, store: Store, start_ingest: StartIngest
) -> None:
    data = os.urandom(LARGE)

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(_INVALID, "not such a request")

    mesh.infer.model = refuse
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        jobs = [(await client.submit(data=data)).job.id for _ in range(3)]
        for job in jobs:
            assert (await client.ended(job)).state == pb.JOB_STATE_FAILED
            kept = await client.stub.GetPayload(pb.GetPayloadRequest(id=job))
            assert kept.request.raw_input_contents[0] == data
        assert len(await references(store)) == 3
        assert len(blobs(store)) == 1
        await client.channel.close()


async def usage(store: Store) -> dict[str, tuple[int, int]]:
    """Payloads of each tenant that has some, and their bytes."""
    found = await store.stub.ListUsage(store_pb2.ListUsageRequest())
    return {one.tenant: (one.payloads, one.payload_bytes) for one in found.usages if one.payloads}


async def test_a_large_request_counts_for_its_tenant_until_its_job_has_ended(
    mesh: FakeMesh, store: Store, start_ingest: StartIngest
) -> None:
    async def is_refused(request: Any, context: Any) -> None:
        await context.abort(_INVALID, "not such a request")

    mesh.infer.model, model = _held, mesh.infer.model
    data = os.urandom(LARGE)
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        jobs = [(await client.submit(data=data, tenant=tenant)).job.id for tenant in ("a", "a", "", "b")]
        await client.submit(data=os.urandom(100 << 10), tenant="small")

        async def counts(expected: dict[str, int]) -> None:
            async def do_so() -> bool:
                found = await usage(store)
                return {tenant: payloads for tenant, (payloads, _) in found.items()} == expected

            await until(do_so, f"payloads count: {expected}")

        await counts({"": 1, "a": 2, "b": 1})
        sizes = {nbytes // payloads for payloads, nbytes in (await usage(store)).values()}
        assert all(LARGE + 512 < size < LARGE + 1_024 for size in sizes)
        mesh.infer.model = model
        for job in jobs:
            assert (await client.ended(job)).state == pb.JOB_STATE_SUCCEEDED
        await counts({})

        mesh.infer.model = is_refused
        failed = (await client.submit(data=data, tenant="a")).job.id
        assert (await client.ended(failed)).state == pb.JOB_STATE_FAILED
        await counts({"a": 1})  # Its request is kept.
        found = await store.stub.ListUsage(store_pb2.ListUsageRequest(recount=True))
        assert {one.tenant: one.payloads for one in found.usages if one.payloads} == {"a": 1}
        await client.channel.close()


async def test_payloads_use_a_quota_up(mesh: FakeMesh, store: Store, start_ingest: StartIngest) -> None:
    """Who is over is refused at the next submit, and not only when the quotas are looked at again."""
    mesh.infer.model, model = _held, mesh.infer.model
    await store.stub.SetQuota(store_pb2.SetQuotaRequest(tenant="a", bytes=2 * LARGE))
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        accepted = [(await client.submit(data=os.urandom(LARGE), tenant="a")).job.id for _ in range(2)]
        with pytest.raises(
            grpc.aio.AioRpcError, match=f"payloads of tenant 'a' take .*{2 * LARGE} are allowed"
        ) as told:
            await client.submit(data=os.urandom(LARGE), tenant="a")
        assert told.value.code() is _EXHAUSTED
        assert ("retry-after-ms", "5000") in [*(told.value.trailing_metadata() or ())]
        # Small ones too, for their results count; others may.
        with pytest.raises(grpc.aio.AioRpcError, match="are allowed"):
            await client.submit(data=b"small", tenant="a")
        await client.submit(data=os.urandom(LARGE), tenant="b")
        # What was accepted is done, and when its payloads are gone there is room again.
        mesh.infer.model = model
        for job in accepted:
            assert (await client.ended(job)).state == pb.JOB_STATE_SUCCEEDED
            assert job in mesh.store.results

        async def has_room() -> bool:
            try:
                await client.submit(data=os.urandom(LARGE), tenant="a")
            except grpc.aio.AioRpcError as err:
                return err.code() is not _EXHAUSTED
            return True

        await until(has_room, "there is room again")
        await client.channel.close()


async def test_without_a_store_submits_go_on(
    mesh: FakeMesh, store: Store, start_ingest: StartIngest, database: Database
) -> None:
    data = os.urandom(LARGE)
    assert isinstance(mesh.store, ArtifactStore)
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        mesh.infer.model, model = _held, mesh.infer.model
        before = await client.submit(data=data)
        mesh.store.is_away = True
        away = await client.submit(data=data)
        payloads = {document["_id"]: document async for document in database["payloads"].find()}
        assert "artifact" in payloads[before.job.id]
        assert "request" in payloads[away.job.id]
        mesh.infer.model = model
        assert (await client.ended(away.job.id)).state == pb.JOB_STATE_SUCCEEDED

        # The other one waits for the store, however often it is tried: no attempt of it reached a model.
        async def was_tried() -> bool:
            job = await client.get(before.job.id)
            return job.last_code == _UNAVAILABLE.value[0] and "store is away" in job.last_message

        await until(was_tried, "it is tried")
        mesh.store.is_away = False
        ended = await client.ended(before.job.id)
        assert (ended.state, ended.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
        await client.channel.close()


async def test_a_request_that_rotted_ends_its_job_and_says_so(
    mesh: FakeMesh, store: Store, start_ingest: StartIngest
) -> None:
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        mesh.infer.model = _held  # Who has fetched the request before it rotted has no answer either.
        retry = pb.RetryPolicy(max_attempts=2)
        job = (await client.submit(data=os.urandom(LARGE), retry=retry)).job.id
        (blob,) = blobs(store)
        blob.write_bytes(bytes(blob.stat().st_size))
        ended = await client.ended(job)
        assert ended.state == pb.JOB_STATE_DEAD
        assert "no longer in the store" in ended.last_message
        await client.channel.close()


async def test_kills_between_store_and_database_lose_nothing(
    mesh: FakeMesh, store: Store, start_ingest: StartIngest
) -> None:
    data = [os.urandom(LARGE) for _ in range(by_form(2, 5))]
    mesh.infer.model, model = _held, mesh.infer.model
    jobs = []
    for number, each in enumerate(data):
        with start_ingest() as ingest:
            await ingest.until_ready()
            client = Client(ingest.address)
            jobs.append((await client.submit(data=each, idempotency_key=str(number))).job.id)
            ingest.kill()
            await client.channel.close()
    mesh.infer.model = model
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        for job, each in zip(jobs, data, strict=True):
            assert (await client.ended(job)).state == pb.JOB_STATE_SUCCEEDED
            assert mesh.store.results[job].response.raw_output_contents[0] == each
        await client.channel.close()


async def test_a_job_is_claimed_only_when_its_request_is_in_the_store(
    mesh: FakeMesh, start_ingest: StartIngest
) -> None:
    """Else the lease of a job whose store is slow would have lapsed before anybody has it."""
    handed_in: list[datetime] = []

    async def noted(context: Any) -> None:
        handed_in.append(utc_now())

    mesh.store._checked = noted  # type: ignore[attr-defined]
    with start_ingest() as ingest:
        await ingest.until_ready()
        client = Client(ingest.address)
        accepted = await client.submit(data=os.urandom(LARGE))
        assert accepted.job.state == pb.JOB_STATE_RUNNING
        claimed = accepted.job.transitions[1]
        assert claimed.reason == "claimed"
        assert claimed.at.ToDatetime(UTC) > handed_in[0]
        await client.channel.close()
