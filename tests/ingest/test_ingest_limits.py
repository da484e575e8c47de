"""Limits of the policy in ingest: submits count at the intake, and jobs for their callers when they run."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.rpc.access import Access
from mesh.rpc.held_shares import HeldShares
from services.ingest.batches.row_inference import LIMITED_MAX_WAIT_MS, LIMITED_WAIT_MS, Wait, decide
from services.ingest.config import IngestConfig
from services.ingest.dispatch.model_gate import FIRST_MS, LONGEST_MS, ModelGate
from services.ingest.dispatch.tenant_queues import TenantQueues
from services.ingest.job import Failure, Policy
from shoal.access import tokens
from shoal.access.caller_header import SERVICE
from shoal.access.limits import Kind
from shoal.errors import Code, LimitReached
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.access.policies import policy
from tests.breakable import until
from tests.ingest.batches.conftest import ENDED, batch_mesh
from tests.ingest.conftest import running_ingest
from tests.ingest.making import START, job
from tests.ingest.test_job_access import Served, ended, submit

SIZE = submit("double").request.ByteSize()
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class Limited(Served):
    """An instance whose policy has limits; its fake infer counts jobs as infer does."""

    def __init__(self, stub: Any, mesh: Any, access: Access, signer: Any, address: str) -> None:
        super().__init__(stub, mesh, access, signer, address)
        # infer's own count of what runs there.
        self.there = Access(policy(signer), shares=HeldShares(tuple(Kind), (Kind.IN_FLIGHT, Kind.ROWS), part=1.0))
        self.refused = 0
        mesh.infer.before = self._count
        assert access.shares is not None
        self.shares = access.shares
        self._callers: dict[str, dict[str, Any]] = {}

    def limit(self, *limits: dict[str, Any]) -> None:
        made = policy(self.signer, limits=[*limits])
        self.access.set_policy(made)
        self.there.set_policy(made)

    def of(self, tenant: str) -> dict[str, Any]:
        return self._callers.setdefault(tenant, self.by(tenant=tenant))

    async def submitted(self, tenant: str) -> str:
        return str((await self.stub.Submit(submit("double"), **self.of(tenant))).job.id)

    async def refusal(self, call: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == EXHAUSTED
        trailing = dict(caught.value.trailing_metadata() or ())
        assert int(trailing["retry-after-ms"]) > 0
        assert "few" in trailing["x-ratelimit-limit"]
        assert "limit 'few' of the policy: the tenant 'acme' has" in (caught.value.details() or "")
        return caught.value

    async def _count(self, rows: list[int], context: Any) -> None:
        headers = dict(context.invocation_metadata())
        caller = headers.get("x-shoal-job-caller")
        limits = self.there.limits_of(SERVICE, "double", None if caller is None else caller.encode())
        if limits is None:
            return
        try:
            limits.reserve(0, len(rows)).end()
        except LimitReached as err:
            self.refused += 1
            trailing = (("retry-after-ms", str(err.retry_after_ms)), *err.trailing)
            await context.abort(EXHAUSTED, err.message, trailing)


@pytest.fixture
async def limited(mongo_uri: str, mongo_database: str, run_dir: Path, tmp_path: Path) -> AsyncIterator[Limited]:
    signer = tokens.create_signer(tmp_path / "signer.json")
    shares = HeldShares((Kind.REQUESTS, Kind.IN_FLIGHT, Kind.BYTES), (Kind.IN_FLIGHT, Kind.ROWS), part=1.0)
    access = Access(policy(signer), shares=shares)
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(batch_mesh(run_dir))
        # Without bulks, each job is a call.
        mesh.infer.has_bulks = False
        settings = {"instance": "ingest-0", "listen": f"unix:{run_dir}/ingest-0.sock", "mesh": mesh.address}
        settings |= {"mongo": mongo_uri, "database": mongo_database, "drain_ms": "100", "renew_ms": "200"}
        settings |= {"poll_ms": "50", "batch_urls": f"file://{tmp_path}"}
        stub = await stack.enter_async_context(running_ingest(IngestConfig.model_validate(settings), access))
        running = Limited(stub, mesh, access, signer, settings["listen"])
        yield running
        await until(lambda: shares.in_flight == 0, "the end of every submit")


async def test_submits_beyond_the_limit_are_refused_and_other_tenants_submit(limited: Limited, tmp_path: Path) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "bytes_per_second": 0.001, "burst_bytes": 2 * SIZE})
    for _ in range(2):
        await limited.submitted("acme")
    await limited.refusal(limited.stub.Submit(submit("double"), **limited.of("acme")))
    batch = pb.SubmitBatchRequest(inputs=["file:///x"], output="file:///y", model_name="double")
    await limited.refusal(limited.stub.SubmitBatch(batch, **limited.of("acme")))
    await limited.submitted("globex")
    jobs = await limited.stub.ListJobs(pb.ListJobsRequest(), **limited.of("acme"))
    assert len(jobs.jobs) == 2


async def test_a_submit_is_in_flight_until_it_is_durable(limited: Limited) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "requests_in_flight": 1})
    for _ in range(3):
        await limited.submitted("acme")
    # A refused and an invalid one leave nothing behind.
    for request in (submit(""), submit("double", depends_on=[{"job_id": "0" * 26}])):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await limited.stub.Submit(request, **limited.of("acme"))
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    found = await asyncio.gather(
        *(limited.stub.Submit(submit("double"), **limited.of("acme")) for _ in range(20)), return_exceptions=True
    )
    codes = {each.code() for each in found if isinstance(each, grpc.aio.AioRpcError)}
    assert codes == {EXHAUSTED}
    await until(lambda: limited.shares.in_flight == 0, "the end of every submit")
    await limited.submitted("acme")


async def test_jobs_of_a_stream_wait_for_the_limit(limited: Limited) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "bytes_per_second": 10 * SIZE, "burst_bytes": SIZE})
    items = [pb.SubmitStreamRequest(sequence=n, submit=submit("double")) for n in range(5)]
    acknowledged = [each async for each in limited.stub.SubmitStream(iter(items), **limited.of("acme"))]
    assert [(each.sequence, each.code) for each in acknowledged] == [(n, 0) for n in range(5)]


async def test_jobs_beyond_the_limit_run_later_and_those_of_other_tenants_at_once(limited: Limited) -> None:
    few = {"name": "few", "tenants": ["acme"], "burst_rows": 2}
    limited.limit({**few, "rows_per_second": 0.001})
    ours = [await limited.submitted("acme") for _ in range(6)]
    await until(lambda: limited.refused >= 3, "refusals of infer")
    others = [await limited.submitted("globex") for _ in range(6)]
    for each in others:
        assert (await ended(limited, each, limited.of("globex"))).state == pb.JOB_STATE_SUCCEEDED
    states = [(await limited.stub.GetJob(pb.GetJobRequest(id=each), **limited.of("acme"))).job for each in ours]
    assert sum(each.state == pb.JOB_STATE_SUCCEEDED for each in states) == 2
    limited.limit({**few, "rows_per_second": 1000})
    for each in ours:
        last = await ended(limited, each, limited.of("acme"))
        # Refusals are no attempts.
        assert (last.state, last.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)


async def test_rows_of_a_batch_beyond_the_limit_run_later_and_none_fails(limited: Limited, tmp_path: Path) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "rows_per_second": 20, "burst_rows": 8})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"x": [n] * 4}) + "\n" for n in range(40)))
    places = {"inputs": [f"file://{tmp_path}/rows.jsonl"], "output": f"file://{tmp_path}/out"}
    request = pb.SubmitBatchRequest(**places, model_name="double")
    batch = (await limited.stub.SubmitBatch(request, **limited.of("acme"))).batch

    async def has_ended() -> bool:
        nonlocal batch
        batch = (await limited.stub.GetBatch(pb.GetBatchRequest(id=batch.id), **limited.of("acme"))).batch
        return batch.state in ENDED

    await until(has_ended, "the end of the batch")
    assert (batch.state, batch.rows_ok, batch.rows_failed) == (pb.BATCH_STATE_SUCCEEDED, 40, 0)
    assert limited.refused > 0
    # No row ran twice.
    assert set(limited.mesh.infer.rows.values()) == {1}


def test_a_limit_closes_a_model_for_one_tenant_for_as_long_as_it_says() -> None:
    gate, queues = ModelGate(), TenantQueues(lambda tenant: 1.0, timedelta(minutes=1))
    for tenant in ("acme", "globex"):
        queues.add_head(job(model_name="m", tenant=tenant).tenant_queue, START)
    gate.limited("acme", "m", START, 500)
    # Refusals while it is closed have no effect.
    gate.limited("acme", "m", START, 2_000)
    closed = gate.closed(START)
    assert closed == [("acme", "m")]
    assert [share.tenant for share in queues.plan(10, START, closed)] == ["globex"]
    assert queues.due_queues(START, closed) == {("acme", "m"), "m"}
    assert gate.closed(START + timedelta(milliseconds=500)) == []
    for tenant, retry_after_ms, closed_ms in [("short", 1, FIRST_MS), ("long", 60_000, LONGEST_MS)]:
        gate.limited(tenant, "m", START, retry_after_ms)
        assert (tenant, "m") in gate.closed(START + timedelta(milliseconds=closed_ms - 1))
        assert (tenant, "m") not in gate.closed(START + timedelta(milliseconds=closed_ms))


def test_the_wait_of_rows_that_a_limit_refuses_does_not_grow() -> None:
    failure = Failure(Code.RESOURCE_EXHAUSTED, "few", False, 700, is_limited=True)
    found = [decide(failure, rows=8, attempts=0, refusals=refusals, policy=Policy(), drawn=0.5) for refusals in (0, 20)]
    assert found == [Wait(700 * 1.5, False)] * 2
    short = Failure(Code.RESOURCE_EXHAUSTED, "few", False, 1, is_limited=True)
    assert decide(short, rows=8, attempts=0, refusals=0, policy=Policy(), drawn=0.0) == Wait(LIMITED_WAIT_MS, False)
    long = Failure(Code.RESOURCE_EXHAUSTED, "few", False, 60_000, is_limited=True)
    assert decide(long, rows=8, attempts=0, refusals=0, policy=Policy(), drawn=0.0) == Wait(LIMITED_MAX_WAIT_MS, False)
