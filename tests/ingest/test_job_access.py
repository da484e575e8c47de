"""Authorisation of jobs by model: at the submit, and again when a job runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rpc.access import Access
from mesh.rpc.tenant_scope import TenantScope
from services.ingest.config import IngestConfig
from services.ingest.dispatch.attempt import Attempts
from services.ingest.dispatch.model_gate import ModelGate
from services.ingest.dispatch.remote import GivenUpJobs
from services.ingest.intake.budget import Budget
from services.ingest.job import BackToQueue
from services.ingest.job_access import checked_caller, refusal
from services.ingest.limits import CALLER_BYTES
from shoal.access import caller_header, tokens
from shoal.access.caller_header import connector_value, value_of
from shoal.access.decision import connector, decide
from shoal.access.policy import Claims, Issuer, Policy
from shoal.access.rpc_groups import MODEL_INFER, SUBMIT
from shoal.access.tokens import Signer
from shoal.errors import InvalidArgument, PermissionDenied, Unavailable
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.access.policies import claims_of, key, passed, policy
from tests.access.test_decision import MODELS, ROLES, SUBJECTS, TENANTS, patterns, policies
from tests.breakable import until
from tests.ingest.batches.conftest import BatchMesh, batch_mesh
from tests.ingest.conftest import running_ingest
from tests.ingest.making import START, job
from tests.mesh.http1.raw import RawClient

ISSUER = Issuer.model_construct(
    issuer="idp", audiences=("a",), claims=Claims(subject="user.name", models="m", grants="g"), role=None, tenant=None
)

claims = st.fixed_dictionaries(
    {
        "iss": st.just("idp"),
        "tenant": st.sampled_from(TENANTS),
        "user": st.sampled_from(SUBJECTS).map(lambda name: {"name": name, "address": "secret"}),
        "role": st.sampled_from([*ROLES, ""]),
        "jti": st.sampled_from(["k-1", "k-2"]),
        "m": st.lists(patterns, max_size=2),
        "g": st.lists(st.sampled_from(["a", "b"]), max_size=2),
        "exp": st.just(1),
        "email": st.just("ann@example.com"),
    }
)


def denied(access: Access, caller: bytes, model: str) -> bool:
    try:
        checked_caller(TenantScope("acme", caller, access), model)
    except PermissionDenied:
        return True
    return False


@settings(max_examples=60)
@given(policies(), claims, st.sampled_from(MODELS))
def test_a_submit_and_a_run_are_decided_as_the_policy_decides(made: Policy, named: dict[str, Any], model: str) -> None:
    made = made.model_copy(update={"issuers": (ISSUER,)})
    access, caller = Access(made), value_of(named)
    known = access._known(caller).caller
    allowed = decide(made, known, SUBMIT, model).allowed and decide(made, known, MODEL_INFER, model).allowed
    assert denied(access, caller, model) == (not allowed)
    stored = access.storable(caller)
    assert caller_header.claims(stored).keys() == named.keys() - {"exp", "email"}
    assert (refusal(access, stored, model) is None) == allowed


@settings(max_examples=30)
@given(policies(), st.sampled_from([*TENANTS, ""]), st.sampled_from(MODELS))
def test_a_connector_is_a_user_of_its_tenant(made: Policy, tenant: str, model: str) -> None:
    known = connector("reviews", tenant)
    allowed = decide(made, known, SUBMIT, model).allowed and decide(made, known, MODEL_INFER, model).allowed
    assert denied(Access(made), connector_value("reviews", tenant), model) == (not allowed)


def test_a_job_from_before_the_policy_is_refused() -> None:
    made = Policy.model_construct(version=1, issuers=(ISSUER,), roles={}, grants=(), open=(), revoked=())
    refused = refusal(Access(made), b"", "ocr")
    assert refused is not None
    assert "no verified caller" in refused.message
    assert refusal(None, b"", "ocr") is None


def test_claims_that_are_too_long_are_refused(tmp_path: Path) -> None:
    signer = tokens.create_signer(tmp_path / "signer.json")
    named = {**claims_of(key(signer)), "grants": ["x" * CALLER_BYTES]}
    scope = TenantScope("acme", value_of(named), Access(policy(signer)))
    with pytest.raises(InvalidArgument, match="claims"):
        checked_caller(scope, "ocr")


async def test_jobs_wait_for_a_policy_that_is_not_known_yet() -> None:
    with pytest.raises(Unavailable, match="policy"):
        refusal(Access(None), b"", "ocr")
    attempts = Attempts(
        model=None,  # type: ignore[arg-type]
        payloads=None,  # type: ignore[arg-type]
        gate=ModelGate(),
        memory=Budget(1),
        clock=lambda: START,
        timeout_ms=1_000,
        access=Access(None),
    )
    ((_, decision),) = [each async for some in attempts.run([job()], GivenUpJobs()) for each in some]
    assert isinstance(decision, BackToQueue)
    assert not decision.is_counted


# With an instance.


def submit(model: str, first: int = 1, **fields: Any) -> pb.SubmitRequest:
    made = pb.SubmitRequest(**fields)
    made.request.model_name = model
    made.request.raw_input_contents.append(np.full(4, first, np.float32).tobytes())
    return made


class Served:
    """An instance with a policy, and a mesh with the models `double` and `length`."""

    def __init__(self, stub: Any, mesh: BatchMesh, access: Access, signer: Signer, address: str) -> None:
        self.stub, self.mesh, self.access, self.signer, self.address = stub, mesh, access, signer, address
        self.released = asyncio.Event()
        self.entered = asyncio.Event()
        mesh.infer.before = self._before

    async def _before(self, rows: list[int], context: Any) -> None:
        self.entered.set()
        await self.released.wait()

    def by(self, **options: Any) -> dict[str, Any]:
        return {"metadata": (passed(claims_of(key(self.signer, **options))),), "timeout": 30}

    def allow(self, *models: str) -> None:
        self.access.set_policy(policy(self.signer, grants=[{"name": "g", "models": list(models)}]))


@pytest.fixture
async def served(mongo_uri: str, mongo_database: str, run_dir: Path, tmp_path: Path) -> AsyncIterator[Served]:
    signer = tokens.create_signer(tmp_path / "signer.json")
    access = Access(policy(signer, grants=[{"name": "g", "models": ["double", "length"]}]))
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(batch_mesh(run_dir))
        settings = {"instance": "ingest-0", "listen": f"unix:{run_dir}/ingest-0.sock", "mesh": mesh.address}
        settings |= {"mongo": mongo_uri, "database": mongo_database, "drain_ms": "100", "renew_ms": "200"}
        settings |= {"poll_ms": "50", "batch_urls": f"file://{tmp_path}"}
        stub = await stack.enter_async_context(running_ingest(IngestConfig.model_validate(settings), access))
        running = Served(stub, mesh, access, signer, settings["listen"])
        try:
            yield running
        finally:
            running.released.set()


async def ended(served: Served, job_id: str, ours: dict[str, Any]) -> pb.Job:
    watched = [each.job async for each in served.stub.WatchJob(pb.WatchJobRequest(id=job_id), **ours)]
    return watched[-1]


async def code_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return str(caught.value.code().name)


async def test_a_model_that_the_caller_may_not_run_is_refused_at_every_way_to_submit(served: Served) -> None:
    ours = served.by(models=["length"])
    assert await code_of(served.stub.Submit(submit("double"), **ours)) == "PERMISSION_DENIED"
    items, runs = [pb.SubmitStreamRequest(submit=submit("double"))], [pb.RunStreamRequest(submit=submit("double"))]
    for stream in (served.stub.SubmitStream(iter(items), **ours), served.stub.RunStream(iter(runs), **ours)):
        (answer,) = [each async for each in stream]
        assert answer.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
    put = pb.PutScheduleRequest(schedule=pb.Schedule(name="s", cron="* * * * *", job=submit("double")))
    assert await code_of(served.stub.PutSchedule(put, **ours)) == "PERMISSION_DENIED"
    batch = pb.SubmitBatchRequest(inputs=["file:///x"], output="file:///y", model_name="double")
    assert await code_of(served.stub.SubmitBatch(batch, **ours)) == "PERMISSION_DENIED"
    assert not (await served.stub.ListJobs(pb.ListJobsRequest(), **served.by())).jobs


async def test_an_inference_over_rest_that_becomes_a_job_is_decided_as_a_submit(served: Served) -> None:
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    roles = {"sender": ["jobs"], "asker": ["infer"]}
    grants = [{"name": "g", "models": ["double", "length"]}]
    served.access.set_policy(policy(served.signer, roles=roles, grants=grants))

    async def post(*headers: str, model: str = "double", sent: Any = body, **options: Any) -> tuple[int, Any]:
        caller = ": ".join(passed(claims_of(key(served.signer, **options))))
        async with await RawClient.connect(served.address) as client:
            path, text = f"/v2/models/{model}/infer", json.dumps(sent).encode()
            response = await client.request("POST", path, text, caller, "Prefer: respond-async", *headers)
        assert response.headers.get("location", "").removeprefix("/shoal/v1/jobs/").upper() == (
            json.loads(response.body)["job"]["id"] if response.status == 202 else ""
        )
        return response.status, json.loads(response.body)

    for refused in ({"role": "viewer"}, {"role": "sender"}, {"role": "asker"}, {"models": ["length"]}):
        status, found = await post(**refused)
        assert (status, found.keys()) == (403, {"error"}), refused
    assert (await post(model="secret"))[0] == 403
    async with await RawClient.connect(served.address) as client:
        response = await client.request("POST", "/v2/models/double/infer", b"{}", "Prefer: respond-async")
        assert response.status == 401
    assert not (await served.stub.ListJobs(pb.ListJobsRequest(), **served.by())).jobs
    once = "Idempotency-Key: once"
    status, first = await post(once, "x-shoal-tenant: globex")
    assert (status, first["job"]["tenant"], first["existed"]) == (202, "acme", False)
    status, again = await post(once, model="d%6Fuble")
    assert (status, again["job"]["id"], again["existed"]) == (202, first["job"]["id"], True)
    status, other = await post(once, tenant="globex")
    assert (status, other["job"]["tenant"], other["existed"]) == (202, "globex", False)
    body["inputs"][0]["data"] = [0, 0, 0, 0]
    status, found = await post(once)
    assert (status, first["job"]["id"] in found["error"]) == (409, True)
    jobs = len((await served.stub.ListJobs(pb.ListJobsRequest(), **served.by())).jobs)
    status, found = await post("Idempotency-Key: twice-a", "Idempotency-Key: twice-b")
    assert (status, found) == (400, {"error": "the header 'idempotency-key' has 2 different values: send it once"})
    assert len((await served.stub.ListJobs(pb.ListJobsRequest(), **served.by())).jobs) == jobs
    assert (await post("Idempotency-Key: schedule:x"))[0] == 400
    assert (await post(f"Idempotency-Key: {'k' * 129}"))[0] == 400
    too_large = {"inputs": [{"name": "x", "shape": [4], "datatype": "FP32", "data": [1] * 5}]}
    assert (await post(sent=too_large))[0] == 400
    served.released.set()
    job = await ended(served, first["job"]["id"], served.by())
    assert (job.state, job.tenant) == (pb.JOB_STATE_SUCCEEDED, "acme")


async def test_a_job_whose_grant_was_taken_away_fails_and_a_requeue_runs_for_its_caller(served: Served) -> None:
    ours = served.by()
    first = (await served.stub.Submit(submit("double"), **ours)).job.id
    retry = pb.RetryPolicy(retry_codes=[grpc.StatusCode.PERMISSION_DENIED.value[0]])
    after = submit("length", retry=retry, depends_on=[{"job_id": first}])
    second = (await served.stub.Submit(after, **ours)).job.id
    await served.entered.wait()
    served.allow("double")
    served.released.set()
    assert (await ended(served, first, ours)).state == pb.JOB_STATE_SUCCEEDED
    refused = await ended(served, second, ours)
    # With the code among those that are retried, the state is that of a job without attempts left.
    assert refused.state == pb.JOB_STATE_DEAD
    assert refused.last_code == grpc.StatusCode.PERMISSION_DENIED.value[0]
    assert "no grant allows" in refused.last_message
    # A colleague with the grant may have it run.
    served.allow("double", "length")
    revoked = policy(served.signer, revoked=[str(claims_in(ours)["jti"])])
    served.access.set_policy(revoked)
    colleague = served.by(subject="colleague")
    done = await served.stub.RequeueDeadLetters(pb.RequeueDeadLettersRequest(ids=[second]), **colleague)
    assert list(done.ids) == [second]
    assert (await ended(served, second, colleague)).state == pb.JOB_STATE_SUCCEEDED


def claims_in(ours: dict[str, Any]) -> dict[str, Any]:
    ((_, value),) = ours["metadata"]
    return dict(caller_header.claims(value.encode()))


async def test_a_running_batch_ends_when_its_grant_is_taken_away(served: Served, tmp_path: Path) -> None:
    ours = served.by()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"x": [n] * 4}) + "\n" for n in range(3)))
    places = {"inputs": [f"file://{tmp_path}/rows.jsonl"], "output": f"file://{tmp_path}/out"}
    batch = (await served.stub.SubmitBatch(pb.SubmitBatchRequest(**places, model_name="double"), **ours)).batch
    await served.entered.wait()
    served.allow("length")
    last = batch

    async def has_ended() -> bool:
        nonlocal last
        last = (await served.stub.GetBatch(pb.GetBatchRequest(id=batch.id), **ours)).batch
        return bool(last.state == pb.BATCH_STATE_FAILED)

    await until(has_ended, "the batch ends")
    assert last.message.startswith("PERMISSION_DENIED: not allowed")
    assert last.rows_ok == 0
