"""JSON calls and web pages through a real Envoy to services in this process: values, errors, and access by a policy."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.message import Message

import services.ingest.rest as ingest_rest
import services.store.rest as store_rest
from mesh.cluster.membership import Instance, ReadyModel, State
from mesh.process.watched import Watched
from mesh.rest.app import RestApp
from mesh.rest.call import Reply, RestCall, json_reply
from mesh.rpc.grpc_app import GrpcApp
from mesh.rpc.server import Rpc, Server
from mesh.xds.ads import AdsServer
from mesh.xds.extensions import GatewayAccess, gateway_access
from mesh.xds.json_calls import BODY_BYTES, json_calls
from mesh.xds.snapshot import EnvoyNode, Snapshot, snapshot
from services.coord.traffic import INFER, INGEST, JSON_SERVICES, PUBLIC, STORE, table
from shoal.access import tokens
from shoal.access.rpc_groups import GROUP_OF, INTERNAL
from shoal.errors import NotFound, ResourceExhausted, Unavailable
from shoal.inference.v2 import inference_pb2, inference_pb2_grpc
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.access.policies import key, policy
from tests.breakable import EnvoyProcess, until
from tests.chromium import Pages, command
from tests.http2 import framed

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

CALLS = list(json_calls(JSON_SERVICES))
APPLICATIONS = {"ingest": ingest_rest.rest_app, "store": store_rest.rest_app}
STEPS = "steps"
JSON = "application/json"
JOB = "01J0000000000000000000000A"
NO_KEY = "no key: send 'authorization: Bearer shoal_...' (`shoal keys create` makes a key)"


class Ingest(ingest_pb2_grpc.IngestServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.watches = 0

    async def Submit(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        job = ingest_pb2.Job(id=JOB, state=ingest_pb2.JOB_STATE_QUEUED, model_name=request.request.model_name)
        return ingest_pb2.SubmitResponse(job=job)

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        if request.id == "none":
            raise NotFound("no job 'none'")
        self.watches += 1
        try:
            yield ingest_pb2.WatchJobResponse(job=ingest_pb2.Job(id=request.id, state=ingest_pb2.JOB_STATE_QUEUED))
            if request.id == "endless":
                await asyncio.Event().wait()
            raise Unavailable("the job database is away")
        finally:
            self.watches -= 1

    async def GetJob(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if request.id == "busy":
            raise ResourceExhausted("the quota of tenant 'ünï' is full", retry_after_ms=1500)
        raise NotFound(f"no job {request.id!r}")

    async def ListJobs(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return ingest_pb2.ListJobsResponse()

    async def CancelJob(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return ingest_pb2.CancelJobResponse()


class Store(store_pb2_grpc.StoreServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.result_bytes = 4

    async def GetResult(self, request: Any, context: Any) -> Any:
        result = store_pb2.Result(job_id=request.job_id, outcome=store_pb2.Result.OUTCOME_SUCCEEDED)
        result.response.raw_output_contents.append(bytes(self.result_bytes))
        return store_pb2.GetResultResponse(result=result)

    async def StreamResults(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        yield store_pb2.StreamResultsResponse(cursor="c")
        result = store_pb2.Result(job_id=JOB, outcome=store_pb2.Result.OUTCOME_SUCCEEDED)
        yield store_pb2.StreamResultsResponse(results=[result], complete=True)

    async def SetAlias(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return store_pb2.SetAliasResponse()


class Infer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, number: int) -> None:
        self.number = number

    def rest_app(self, grpc: GrpcApp) -> RestApp:
        """Return the application over REST: each inference is answered with the number of the replica."""

        async def answer(call: RestCall) -> Reply:
            return json_reply({"replica": self.number, "bytes": len(await call.body())})

        return RestApp(grpc, {"infer": answer})

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if request.model_name == STEPS:
            return inference_pb2.ModelInferResponse(id=str(self.number))
        if request.model_name != "double":
            raise NotFound(f"no model {request.model_name!r}")
        return inference_pb2.ModelInferResponse(model_name="double", raw_output_contents=[b"answer"])


class Source:
    def __init__(self, access: GatewayAccess | None) -> None:
        self.instances: Watched[tuple[Instance, ...]] = Watched(())
        self.access = access

    async def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        async for instances in self.instances.follow():
            yield snapshot(instances, frozenset(), node, table(), access=self.access)


class Gateway:
    """An Envoy with its ADS server, and both services."""

    def __init__(self, envoy: EnvoyProcess, ingest: Ingest, store: Store) -> None:
        self.envoy = envoy
        self.ingest = ingest
        self.store = store

    async def call(
        self, verb: str, path: str, body: Any = None, kind: str | None = JSON, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON and headers of a response."""
        text = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": kind} if kind is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        status, content, found = await asyncio.to_thread(self._call, verb, path, text, sent)
        assert found["content-type"].startswith(JSON), (status, content)
        return status, json.loads(content), found

    def _call(
        self, verb: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.envoy.gateway, timeout=30)
        try:
            # Envoy may respond before it has read the whole body.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(verb, path, body, headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            content = answer.read()
        finally:
            connection.close()
        return answer.status, content, found

    async def text(
        self, verb: str, path: str, body: Any = None, kind: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Return status and text of a response that need not be JSON."""
        sent = {"content-type": kind} if kind is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        text = None if body is None else json.dumps(body).encode()
        status, content, _ = await asyncio.to_thread(self._call, verb, path, text, sent)
        return status, content.decode()

    async def error(self, verb: str, path: str, body: Any = None, **more: Any) -> tuple[int, int, str]:
        """Return HTTP status, gRPC code and message of an error."""
        status, found, _ = await self.call(verb, path, body, **more)
        assert set(found) == {"code", "message", "details"}, found
        return status, found["code"], found["message"]


@asynccontextmanager
async def running(access: GatewayAccess | None = None, *, sequenced: int = 0) -> AsyncIterator[Gateway]:
    """Serve; with `sequenced`, as many replicas of infer have the model STEPS, and speak REST."""
    folder = Path(tempfile.mkdtemp(prefix="json-"))
    source, ingest, store = Source(access), Ingest(), Store()
    replicas = [Infer(number) for number in range(sequenced or 1)]
    applications = {**APPLICATIONS}
    rpcs: dict[str, Any] = {
        "ingest": Rpc(INGEST, lambda server: ingest_pb2_grpc.add_IngestServiceServicer_to_server(ingest, server)),
        "store": Rpc(STORE, lambda server: store_pb2_grpc.add_StoreServiceServicer_to_server(store, server)),
    }
    for infer in replicas:
        name = f"infer-{infer.number}"
        add = partial(inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, infer)
        rpcs[name] = Rpc(INFER, add)
        if sequenced:
            applications[name] = infer.rest_app
    models = (ReadyModel(STEPS, (1,), True),) if sequenced else ()
    async with AsyncExitStack() as stack:
        ads = Server(f"unix:{folder}/coord.sock", [], drain_ms=0, methods=AdsServer(source).methods())
        await (await stack.enter_async_context(ads)).serve()
        instances = []
        for name, rpc in rpcs.items():
            address = f"unix:{folder}/{name}.sock"
            server = Server(address, [rpc], drain_ms=0, http=applications.get(name))
            await (await stack.enter_async_context(server)).serve()
            service = name.partition("-")[0]
            loaded = models if service == "infer" else ()
            instances.append(Instance(service, "local", name, address, 1, State.READY, 1.0, loaded))
        source.instances.set(tuple(instances))
        envoy = stack.enter_context(EnvoyProcess(folder, [folder / "coord.sock"]))
        await envoy.until_ready()

        async def is_healthy() -> bool:
            clusters = await envoy.admin_get("/clusters")
            return all(f"{name}.sock::health_flags::healthy" in clusters for name in rpcs)

        await until(is_healthy, "the services are healthy")
        yield Gateway(envoy, ingest, store)
    shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    """A gateway without a policy."""
    async with running() as one:
        yield one


def cpu_seconds(pid: int) -> float:
    """Return the time of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tensors(**changes: Any) -> dict[str, Any]:
    """Return an inference request with one input."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2.5]}}
    return {"model_name": "double", "inputs": [tensor], **changes}


async def test_a_job_is_submitted_and_its_result_read(gateway: Gateway) -> None:
    status, found, _ = await gateway.call("POST", "/shoal/v1/jobs", {"request": tensors(), "labels": {"a b": "c"}})
    assert (status, found["job"]["id"], found["job"]["state"]) == (200, JOB, "JOB_STATE_QUEUED")
    request = gateway.ingest.requests[-1]
    assert isinstance(request, ingest_pb2.SubmitRequest)
    assert list(request.request.inputs[0].contents.fp32_contents) == [1, 2.5]
    assert dict(request.labels) == {"a b": "c"}
    raw = tensors(raw_input_contents=[base64.b64encode(b"\x00\xff").decode()])
    await gateway.call("POST", "/shoal/v1/jobs", {"request": raw, "idempotencyKey": "k", "deadline": "1.5s"})
    request = gateway.ingest.requests[-1]
    assert isinstance(request, ingest_pb2.SubmitRequest)
    assert (list(request.request.raw_input_contents), request.idempotency_key) == ([b"\x00\xff"], "k")
    assert request.deadline.nanos == 500_000_000
    status, found, _ = await gateway.call("GET", f"/shoal/v1/results/{JOB}?wait=5s")
    assert (status, found["result"]["outcome"]) == (200, "OUTCOME_SUCCEEDED")
    assert base64.b64decode(found["result"]["response"]["raw_output_contents"][0]) == bytes(4)


async def test_texts_of_every_form_are_read(gateway: Gateway) -> None:
    key = 'a"b\\ []{} \x7f ü \n'
    body = json.dumps({"idempotency_key": key, "request": tensors(), "labels": {"[": "]", '"': "\\"}}, indent="\t\r\n")
    assert (await gateway.call("POST", "/shoal/v1/jobs", body.encode()))[0] == 200
    request = gateway.ingest.requests[-1]
    assert isinstance(request, ingest_pb2.SubmitRequest)
    assert (request.idempotency_key, dict(request.labels)) == (key, {"[": "]", '"': "\\"})
    long = '\\"' * 400_000
    assert (await gateway.call("POST", "/shoal/v1/jobs", b'{"idempotency_key": "%b"}' % long.encode()))[0] == 200
    assert gateway.ingest.requests[-1] == ingest_pb2.SubmitRequest(idempotency_key='"' * 400_000)


async def test_fields_in_the_path_and_in_the_query(gateway: Gateway) -> None:
    await gateway.call("POST", "/shoal/v1/jobs/a%2Fb:cancel", {"reason": "no"})
    assert gateway.ingest.requests[-1] == ingest_pb2.CancelJobRequest(id="a/b", reason="no")
    await gateway.call("POST", "/shoal/v1/jobs/x:cancel", kind=None)
    assert gateway.ingest.requests[-1] == ingest_pb2.CancelJobRequest(id="x")
    await gateway.call("POST", "/shoal/v1/models/a/b.c:alias", {"alias": "live", "version": "3"})
    assert gateway.store.requests[-1] == store_pb2.SetAliasRequest(name="a/b.c", alias="live", version=3)
    for query in ("state=JOB_STATE_DEAD&page_size=7", "&pageSize=7&&state=JOB%5FSTATE%5FDEAD&"):
        await gateway.call("GET", f"/shoal/v1/jobs?{query}")
        assert gateway.ingest.requests[-1] == ingest_pb2.ListJobsRequest(state=ingest_pb2.JOB_STATE_DEAD, page_size=7)
    # Nulls that JSON of protobuf allows, and texts that only look like one.
    null = {"tenant": None, "request": None, "labels": {"null": "null"}, "depends_on": [{"job_id": "null"}]}
    await gateway.call("POST", "/shoal/v1/jobs", null)
    (dependency,) = gateway.ingest.requests[-1].depends_on
    assert (dependency.job_id, dict(gateway.ingest.requests[-1].labels)) == ("null", {"null": "null"})


async def test_statuses_of_services_are_statuses_and_json(gateway: Gateway) -> None:
    assert await gateway.error("GET", "/shoal/v1/jobs/x") == (404, 5, "no job 'x'")
    status, found, headers = await gateway.call("GET", "/shoal/v1/jobs/busy")
    assert (status, found["code"], found["message"]) == (429, 8, "the quota of tenant 'ünï' is full")
    assert (headers["retry-after-ms"], headers["retry-after"]) == ("1500", "2")
    assert (await gateway.error("GET", "/shoal/v1/batches"))[:2] == (501, 12)


async def test_a_service_without_instances_is_unavailable(gateway: Gateway) -> None:
    status, code, message = await gateway.error("GET", "/shoal/v1/leader")
    assert (status, code) == (503, 14)
    assert "no healthy upstream" in message


DEEP = b'{"depends_on": ' + b"[" * 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"reqest": {}}, "shoal.ingest.v1.SubmitRequest has no field 'reqest'"),
        ({"request": tensors(modelname="x")}, "shoal.ingest.v1.SubmitRequest.request has no field 'modelname'"),
        ({"request": tensors(inputs=[{"nam": 1}])}, "SubmitRequest.request.inputs has no field 'nam'"),
        ({"request": tensors(parameters={"a": {"x": 1}})}, "SubmitRequest.request.parameters.a has no field 'x'"),
        ({'a"\\b\n': 1}, "has no field 'a????b?n'"),
        ({"ü" * 100: 1}, "has no field '"),
        (b'{"priority": 1, "priority": 2}', "has the field 'priority' twice"),
        (b'{"idempotency_key": "a", "idempotencyKey": "b"}', "has the field 'idempotencyKey' twice"),
        ({"tenant": {}}, "shoal.ingest.v1.SubmitRequest.tenant is no object"),
        ([], "no JSON at byte 1: expected an object"),
        (b"{", "the JSON ends too early: expected a key in quotes"),
        (b'{"tenant"', "the JSON ends too early: expected a colon"),
        (b'{"tenant": "a"', "the JSON ends too early: expected a comma or }"),
        (b'{"tenant": "a\n"}', "no JSON at byte 12: expected the end of a text"),
        (b'{"tenant":\n"a",\n"id": "\\""}', "SubmitRequest has no field 'id'"),
        (b'{"tenant": "\\"\x01"}', "no JSON at byte 12: expected the end of a text"),
        (b'{"tenant": "a\\"}', "no JSON at byte 12: expected the end of a text"),
        (b'{"tenant": "a\\', "no JSON at byte 12: expected the end of a text"),
        (b'{"tenant": "' + b'\\"' * 500_000, "no JSON at byte 12: expected the end of a text"),
        ({"request": {"inputs": [{"shape": [1, 2], "name": "]}[{", "nom": 1}]}}, "inputs has no field 'nom'"),
        (b"{tenant: 1}", "no JSON at byte 2: expected a key in quotes"),
        (b"{'tenant': 'a'}", "no JSON at byte 2: expected a key in quotes"),
        (b"{\"depends_on\": ['a']}", "no JSON at byte 17: expected a value"),
        # To the transcoder, `],"tenant":"` is a text of the list.
        (b'{"depends_on": [\'],"tenant":"\'],\'nom\':[\'","labels":{"a":"\']}', "no JSON at byte 17: expected a value"),
        (b'{"tenant": "a"} {}', "no JSON at byte 17: expected the end of the body"),
        (b'{"tenant": "a",}', "no JSON at byte 16: expected a key in quotes"),
        (b'{"request": {"inputs": [{"name": "a"} {"nom": 1}]}}', "expected a comma or ]"),
        ({"depends_on": [None]}, "SubmitRequest.depends_on has null for an element"),
        ({"request": tensors(inputs=[None, {}])}, "request.inputs has null for an element"),
        ({"request": tensors(inputs=[{"contents": {"fp32_contents": [1, None]}}])}, "fp32_contents has null for an el"),
        ({"request": tensors(inputs=[{"name": "null"}, {"shape": [None]}])}, "shape has null for an element"),
        ({"labels": {"a": None}}, "SubmitRequest.labels has null for an element"),
        (DEEP, "the body has more than 100 objects and arrays within each other"),
        (b'{"request": {"inputs": [' + b"{}," * 100_001 + b"{}]}}", "the body has more than 100000 values and keys"),
        ({"labels": dict.fromkeys(map(str, range(50_000)), "")}, "more than 100000 values and keys: use gRPC"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
async def test_what_is_no_such_message_is_named(gateway: Gateway, body: Any, words: str) -> None:
    before = len(gateway.ingest.requests)
    status, code, message = await gateway.error("POST", "/shoal/v1/jobs", body)
    assert (status, code) == (400, 3)
    assert words in message
    assert len(gateway.ingest.requests) == before


async def test_the_check_of_many_values_takes_little_time_of_an_envoy_thread(gateway: Gateway) -> None:
    # Envoy's other calls wait meanwhile. Compiled, the check takes 5 ms; with a search for each value it takes 40.
    body = b'{"request": {"inputs": [' + b"{}," * 100_001 + b"{}]}}"
    before = cpu_seconds(gateway.envoy.pid)
    for _ in range(20):
        assert (await gateway.error("POST", "/shoal/v1/jobs", body))[0] == 400
    assert cpu_seconds(gateway.envoy.pid) - before < 0.5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"priority": "high"}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"deadline": "soon"}, "deadline"),
        ({"on_dependency_failure": "SOMETIMES"}, "on_dependency_failure"),
        ({"request": tensors(raw_input_contents=["?"])}, "raw_input_contents"),
        ({"depends_on": [{"job_id": "a", "idempotency_key": "b"}]}, "oneof"),
        ({"priority": [1, 2]}, "priority"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
async def test_a_value_of_another_type_is_named(gateway: Gateway, body: Any, words: str) -> None:
    before = len(gateway.ingest.requests)
    status, code, message = await gateway.error("POST", "/shoal/v1/jobs", body)
    assert (status, code) == (400, 3)
    assert words in message
    assert len(gateway.ingest.requests) == before


async def test_other_requests_are_refused_by_name(gateway: Gateway) -> None:
    before = len(gateway.ingest.requests)
    submit = {"request": tensors()}
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        found = await gateway.error("POST", "/shoal/v1/jobs", submit, kind=kind)
        assert found == (415, 3, "the body of this call is JSON: send content-type: application/json"), kind
    assert (await gateway.error("POST", "/shoal/v1/jobs", submit, content_encoding="gzip"))[0] == 415
    assert (await gateway.error("GET", "/shoal/v1/jobs", submit)) == (400, 3, "GET /shoal/v1/jobs takes no body")
    for verb, path in (("GET", "/shoal/v1/nothing"), ("PUT", "/shoal/v1/jobs"), ("POST", "/shoal/v1/jobs/a/b:cancel")):
        assert await gateway.error(verb, path, submit) == (404, 5, f"no call {verb} {path}")
    assert (await gateway.error("POST", "/shoal/v1/jobs/x:cancel", {"id": "y"}))[:2] == (400, 3)
    assert len(gateway.ingest.requests) == before


@pytest.mark.parametrize(
    ("verb", "target", "words"),
    [
        ("GET", "jobs/a?id=b", "field 'id' is in the path, and not in the query"),
        ("GET", "results/a?wait=1s&jobId=b", "field 'jobId' is in the path, and not in the query"),
        ("GET", "jobs/a?i%64=b", "field 'i?64' of the query is no field of shoal.ingest.v1.GetJobRequest"),
        ("DELETE", "models/a?name=b", "field 'name' is in the path, and not in the query"),
        ("GET", "jobs?page_size=1&page_size=2", "field 'page_size' is in the query twice"),
        ("GET", "jobs?page_size=1&pageSize=2", "field 'pageSize' is in the query twice"),
        ("GET", "jobs?pagesize=1", "field 'pagesize' of the query is no field of shoal.ingest.v1.ListJobsRequest"),
        ("GET", "results?labels.a=b", "field 'labels.a' is an object or in a map, which a query cannot have: use gRPC"),
        ("GET", "results?labels=a", "field 'labels' is an object or in a map, which a query cannot have: use gRPC"),
        ("GET", "jobs?=a", "field '' of the query is no field of shoal.ingest.v1.ListJobsRequest"),
        ("GET", "jobs?state.x=a", "field 'state.x' of the query is no field of shoal.ingest.v1.ListJobsRequest"),
        ("POST", "jobs/a:cancel?id=b", "POST /shoal/v1/jobs/a:cancel takes its fields from the body, and no query"),
        ("POST", "jobs?priority=9", "POST /shoal/v1/jobs takes its fields from the body, and no query"),
    ],
)
async def test_a_query_has_each_field_of_the_message_once_and_none_of_the_path(
    gateway: Gateway, verb: str, target: str, words: str
) -> None:
    before = len(gateway.ingest.requests), len(gateway.store.requests)
    assert await gateway.error(verb, f"/shoal/v1/{target}") == (400, 3, words)
    assert (len(gateway.ingest.requests), len(gateway.store.requests)) == before


async def test_bodies_and_responses_are_bounded(gateway: Gateway) -> None:
    fits = {"request": tensors(raw_input_contents=["A" * (BODY_BYTES - 1000)])}
    assert (await gateway.call("POST", "/shoal/v1/jobs", fits))[0] == 200
    status, code, message = await gateway.error("POST", "/shoal/v1/jobs", {"tenant": "x" * (BODY_BYTES + 1)})
    assert (status, code) == (413, 8), message
    gateway.store.result_bytes = 11 << 20
    assert (await gateway.call("GET", f"/shoal/v1/results/{JOB}"))[0] == 200
    gateway.store.result_bytes = 4


async def test_json_with_any_content_type_charset_and_spaces(gateway: Gateway) -> None:
    body = b' \n{ "tenant" :\t"a" , "labels":{ } , "depends_on" : [ ], "priority": -1e0 }\r\n'
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert (await gateway.call("POST", "/shoal/v1/jobs", body, kind=kind))[0] == 200


async def test_calls_are_public_unary_methods_and_each_path_is_one_call() -> None:
    seen = set()
    for call in CALLS:
        assert GROUP_OF[f"/{call.method.containing_service.full_name}/{call.method.name}"] != INTERNAL
        assert not call.method.client_streaming
        assert not call.method.server_streaming
        assert set(call.path_fields) <= set(call.method.input_type.fields_by_name)
        seen.add((call.verb, call.template))
    assert len(seen) == len(CALLS)


async def test_every_public_unary_method_has_a_json_form() -> None:
    named = {call.method.full_name for call in CALLS}
    for service in JSON_SERVICES:
        for method in service.methods:
            is_public = GROUP_OF[f"/{service.full_name}/{method.name}"] != INTERNAL
            is_unary = not method.client_streaming and not method.server_streaming
            has_form = is_public and is_unary and not method.GetOptions().deprecated
            assert (method.full_name in named) == has_form, method.full_name


async def test_a_page_of_a_foreign_origin_or_name_does_nothing(gateway: Gateway) -> None:
    before = len(gateway.ingest.requests)
    submit = {"request": tensors()}
    for origin in ("https://evil.example", "null", f"http://{gateway.envoy.gateway}"):
        for kind in (JSON, "text/plain"):
            status, text = await gateway.text("POST", "/shoal/v1/jobs", submit, kind, origin=origin)
            assert (status, "pages of this origin may not call" in text) == (403, True)
        asked = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
        assert (await gateway.text("OPTIONS", "/shoal/v1/jobs", origin=origin, **asked))[0] == 403
    for host in ("evil.example", "127.0.0.1.nip.io", "localhost.evil.example:80"):
        status, text = await gateway.text("POST", "/shoal/v1/jobs", submit, JSON, host=host)
        assert (status, "this server has another name" in text) == (421, True)
        status, text = await gateway.text("GET", "/v2", host=host)
        assert (status, json.loads(text)["error"].partition(": ")[0]) == (421, "this server has another name")
        assert not json.loads(text)["error"].endswith("\n")
    assert len(gateway.ingest.requests) == before
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:1"):
        assert (await gateway.text("GET", "/shoal/v1/jobs", host=host))[0] == 200, host


async def test_json_and_pages_are_decided_as_grpc_is(tmp_path: Path) -> None:
    signer, other = (tokens.create_signer(tmp_path / name) for name in ("ours", "other"))
    submit = {"request": tensors()}
    command()
    with Pages(SCRIPT).served() as pages:
        origins = [f"http://localhost:{pages.port}"]
        found = policy(signer, cors={"origins": origins}, hosts=["ai.example"])
        async with running(gateway_access(found, [*PUBLIC])) as guarded:

            async def post(token: str, path: str = "/shoal/v1/jobs", **headers: str) -> tuple[int, int, str]:
                return await guarded.error("POST", path, submit, authorization=f"Bearer {token}", **headers)

            user = key(signer).text
            status, job, _ = await guarded.call("POST", "/shoal/v1/jobs", submit, authorization=f"Bearer {user}")
            assert (status, job["job"]["id"]) == (200, JOB)
            assert await guarded.error("POST", "/shoal/v1/jobs", submit) == (401, 16, NO_KEY)
            for token in ("x", key(other).text, user[:-4] + "AAAA"):
                assert (await post(token))[:2] == (401, 16)
            assert (await post(key(signer, role="viewer").text))[:2] == (403, 7)
            status, code, _ = await guarded.error("GET", "/shoal/v1/tenants", authorization=f"Bearer {user}")
            assert (status, code) == (403, 7), "tenants are the operator's"
            spoofed = {"x_shoal_role": "operator", "x_shoal_tenant": "globex"}
            status, code, _ = await guarded.error("GET", "/shoal/v1/tenants", authorization=f"Bearer {user}", **spoofed)
            assert (status, code) == (403, 7)
            named = await guarded.text("GET", "/shoal/v1/jobs", host="evil.example", authorization=f"Bearer {user}")
            assert named[0] == 403, "another name has no JSON calls, and rules know no such path"
            before = len(guarded.ingest.requests)
            pages.values = {
                "gateway": f"http://{guarded.envoy.gateway}",
                "token": user,
                "submit": json.dumps(submit),
                "infer": _infer("double"),
                "absent": _infer("absent"),
            }
            ours = await asyncio.to_thread(pages.found_at, "localhost", tmp_path)
            assert ours == {
                "infer": {"status": "0", "message": "", "hasAnswer": True},
                "absent": {"status": "5", "message": "no model 'absent'", "hasAnswer": False},
                "unauthenticated": {"status": "16", "message": NO_KEY, "hasAnswer": False},
                "job": {"status": 200, "id": JOB},
                "result": {"status": 200, "outcome": "OUTCOME_SUCCEEDED"},
                "async": {"status": 202, "address": f"/shoal/v1/jobs/{JOB}", "applied": "respond-async"},
                "watch": [{"state": "JOB_STATE_QUEUED"}, {"code": 14, "message": "the job database is away"}],
                "bad": {"status": 400, "message": "shoal.ingest.v1.SubmitRequest has no field 'reqest'"},
                "simple": "opaque",
            }
            assert len(guarded.ingest.requests) == before + 3, "the request without a preflight has no key"
            foreign = await asyncio.to_thread(pages.found_at, "127.0.0.1", tmp_path)
            assert set(foreign.values()) <= {"TypeError", "opaque"}
            assert len(guarded.ingest.requests) == before + 3


def _infer(model: str) -> str:
    request = inference_pb2.ModelInferRequest(model_name=model)
    return base64.b64encode(framed(request.SerializeToString())).decode()


SCRIPT = r"""
const values = await (await fetch("/values")).json(), found = {};
const bearer = {authorization: "Bearer " + values.token}, json = {"content-type": "application/json"};
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

// gRPC-Web: frames of 5 bytes and a message; the last has the trailers. An error without a message is in the headers.
async function web(request, headers) {
  const path = values.gateway + "/inference.GRPCInferenceService/ModelInfer";
  const all = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", ...headers};
  const response = await fetch(path, {method: "POST", headers: all, body: bytes(request)});
  const body = new Uint8Array(await response.arrayBuffer());
  let status = response.headers.get("grpc-status"), message = response.headers.get("grpc-message"), hasAnswer = false;
  for (let at = 0; at < body.length;) {
    const size = new DataView(body.buffer).getUint32(at + 1);
    const text = new TextDecoder().decode(body.slice(at + 5, at + 5 + size));
    if (body[at] & 0x80) {
      status = /grpc-status: *(\d+)/i.exec(text)[1];
      message = (/grpc-message: *(.*)/i.exec(text) || ["", ""])[1];
    } else hasAnswer = text.includes("answer");
    at += 5 + size;
  }
  return {status, message: decodeURIComponent(message || "").trim(), hasAnswer};
}
const call = async (path, options) => {
  const response = await fetch(values.gateway + path, options);
  return [response.status, await response.json()];
};
const submit = body => call("/shoal/v1/jobs", {method: "POST", headers: {...json, ...bearer}, body});
const tries = {
  infer: () => web(values.infer, bearer),
  absent: () => web(values.absent, bearer),
  unauthenticated: () => web(values.infer, {}),
  job: async () => {
    const [status, body] = await submit(values.submit);
    return {status, id: body.job.id};
  },
  result: async () => {
    const [status, body] = await call("/shoal/v1/results/" + found.job.id + "?wait=5s", {headers: bearer});
    return {status, outcome: body.result.outcome};
  },
  async: async () => {
    const headers = {...json, ...bearer, prefer: "respond-async", "idempotency-key": "k"};
    const body = '{"inputs": []}', path = values.gateway + "/v2/models/double/infer";
    const response = await fetch(path, {method: "POST", headers, body});
    const [address, applied] = ["location", "preference-applied"].map(name => response.headers.get(name));
    return {status: response.status, address, applied};
  },
  watch: async () => {
    const headers = {...bearer, accept: "text/event-stream"}, records = [];
    const response = await fetch(values.gateway + "/shoal/v1/jobs/" + found.job.id + ":watch", {headers});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "", read; !(read = await reader.read()).done;) {
      const parts = (text + read.value).split("\n\n");
      text = parts.pop();
      for (const part of parts.filter(part => part.startsWith("data: "))) {
        const {job, error} = JSON.parse(part.slice(6));
        records.push(job ? {state: job.state} : {code: error.code, message: error.message});
      }
    }
    return records;
  },
  bad: async () => {
    const [status, body] = await submit('{"reqest": 1}');
    return {status, message: body.message};
  },
  simple: async () =>
    (await fetch(values.gateway + "/shoal/v1/jobs", {method: "POST", mode: "no-cors", body: values.submit})).type,
};
for (const [name, attempt] of Object.entries(tries)) {
  try { found[name] = await attempt(); } catch (error) { found[name] = error.name; }
}
await done(found);
"""
