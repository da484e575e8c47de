"""Tenants through real processes: settings at run time, refusals that say when to come back, streams that wait."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh, echo, submit

S = grpc.StatusCode


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test has."""
    return uuid.uuid4().hex


async def set_tenant(client: Client, name: str, *inherit: str, **settings: float) -> pb.Tenant:
    request = pb.SetTenantRequest(name=name, settings=pb.TenantSettings(**settings), inherit=inherit)  # type: ignore[arg-type]
    answer: pb.SetTenantResponse = await client.stub.SetTenant(request, timeout=20)
    return answer.tenant


async def get_tenant(client: Client, name: str) -> pb.Tenant:
    answer: pb.GetTenantResponse = await client.stub.GetTenant(pb.GetTenantRequest(name=name), timeout=20)
    return answer.tenant


async def refusal(client: Client, **fields: Any) -> tuple[str, int]:
    """Why a submit is refused, and when to come back (ms)."""
    with pytest.raises(grpc.aio.AioRpcError) as call:
        await client.submit(**fields)
    assert call.value.code() is S.RESOURCE_EXHAUSTED
    return call.value.details() or "", int(dict(call.value.trailing_metadata() or ())["retry-after-ms"])


async def test_settings_are_kept_changed_and_let_go(client: Client, tenant: str) -> None:
    unset = await get_tenant(client, tenant)
    assert (unset.in_force.weight, unset.in_force.rate, unset.HasField("updated_at")) == (1, 0, False)
    await set_tenant(client, tenant, weight=4, max_pending=10)
    changed = await set_tenant(client, tenant, rate=2.5)
    assert (changed.settings.weight, changed.settings.max_pending, changed.settings.rate) == (4, 10, 2.5)
    assert changed.in_force.burst == 2.5
    assert changed.HasField("updated_at")
    less = await set_tenant(client, tenant, "weight", "max_pending", rate=0)
    assert (less.settings.HasField("weight"), less.settings.rate, less.in_force.weight) == (False, 0, 1)
    assert await get_tenant(client, tenant) == less
    listed = await client.stub.ListTenants(pb.ListTenantsRequest(page_size=200), timeout=20)
    assert less in listed.tenants


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.SetTenantRequest(), "settings: set at least one of"),
        (pb.SetTenantRequest(name="t" * 65, settings=pb.TenantSettings(weight=1)), "name: at most 64 characters"),
        (pb.SetTenantRequest(settings=pb.TenantSettings(weight=float("nan"))), "settings.weight: .*got nan"),
        (pb.SetTenantRequest(settings=pb.TenantSettings(max_pending=-(2**63))), "settings.max_pending: "),
        (pb.SetTenantRequest(settings=pb.TenantSettings(burst=1e300)), "settings.burst: "),
        (pb.SetTenantRequest(inherit=["x"]), "inherit: 'x' is none of"),
        (pb.SetTenantRequest(settings=pb.TenantSettings(weight=1), inherit=["weight"]), "inherit: weight is set"),
    ],
)
async def test_what_is_wrong_is_named(client: Client, request_: pb.SetTenantRequest, says: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=says) as call:
        await client.stub.SetTenant(request_, timeout=20)
    assert call.value.code() is S.INVALID_ARGUMENT


async def test_a_full_quota_refuses_its_tenant_alone(client: Client, tenant: str) -> None:
    await set_tenant(client, tenant, max_pending=3)
    hour = Duration(seconds=3_600)
    waiting = [await client.submit(tenant=tenant, delay=hour) for _ in range(2)]
    waiting.append(
        await client.submit(tenant=tenant, depends_on=[pb.Dependency(job_id=waiting[1].job.id)])
    )  # For another job, it waits too.
    message, retry_after_ms = await refusal(client, tenant=tenant)
    assert message.startswith(f"3 jobs of tenant '{tenant}' are queued, which is its quota")
    assert retry_after_ms > 0
    assert (await get_tenant(client, tenant)).pending == 3
    assert (await client.submit(tenant=tenant + " other")).job.id
    await client.stub.CancelJob(pb.CancelJobRequest(id=waiting[0].job.id), timeout=20)

    async def is_taken() -> bool:
        try:
            return bool((await client.submit(tenant=tenant)).job.id)
        except grpc.aio.AioRpcError as err:
            if err.code() is S.RESOURCE_EXHAUSTED:
                return False
            raise

    await until(is_taken, "room again")


class Waits:
    """A model that answers when it is let."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.calls = 0
        self.order: list[str] = []

    async def __call__(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.order.append(request.id)
        await self.go_on.wait()
        return await echo(request, context)


async def test_a_rate_refuses_and_says_when(client: Client, tenant: str) -> None:
    await set_tenant(client, tenant, rate=0.01, burst=5)
    answers = await asyncio.gather(*(client.submit(tenant=tenant) for _ in range(12)), return_exceptions=True)
    kinds = Counter(type(answer) for answer in answers)
    assert kinds == {pb.SubmitResponse: 5, grpc.aio.AioRpcError: 7}
    message, retry_after_ms = await refusal(client, tenant=tenant)
    assert message.startswith(f"tenant '{tenant}' submits more than its 0.01 jobs a second")
    assert retry_after_ms > 10_000


async def test_a_stream_is_slowed_down_to_the_rate_and_loses_nothing(client: Client, tenant: str) -> None:
    await set_tenant(client, tenant, rate=50, burst=10)
    sent = 0

    async def each() -> AsyncIterator[pb.SubmitStreamRequest]:
        nonlocal sent
        for sent in range(1, 121):
            yield pb.SubmitStreamRequest(sequence=sent, submit=submit(tenant=tenant))

    started = time.monotonic()
    answers = [answer async for answer in client.stub.SubmitStream(each(), timeout=100)]
    assert [answer.sequence for answer in answers] == list(range(1, 121))
    assert not any(answer.code for answer in answers)
    # All but the burst had to wait for their turn: that is no guess about the machine.
    assert 10 + 50 * (time.monotonic() - started + 1) >= 120


async def test_a_change_reaches_every_instance_and_a_late_one(
    start_ingest: StartIngest, own_mesh: FakeMesh, tenant: str
) -> None:
    processes = [start_ingest(n) for n in range(2)]
    for process in processes:
        await process.until_ready()
    clients = [Client(process.address) for process in processes]
    await set_tenant(clients[0], tenant, rate=0.001, burst=1)

    async def is_heard() -> bool:
        return (await get_tenant(clients[1], tenant)).in_force.rate == 0.001

    await until(is_heard, "the second instance hears")
    await clients[1].submit(tenant=tenant)
    for client in clients:
        await refusal(client, tenant=tenant)
    late = start_ingest(2)
    await late.until_ready()
    clients.append(Client(late.address))
    await refusal(clients[2], tenant=tenant)
    for client in clients:
        await client.channel.close()


async def test_ten_jobs_pass_a_backlog(start_ingest: StartIngest, own_mesh: FakeMesh) -> None:
    """With one place, the order of calls is the order of claims."""
    own_mesh.infer.model = waits = Waits()
    ingest = start_ingest(max_in_flight=1)
    await ingest.until_ready()
    client = Client(ingest.address)
    await set_tenant(client, "small", weight=2)
    await client.submit(tenant="big", request_id="first")
    await until(lambda: waits.calls == 1, "the place is taken")

    async def backlog() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n in range(500):
            yield pb.SubmitStreamRequest(sequence=n, submit=submit(tenant="big", request_id=f"big {n}"))

    assert len([answer async for answer in client.stub.SubmitStream(backlog(), timeout=60)]) == 500
    ten = [await client.submit(tenant="small", request_id=f"small {n}") for n in range(10)]
    waits.go_on.set()
    for answer in ten:
        assert (await client.ended(answer.job.id)).state == pb.JOB_STATE_SUCCEEDED
    await until(lambda: sum(name.startswith("small") for name in waits.order) == 10, "all ten run")
    before = [name for name in waits.order[: waits.order.index("small 9")] if name.startswith("big")]
    # Two thirds are its; what was at hand when it came (`dispatcher.py`) and a claim in full come first.
    assert len(before) <= 30
    await client.channel.close()
