"""Every public RPC, called by another tenant with every id that a tenant has made: it finds nothing.

Each case is called with an id of acme's, and with an id that nobody has. The caller is globex: both outcomes must be
equal but for the id. With a policy the gateway has verified the caller; without one it names its tenant itself.
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.rpc.access import Access
from services.ingest.config import IngestConfig
from services.ingest.ulid import Ulids
from shoal.access import tokens
from shoal.access.caller_header import AS_SERVICE
from shoal.access.rpc_groups import ADMINISTER, GROUP_OF, INTERNAL, OPERATE
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.ingest.v1 import ingest_pb2_grpc
from shoal.store.v1 import store_pb2 as store
from shoal.tenant_header import TENANT_HEADER
from tests.access.policies import claims_of, key, passed, policy
from tests.access.test_rpc_groups import rpcs
from tests.ingest.batches.conftest import batch_mesh
from tests.ingest.conftest import running_ingest
from tests.ingest.faults import failing
from tests.store.conftest import Store, running_store, sha256, store_config, upload

pytestmark = pytest.mark.asyncio(loop_scope="module")

Metadata = tuple[tuple[str, str], ...]
INGEST, STORE = "/shoal.ingest.v1.IngestService/", "/shoal.store.v1.StoreService/"
BROKEN = 13
# RPCs of models, and of their files, which without a policy everybody may read.
OF_GRANTS = {STORE + method for method in ["ListModels", "WatchModels", "RemoveModel", "SetAlias"]}
OF_GRANTS |= {STORE + method for method in ["RegisterModel", "StatArtifact", "GetArtifact", "PutArtifact"]}
# RPCs that have no objects of tenants, by the beginning of their path. Sequences of infer have tests of their own.
WITHOUT_OBJECTS = (
    "/inference.GRPCInferenceService/",
    "/shoal.inference.v2.",
    "/shoal.coord.v1.",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.",
)


@dataclass
class Ids:
    """Ids of objects: of acme's, or such as nobody has."""

    job: str
    dead: str
    batch: str
    schedule: str
    digest: str
    model: str
    cursor: str = ""
    export: str = ""
    operation: str = ""

    def hidden(self, text: str) -> str:
        """Return `text` without the ids, which an error may repeat."""
        for name, value in vars(self).items():
            if value:
                text = text.replace(value, f"<{name}>")
        return text


@dataclass
class World:
    """Both services, with what acme has made."""

    ingest: ingest_pb2_grpc.IngestServiceAsyncStub
    store: Store
    callers: dict[tuple[str, str], Metadata]
    acme: Ids
    nobody: Ids
    files: Path
    watch_token: str = ""

    @property
    def globex(self) -> dict[str, Any]:
        return {"metadata": self.by("globex"), "timeout": 30}

    @property
    def publisher(self) -> dict[str, Any]:
        return {"metadata": self.by("globex", "publisher"), "timeout": 30}

    def by(self, tenant: str, role: str = "user") -> Metadata:
        return self.callers[tenant, role]


def submit(first: int, **fields: Any) -> ingest.SubmitRequest:
    made = ingest.SubmitRequest(**fields)
    made.request.model_name = "double"
    made.request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    made.request.raw_input_contents.append(np.full(4, first, np.float32).tobytes())
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(mongo_uri: str, request: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    has_policy = request.param == "policy"
    signer = tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")
    tenants = ("acme", "globex")
    grants = [{"name": tenant, "tenants": [tenant], "models": ["double", f"{tenant}-*"]} for tenant in tenants]
    access = Access(policy(signer, grants=grants)) if has_policy else None
    callers = {
        (tenant, role): (passed(claims_of(key(signer, tenant, role))) if has_policy else (TENANT_HEADER, tenant),)
        for tenant in tenants
        for role in ("user", "publisher")
    }
    database, blobs = f"test_{uuid.uuid4().hex[:16]}", tmp_path_factory.mktemp("blobs")
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        files = Path(folder) / "acme"
        files.mkdir()
        async with contextlib.AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(batch_mesh(Path(folder)))

            async def refuse_broken(rows: list[int], context: Any) -> None:
                if BROKEN in rows:
                    await failing(context, grpc.StatusCode.INVALID_ARGUMENT)

            mesh.infer.before = refuse_broken
            config = store_config(mongo_uri, database, Path(folder) / "store-0.sock", blobs, drain_ms=100)
            kept = await stack.enter_async_context(running_store(config, access=access))
            address = f"unix:{folder}/ingest-0.sock"
            settings = {"instance": "ingest-0", "listen": address, "mesh": mesh.address, "mongo": mongo_uri}
            settings |= {
                "database": database,
                "drain_ms": "100",
                "batch_urls": f"file://{folder}/" + ("{tenant}" if has_policy else ""),
            }
            stub = await stack.enter_async_context(running_ingest(IngestConfig.model_validate(settings), access))
            new_id = Ulids(lambda: 1_700_000_000_000).new
            nobody = Ids(new_id(), new_id(), new_id(), "absent-nightly", sha256(b"nothing"), "acme-absent")
            nobody.operation = new_id()
            built = World(stub, kept, callers, Ids("", "", "", "", "", ""), nobody, Path(folder))
            await make(built, files)
            yield built


async def make(world: World, files: Path) -> None:
    """Make acme's job, dead letter, batch, schedule, artifact, model and results; and globex's job and result."""
    acme, user = world.acme, world.by("acme")
    accepted = await world.ingest.Submit(submit(1, idempotency_key="acme-key", keep_request=True), metadata=user)
    acme.job = accepted.job.id
    assert accepted.job.tenant == "acme"
    acme.dead = (await world.ingest.Submit(submit(BROKEN), metadata=user)).job.id
    for job_id in (acme.job, acme.dead):
        states = [
            each.job.state async for each in world.ingest.WatchJob(ingest.WatchJobRequest(id=job_id), metadata=user)
        ]
        assert states[-1] == (ingest.JOB_STATE_SUCCEEDED if job_id == acme.job else ingest.JOB_STATE_FAILED)
    acme.schedule = "acme-nightly"
    nightly = ingest.Schedule(name=acme.schedule, cron="0 3 1 1 *", job=submit(1))
    await world.ingest.PutSchedule(ingest.PutScheduleRequest(schedule=nightly), metadata=user)
    none = ingest.JobSelection(labels={"of": "no job"})
    begun = ingest.StartJobOperationRequest(action=ingest.JOB_ACTION_CANCEL, selection=none)
    acme.operation = (await world.ingest.StartJobOperation(begun, metadata=user)).operation.id
    (files / "rows.jsonl").write_text('{"x": [1, 2, 3, 4]}\n')
    batch = ingest.SubmitBatchRequest(
        inputs=[f"file://{files}/rows.jsonl"], output=f"file://{files}/out", model_name="double"
    )
    acme.batch = (await world.ingest.SubmitBatch(batch, metadata=user)).batch.id
    async for seen in world.ingest.WatchBatch(ingest.WatchBatchRequest(id=acme.batch), metadata=user):
        state = seen.batch.state
    assert state == ingest.BATCH_STATE_SUCCEEDED
    # In the store: what ingest has recorded, as a service.
    watch = world.store.stub.WatchResults(store.WatchResultsRequest(), metadata=user)
    world.watch_token = (await watch.read()).resume_token
    watch.cancel()
    ours = store.Result(job_id=acme.job, outcome=store.Result.OUTCOME_SUCCEEDED, model_name="double", tenant="acme")
    ours.response.SetInParent()
    await world.store.stub.PutResults(store.PutResultsRequest(results=[ours]), metadata=AS_SERVICE)
    theirs = store.Result(job_id="globex-job", outcome=ours.outcome, model_name="double", tenant="globex")
    theirs.response.SetInParent()
    await world.store.stub.PutResults(store.PutResultsRequest(results=[theirs]), metadata=AS_SERVICE)
    stream = world.store.stub.StreamResults(store.StreamResultsRequest(), metadata=user)
    acme.cursor = (await stream.read()).cursor
    stream.cancel()
    export = world.store.stub.ExportResults(store.ExportResultsRequest(), metadata=user)
    acme.export = [each.cursor async for each in export][-1]
    weights = b"acme's weights"
    acme.digest, acme.model, publisher = sha256(weights), "acme-model", world.by("acme", "publisher")
    put = await world.store.stub.PutArtifact(iter(upload(weights)), metadata=publisher)
    assert put.artifact.sha256 == acme.digest
    await world.store.stub.RegisterModel(registration(acme.model, acme.digest), metadata=publisher)
    await world.ingest.Submit(submit(2), metadata=world.by("globex"))


def count_failed(tenant: str = "") -> ingest.StartJobOperationRequest:
    selection = ingest.JobSelection(states=[ingest.JOB_STATE_FAILED], tenant=tenant)
    return ingest.StartJobOperationRequest(action=ingest.JOB_ACTION_PURGE, selection=selection, dry_run=True)


def registration(model: str, digest: str) -> store.RegisterModelRequest:
    made = store.RegisterModelRequest()
    made.model.name, made.model.version = model, 1
    made.model.files.add(path="model.onnx", sha256=digest)
    return made


async def first_of(call: Any, is_it: Callable[[Any], bool]) -> Any:
    """The first message of a stream that never ends for which `is_it` holds."""
    async for message in call:
        if is_it(message):
            call.cancel()
            return message
    raise AssertionError("the stream ended")


async def all_of(call: Any) -> list[Any]:
    return [message async for message in call]


Case = Callable[[World, Ids], Awaitable[Any]]
CASES: dict[str, Case] = {}


def case(rpc: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        assert rpc not in CASES
        CASES[rpc] = function
        return function

    return add


# The requests of RPCs that have one, by method; a response may be a stream.
JOBS: dict[str, Callable[[Any, Ids], Any]] = {
    "GetJob GetPayload WatchJob CancelJob": lambda request, ids: request(id=ids.job),
    "GetBatch WatchBatch CancelBatch PauseBatch ResumeBatch": lambda request, ids: request(id=ids.batch),
    "GetSchedule PauseSchedule RemoveSchedule": lambda request, ids: request(name=ids.schedule),
    "RequeueDeadLetters PurgeDeadLetters": lambda request, ids: request(ids=[ids.dead, ids.job]),
    "GetJobOperation AbortJobOperation": lambda request, ids: request(id=ids.operation),
    "ListJobOperations": lambda request, ids: request(),
    "ListDeadLetters": lambda request, ids: request(filter={"state": ingest.JOB_STATE_FAILED}),
    "ListBatches ListSchedules": lambda request, ids: request(),
    "SetJobRetention ListJobRetention SetTenant GetTenant ListTenants ListConnectors": lambda request, ids: request(),
}
RESULTS: dict[str, Callable[[Any, Ids], Any]] = {
    "GetResult": lambda request, ids: request(job_id=ids.job),
    "QueryResults": lambda request, ids: request(job_ids=[ids.job], include_removed=True),
    "SetRetention ListRetention ApplyRetention SetQuota ListUsage": lambda request, ids: request(),
    "VerifyStore BackUp Restore CollectArtifacts": lambda request, ids: request(),
    "PutResults ReleaseArtifacts ListReferences": lambda request, ids: request(),
    "RecordAudit StreamAudit VerifyAudit": lambda request, ids: request(),
}
MODELS: dict[str, Callable[[Any, Ids], Any]] = {
    "StatArtifact GetArtifact": lambda request, ids: request(sha256=ids.digest),
    "RegisterModel": lambda request, ids: registration("globex-model", ids.digest),
    "RemoveModel": lambda request, ids: request(name=ids.model),
    "SetAlias": lambda request, ids: request(name=ids.model, alias="stable", version=1),
}


def simple(service: str, method: str, make_request: Callable[[Any, Ids], Any], role: str) -> Case:
    messages: Any = ingest if service == INGEST else store

    async def called(world: World, ids: Ids) -> Any:
        stub: Any = world.ingest if service == INGEST else world.store.stub
        request = make_request(getattr(messages, f"{method}Request"), ids)
        call = getattr(stub, method)(request, metadata=world.by("globex", role), timeout=30)
        return await call if hasattr(call, "__await__") else await all_of(call)

    return called


for service, role, requests in ((INGEST, "user", JOBS), (STORE, "user", RESULTS), (STORE, "publisher", MODELS)):
    for methods, request in requests.items():
        for method in methods.split():
            case(service + method)(simple(service, method, request, role))


@case(INGEST + "StartJobOperation")
async def start_operation(world: World, ids: Ids) -> Any:
    started = await world.ingest.StartJobOperation(count_failed(), **world.globex)
    assert started.operation.matched == 0
    return started.operation.selection


@case(STORE + "StreamResults")
async def stream_results(world: World, ids: Ids) -> Any:
    request = store.StreamResultsRequest(filter={"job_ids": [ids.job]})
    pages = await all_of(world.store.stub.StreamResults(request, **world.globex))
    assert pages[-1].complete
    return [list(page.results) for page in pages]


@case(STORE + "ExportResults")
async def export_results(world: World, ids: Ids) -> Any:
    request = store.ExportResultsRequest(filter={"job_ids": [ids.job]})
    return [each.rows for each in await all_of(world.store.stub.ExportResults(request, **world.globex))]


@case(STORE + "WatchResults")
async def watch_results(world: World, ids: Ids) -> Any:
    # From before acme's result. The later one of globex's is the first that is seen.
    request = store.WatchResultsRequest(resume_token=world.watch_token)
    call = world.store.stub.WatchResults(request, **world.globex)
    seen = await first_of(call, lambda message: message.HasField("result"))
    assert seen.result.job_id == "globex-job"
    return seen.result


@case(STORE + "PutArtifact")
async def put_artifact(world: World, ids: Ids) -> Any:
    # It names the digest, and has not the bytes.
    message = store.PutArtifactRequest(header={"sha256": ids.digest, "size_bytes": 14})
    return await world.store.stub.PutArtifact(iter([message]), **world.publisher)


@case(STORE + "ListModels")
async def list_models(world: World, ids: Ids) -> Any:
    return await world.store.stub.ListModels(store.ListModelsRequest(name=ids.model), **world.globex)


@case(STORE + "WatchModels")
async def watch_models(world: World, ids: Ids) -> Any:
    call = world.store.stub.WatchModels(store.WatchModelsRequest(name=ids.model), **world.globex)
    return await first_of(call, lambda _: True)


@case(INGEST + "Submit")
async def submit_job(world: World, ids: Ids) -> Any:
    # Acme's key is free here, and acme's job is none of globex's.
    made = await world.ingest.Submit(submit(3, idempotency_key="acme-key"), **world.globex)
    assert made.job.id != world.acme.job
    return await world.ingest.Submit(submit(3, depends_on=[{"job_id": ids.job}]), **world.globex)


@case(INGEST + "SubmitStream")
async def submit_stream(world: World, ids: Ids) -> Any:
    message = ingest.SubmitStreamRequest(submit=submit(3, depends_on=[{"job_id": ids.job}]))
    return await all_of(world.ingest.SubmitStream(iter([message]), **world.globex))


@case(INGEST + "RunStream")
async def run_stream(world: World, ids: Ids) -> Any:
    messages = [ingest.RunStreamRequest(sequence=n, job_id=job) for n, job in enumerate((ids.job, ids.dead))]
    answers = await all_of(world.ingest.RunStream(iter(messages), **world.globex))
    for answer in answers:
        # Whichever is the first has the limit of the stream.
        answer.most_requests = 0
    return sorted(answers, key=lambda answer: answer.sequence)


@case(INGEST + "ListJobs")
async def list_jobs(world: World, ids: Ids) -> Any:
    found = await world.ingest.ListJobs(ingest.ListJobsRequest(), **world.globex)
    assert {job.tenant for job in found.jobs} == {"globex"}
    return None


@case(INGEST + "WatchJobs")
async def watch_jobs(world: World, ids: Ids) -> Any:
    # The existing jobs come by id: acme's would be the first.
    request = ingest.WatchJobsRequest(include_existing=True)
    call = world.ingest.WatchJobs(request, **world.globex)
    seen = await first_of(call, lambda message: message.HasField("job"))
    assert seen.job.tenant == "globex"
    return None


@case(INGEST + "PutSchedule")
async def put_schedule(world: World, ids: Ids) -> Any:
    # Of the same name, and no replacement of acme's.
    schedule = ingest.Schedule(name=ids.schedule, cron="0 3 1 1 *", job=submit(1))
    request = ingest.PutScheduleRequest(schedule=schedule)
    made = await world.ingest.PutSchedule(request, **world.globex)
    remove = ingest.RemoveScheduleRequest(name=ids.schedule)
    await world.ingest.RemoveSchedule(remove, **world.globex)
    return made.schedule.tenant


@case(INGEST + "SubmitBatch")
async def submit_batch(world: World, ids: Ids) -> Any:
    request = ingest.SubmitBatchRequest(inputs=["file:///x"], output="file:///y", model_name="double", tenant="acme")
    return await world.ingest.SubmitBatch(request, **world.globex)


async def test_every_rpc_has_a_case() -> None:
    left = {rpc for rpc in rpcs() if not rpc.startswith(WITHOUT_OBJECTS)}
    assert left == CASES.keys()


async def outcome(call: Awaitable[Any], ids: Ids) -> str:
    try:
        return ids.hidden(f"OK {await call}")
    except grpc.aio.AioRpcError as err:
        return ids.hidden(f"{err.code().name}: {err.details()}")


OF_OTHERS = (OPERATE, ADMINISTER, INTERNAL)
# Without a policy, every caller may operate the node, and read every model.
HEADER_CASES = [rpc for rpc in CASES if GROUP_OF[rpc] not in OF_OTHERS and rpc not in OF_GRANTS]
# The world has a decorator of its own: beside another parameter it would have the scope of a test.
with_policy = pytest.mark.parametrize("world", ["policy"], indirect=True)
with_header = pytest.mark.parametrize("world", ["header"], indirect=True)
each_world = pytest.mark.parametrize("world", ["policy", "header"], indirect=True)


@with_policy
@pytest.mark.parametrize("rpc", sorted(CASES))
async def test_another_tenant_finds_what_nobody_has(world: World, rpc: str) -> None:
    found = await outcome(CASES[rpc](world, world.acme), world.acme)
    assert found == await outcome(CASES[rpc](world, world.nobody), world.nobody)
    if GROUP_OF[rpc] in OF_OTHERS:
        assert found.startswith("PERMISSION_DENIED")


@with_header
@pytest.mark.parametrize("rpc", sorted(HEADER_CASES))
async def test_without_a_policy_another_tenant_finds_what_nobody_has(world: World, rpc: str) -> None:
    found = await outcome(CASES[rpc](world, world.acme), world.acme)
    assert found == await outcome(CASES[rpc](world, world.nobody), world.nobody)


@each_world
async def test_a_message_that_names_another_tenant_is_refused(world: World) -> None:
    ours = world.globex
    schedule = ingest.Schedule(name="s", tenant="acme", cron="0 3 1 1 *", job=submit(1))
    calls = [
        world.ingest.Submit(submit(1, tenant="acme"), **ours),
        world.ingest.ListJobs(ingest.ListJobsRequest(tenant="acme"), **ours),
        world.ingest.ListBatches(ingest.ListBatchesRequest(tenant="acme"), **ours),
        world.ingest.ListSchedules(ingest.ListSchedulesRequest(tenant="acme"), **ours),
        world.ingest.GetSchedule(ingest.GetScheduleRequest(name=world.acme.schedule, tenant="acme"), **ours),
        world.ingest.PutSchedule(ingest.PutScheduleRequest(schedule=schedule, replace=True), **ours),
        world.ingest.ListDeadLetters(ingest.ListDeadLettersRequest(filter={"tenant": "acme"}), **ours),
        world.ingest.PurgeDeadLetters(ingest.PurgeDeadLettersRequest(filter={"tenant": "acme"}), **ours),
        world.ingest.ListJobOperations(ingest.ListJobOperationsRequest(tenant="acme"), **ours),
        world.ingest.StartJobOperation(count_failed(tenant="acme"), **ours),
        world.store.stub.QueryResults(store.QueryResultsRequest(tenant="acme"), **ours),
        all_of(world.ingest.WatchJobs(ingest.WatchJobsRequest(tenant="acme"), **ours)),
        all_of(world.store.stub.WatchResults(store.WatchResultsRequest(tenant="acme"), **ours)),
        all_of(world.store.stub.StreamResults(store.StreamResultsRequest(filter={"tenant": "acme"}), **ours)),
        all_of(world.store.stub.ExportResults(store.ExportResultsRequest(filter={"tenant": "acme"}), **ours)),
    ]
    for call in calls:
        text = await outcome(call, world.acme)
        assert text.startswith("PERMISSION_DENIED: ")
        assert "tenant: expected 'globex'" in text


@with_policy
async def test_a_batch_reads_no_files_of_another_tenant(world: World) -> None:
    acme = world.files / "acme"
    for inputs, output in ((acme / "rows.jsonl", world.files / "globex"), (world.files / "globex", acme / "stolen")):
        request = ingest.SubmitBatchRequest(inputs=[f"file://{inputs}"], output=f"file://{output}", model_name="double")
        text = await outcome(world.ingest.SubmitBatch(request, **world.globex), world.acme)
        assert text.startswith("PERMISSION_DENIED")
        assert "may not be used here" in text


@each_world
async def test_a_place_in_another_tenants_results_is_refused(world: World) -> None:
    ours = world.globex
    for call in (
        world.store.stub.StreamResults(store.StreamResultsRequest(cursor=world.acme.cursor), **ours),
        world.store.stub.ExportResults(store.ExportResultsRequest(cursor=world.acme.export), **ours),
    ):
        assert "INVALID_ARGUMENT: cursor: it belongs to another filter" in await outcome(all_of(call), world.acme)


@each_world
async def test_the_owner_still_has_everything(world: World) -> None:
    """Afterwards: no call of the other tenant has changed anything."""
    ours, acme = {"metadata": world.by("acme"), "timeout": 30}, world.acme
    job = (await world.ingest.GetJob(ingest.GetJobRequest(id=acme.job), **ours)).job
    dead = (await world.ingest.GetJob(ingest.GetJobRequest(id=acme.dead), **ours)).job
    assert (job.state, dead.state) == (ingest.JOB_STATE_SUCCEEDED, ingest.JOB_STATE_FAILED)
    await world.ingest.GetPayload(ingest.GetPayloadRequest(id=acme.job), **ours)
    await world.ingest.GetBatch(ingest.GetBatchRequest(id=acme.batch), **ours)
    await world.ingest.GetSchedule(ingest.GetScheduleRequest(name=acme.schedule), **ours)
    await world.store.stub.GetResult(store.GetResultRequest(job_id=acme.job), **ours)
    messages = [ingest.RunStreamRequest(job_id=acme.job)]
    (answer,) = await all_of(world.ingest.RunStream(iter(messages), **ours))
    assert answer.state == ingest.JOB_STATE_SUCCEEDED
    publisher = {"metadata": world.by("acme", "publisher"), "timeout": 30}
    stat = await world.store.stub.StatArtifact(store.StatArtifactRequest(sha256=acme.digest), **publisher)
    assert stat.artifact.sha256 == acme.digest
    assert len((await world.store.stub.ListModels(store.ListModelsRequest(), **publisher)).models) == 1
