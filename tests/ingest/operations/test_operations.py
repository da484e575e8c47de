"""Operations on many jobs, through a real process: previewed, carried out page by page, aborted, continued."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.mongo import connect
from mesh.mongo_lease import LEASES
from services.ingest.operations.operation_repository import RUNNING_OF_TENANT
from services.ingest.operations.operator import PAGE_JOBS
from shoal.errors import Code
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, failing, mesh_at, submit

S = grpc.StatusCode
CANCEL, REQUEUE, PURGE = pb.JOB_ACTION_CANCEL, pb.JOB_ACTION_REQUEUE, pb.JOB_ACTION_PURGE
ONCE = pb.RetryPolicy(max_attempts=1)
SUCCEEDED, ABORTED = pb.JOB_OPERATION_STATE_SUCCEEDED, pb.JOB_OPERATION_STATE_ABORTED


@pytest.fixture
def tenant() -> str:
    """The instance is shared: each test has its own jobs."""
    return f"tenant-{uuid.uuid4().hex[:8]}"


def later() -> Timestamp:
    due = Timestamp()
    due.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    return due


async def queued(client: Client, count: int, **fields: Any) -> list[str]:
    """The ids of jobs that wait for an hour."""

    async def requests() -> Any:
        for _ in range(count):
            yield pb.SubmitStreamRequest(submit=submit(not_before=later(), **fields))

    call = client.stub.SubmitStream(requests(), timeout=60)
    return [response.job_id async for response in call if response.job_id]


async def start(client: Client, action: int, dry_run: bool = False, reason: str = "", **chosen: Any) -> pb.JobOperation:
    request = pb.StartJobOperationRequest(
        action=action,  # type: ignore[arg-type]
        selection=pb.JobSelection(**chosen),
        reason=reason,
        dry_run=dry_run,
    )
    response: pb.StartJobOperationResponse = await client.stub.StartJobOperation(request, timeout=20)
    return response.operation


async def ended(client: Client, operation_id: str) -> pb.JobOperation:
    found = pb.JobOperation()

    async def has_ended() -> bool:
        nonlocal found
        request = pb.GetJobOperationRequest(id=operation_id)
        found = (await client.stub.GetJobOperation(request, timeout=20)).operation
        return found.state != pb.JOB_OPERATION_STATE_RUNNING

    await until(has_ended, f"operation {operation_id} has ended")
    return found


async def dead(client: Client, tenant: str, **fields: Any) -> str:
    job = await client.ended((await client.submit(tenant=tenant, retry=ONCE, **fields)).job.id)
    assert job.state == pb.JOB_STATE_DEAD
    return job.id


async def states(client: Client, ids: list[str]) -> list[pb.JobState]:
    return [job.state for job in await asyncio.gather(*map(client.get, ids))]


async def test_all_jobs_that_match_are_cancelled_and_no_others(client: Client, tenant: str) -> None:
    many = PAGE_JOBS + 50
    chosen = await queued(client, many, tenant=tenant, labels={"run": "7"})
    others = await queued(client, 1, tenant=tenant, labels={"run": "8"})
    others += await queued(client, 1, tenant=tenant + "-b", labels={"run": "7"})
    preview = await start(client, CANCEL, dry_run=True, tenant=tenant, labels={"run": "7"})
    assert (preview.id, preview.matched, preview.matched_at_least) == ("", many, False)
    begun = await start(client, CANCEL, reason="wrong files", tenant=tenant, labels={"run": "7"})
    done = await ended(client, begun.id)
    assert (done.state, done.matched, done.changed, done.skipped) == (SUCCEEDED, many, many, 0)
    assert set(await states(client, chosen)) == {pb.JOB_STATE_CANCELLED}
    assert "wrong files" in (await client.get(chosen[0])).transitions[-1].reason
    assert set(await states(client, others)) == {pb.JOB_STATE_QUEUED}


async def test_a_job_that_dies_again_is_requeued_once(client: Client, mesh: FakeMesh, tenant: str) -> None:
    mends: set[bytes] = set()

    async def model(request: Any, context: Any) -> Any:
        if request.raw_input_contents[0] not in mends:
            await failing(context, S.INTERNAL)
        return await echo(request, context)

    mesh.infer.model = model
    good, bad = await dead(client, tenant, data=b"good"), await dead(client, tenant, data=b"bad")
    mends.add(b"good")
    begun = await start(client, REQUEUE, reason="mended", tenant=tenant, code=Code.INTERNAL)
    done = await ended(client, begun.id)
    assert (done.state, done.changed) == (SUCCEEDED, 2)
    assert (await client.ended(good)).state == pb.JOB_STATE_SUCCEEDED
    again = await client.ended(bad)
    assert (again.state, again.generation) == (pb.JOB_STATE_DEAD, 2)
    # Its last transition is later than the operation's start.
    assert (await ended(client, begun.id)).changed == 2


async def test_dead_letters_are_purged_by_age(client: Client, mesh: FakeMesh, tenant: str) -> None:
    async def model(request: Any, context: Any) -> Any:
        await failing(context, S.INTERNAL)

    mesh.infer.model = model
    old = await dead(client, tenant)
    between = (await client.get(old)).updated_at
    between.FromMilliseconds(between.ToMilliseconds() + 1)
    await asyncio.sleep(0.01)
    new = await dead(client, tenant)
    done = await ended(client, (await start(client, PURGE, tenant=tenant, updated_before=between)).id)
    assert (done.matched, done.changed) == (1, 1)
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await client.get(old)
    assert gone.value.code() is S.NOT_FOUND
    assert (await client.get(new)).state == pb.JOB_STATE_DEAD


@pytest.mark.parametrize(
    ("action", "reason", "chosen", "words"),
    [
        (CANCEL, "", {}, "selection: empty, which would select every job"),
        (pb.JOB_ACTION_UNSPECIFIED, "", {"tenant": "t"}, "action: expected cancel, requeue, purge"),
        (77, "", {"tenant": "t"}, "action: expected"),
        (CANCEL, "", {"states": [pb.JOB_STATE_DEAD]}, "cancel is for jobs that are queued or running, not dead"),
        (PURGE, "", {"states": [pb.JOB_STATE_QUEUED]}, "purge is for jobs that are dead or failed, not queued"),
        (CANCEL, "x" * 1001, {"tenant": "t"}, "reason: at most 1000 characters"),
        (PURGE, "why", {"tenant": "t"}, "reason: not for a purge"),
        (CANCEL, "", {"code": 99}, "selection.code: expected a gRPC status code"),
        (CANCEL, "", {"labels": {str(n): "" for n in range(65)}}, "labels: at most 64"),
        (CANCEL, "", {"updated_before": Timestamp(seconds=1 << 60)}, "selection.updated_before: not a time"),
    ],
)
async def test_a_request_that_names_no_jobs_or_is_malformed_is_refused(
    client: Client, action: int, reason: str, chosen: dict[str, Any], words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await start(client, action, reason=reason, **chosen)
    assert refused.value.code() is S.INVALID_ARGUMENT
    assert words in (refused.value.details() or "")


async def test_operations_that_run_are_bounded_for_each_tenant_and_can_be_aborted(
    start_ingest: StartIngest, run_dir: Path, mongo_uri: str, mongo_database: str, tenant: str
) -> None:
    async with mesh_at(run_dir), connect(mongo_uri) as mongo:
        # Another instance leads, so that nobody carries operations out.
        leads = mongo[mongo_database][LEASES]
        far = datetime.now(UTC) + timedelta(hours=1)
        await leads.insert_one({"_id": "ingest", "holder": "another", "token": 1, "expires_at": far})
        ingest = start_ingest()
        await ingest.until_ready()
        client = Client(ingest.address)
        try:
            running = [(await start(client, CANCEL, tenant=tenant)).id for _ in range(RUNNING_OF_TENANT)]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await start(client, CANCEL, tenant=tenant)
            assert refused.value.code() is S.RESOURCE_EXHAUSTED
            assert "abort one" in (refused.value.details() or "")
            other = (await start(client, CANCEL, tenant=tenant + "-b")).id
            request = pb.AbortJobOperationRequest(id=running[0])
            aborted = (await client.stub.AbortJobOperation(request, timeout=20)).operation
            assert (aborted.state, aborted.changed) == (ABORTED, 0)
            again = (await start(client, CANCEL, tenant=tenant)).id
            await leads.delete_one({})
            for operation_id in (*running[1:], other, again):
                assert (await ended(client, operation_id)).state == SUCCEEDED
            assert (await ended(client, running[0])).state == ABORTED
            listed = await client.stub.ListJobOperations(pb.ListJobOperationsRequest(tenant=tenant), timeout=20)
            assert [one.id for one in listed.operations] == sorted([*running, again], reverse=True)
        finally:
            await client.channel.close()


async def test_an_operation_continues_after_a_kill(start_ingest: StartIngest, tenant: str) -> None:
    ingest = start_ingest(lease_ms=2_000, renew_ms=500)
    async with mesh_at(ingest.folder):
        await ingest.until_ready()
        client = Client(ingest.address)
        try:
            chosen = await queued(client, 4 * PAGE_JOBS, tenant=tenant)
            begun = await start(client, CANCEL, tenant=tenant)
            ingest.kill()
            ingest.start()
            await ingest.until_ready()
            done = await ended(client, begun.id)
            assert (done.state, done.matched) == (SUCCEEDED, 4 * PAGE_JOBS)
            assert set(await states(client, chosen)) == {pb.JOB_STATE_CANCELLED}
        finally:
            await client.channel.close()
