"""infer and store for ingest's tests, at one address like the mesh, and as faulty as a test wants them.

They keep the contract: a job's first result stands for ever. Whatever else happens, a test says in `model` and `store`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from mesh.rpc.channel import connect
from shoal.inference.v2 import bulk_pb2, bulk_pb2_grpc, inference_pb2, inference_pb2_grpc
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.ingest.v1 import ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc

FAILED = store_pb2.Result.OUTCOME_FAILED
Model = Callable[[inference_pb2.ModelInferRequest, Any], Awaitable[inference_pb2.ModelInferResponse]]


async def echo(request: inference_pb2.ModelInferRequest, context: Any) -> inference_pb2.ModelInferResponse:
    """Answers with the request's own bytes, and explains itself as infer does."""
    response = inference_pb2.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request.id, raw_output_contents=request.raw_input_contents
    )
    if request.parameters["explain"].bool_param:
        response.parameters["replica"].string_param = "local/infer-0"
        response.parameters["batch_size"].int64_param = 1
    return response


class FakeInfer(inference_pb2_grpc.GRPCInferenceServiceServicer, bulk_pb2_grpc.BulkInferenceServicer):
    """Runs `model`; counts calls by request id. `has_bulks`: else it is an infer of before there were any."""

    def __init__(self) -> None:
        self.has_bulks = True
        self.bulks: list[int] = []
        self.before_bulk: Callable[[bulk_pb2.InferBulkRequest, Any], Awaitable[None]] | None = None
        self.model: Model = echo
        self.calls: Counter[str] = Counter()
        self.metadata: dict[str, dict[str, str]] = {}

    async def ModelInfer(self, request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        self.calls[request.id] += 1
        self.metadata[request.id] = dict(context.invocation_metadata())
        return await self.model(request, context)

    async def InferBulk(
        self, request_iterator: AsyncIterator[bulk_pb2.InferBulkRequest], context: Any
    ) -> AsyncIterator[bulk_pb2.InferBulkResponse]:
        """Each entry as a call of ModelInfer, all at once; answers as they come. What is given up is cancelled."""
        if not self.has_bulks:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        first = await anext(request_iterator)
        self.bulks.append(len(first.entries))
        if self.before_bulk is not None:
            await self.before_bulk(first, context)
        calls = {e.number: asyncio.ensure_future(self._entry(e, context)) for e in first.entries}
        reader = asyncio.ensure_future(self._given_up(request_iterator, calls))
        try:
            for done in asyncio.as_completed([*calls.values()]):
                with suppress(asyncio.CancelledError):
                    yield bulk_pb2.InferBulkResponse(answers=[await done], instance="local/infer-0")
        finally:
            for task in (reader, *calls.values()):
                task.cancel()

    async def _given_up(self, requests: AsyncIterator[bulk_pb2.InferBulkRequest], calls: dict[int, Any]) -> None:
        async for request in requests:
            for number in request.given_up:
                calls[number].cancel()

    async def _entry(self, entry: bulk_pb2.InferBulkRequest.Entry, context: Any) -> bulk_pb2.InferBulkResponse.Answer:
        own = EntryContext(context)
        try:
            async with asyncio.timeout(entry.timeout_ms / 1000):
                response = await self.ModelInfer(inference_pb2.ModelInferRequest.FromString(entry.request), own)
        except TimeoutError:
            return bulk_pb2.InferBulkResponse.Answer(number=entry.number, code=4, message="too late")
        except Aborted as err:
            return bulk_pb2.InferBulkResponse.Answer(number=entry.number, **err.fields)
        return bulk_pb2.InferBulkResponse.Answer(number=entry.number, response=response.SerializeToString())


class Aborted(Exception):
    """An entry that its model aborted."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.fields = fields


class EntryContext:
    """The context of an entry of a bulk, as a model sees it."""

    def __init__(self, of_call: Any) -> None:
        self._of_call = of_call

    def invocation_metadata(self) -> Any:
        return self._of_call.invocation_metadata()

    async def abort(self, code: grpc.StatusCode, message: str, trailing: Any = ()) -> None:
        after = {key: int(value) for key, value in trailing if key == "retry-after-ms"}
        raise Aborted(code=code.value[0], message=message, retry_after_ms=after.get("retry-after-ms"))


class FakeStore:
    """Keeps results; the first of a job's generation stands. `before` runs first in each put, and may abort or wait."""

    def __init__(self) -> None:
        self.results: dict[str, store_pb2.Result] = {}
        self.puts: defaultdict[str, list[store_pb2.Result]] = defaultdict(list)
        self.sizes: list[int] = []
        self.over: list[store_pb2.TenantUsage] = []
        """Tenants that have used up their quotas."""
        self.looks = 0
        self.before: Callable[[store_pb2.PutResultsRequest, Any], Awaitable[None]] | None = None

    async def PutResults(self, request: store_pb2.PutResultsRequest, context: Any) -> store_pb2.PutResultsResponse:
        if self.before is not None:
            await self.before(request, context)
        self.sizes.append(len(request.results))
        entries = []
        for result in request.results:
            self.puts[result.job_id].append(result)
            before = self.results.get(result.job_id)
            is_next = before is not None and result.generation > before.generation and before.outcome == FAILED
            recorded = before is None or is_next
            if recorded:
                self.results[result.job_id] = result
            standing = store_pb2.Result()
            standing.CopyFrom(self.results[result.job_id])
            standing.ClearField("response")
            entries.append(
                store_pb2.PutResultsResponse.Entry(job_id=result.job_id, recorded=recorded, standing=standing)
            )
        return store_pb2.PutResultsResponse(entries=entries)

    async def ListUsage(self, request: store_pb2.ListUsageRequest, context: Any) -> store_pb2.ListUsageResponse:
        assert request.over_quota
        self.looks += 1
        at = int(request.page_token or 0)
        following = str(at + 1) if at + 1 < len(self.over) else ""
        return store_pb2.ListUsageResponse(usages=self.over[at : at + 1], next_page_token=following)

    async def QueryResults(self, request: store_pb2.QueryResultsRequest, context: Any) -> Any:
        found = [self.results[job_id] for job_id in request.job_ids if job_id in self.results]
        return store_pb2.QueryResultsResponse(results=found)


class ArtifactStore(FakeStore):
    """The same, with the artifacts and the usage of a real store behind it, which a test may take away (`is_away`)."""

    def __init__(self, real: store_pb2_grpc.StoreServiceAsyncStub) -> None:
        super().__init__()
        self._real = real
        self.is_away = False
        self.uploads = 0

    async def _checked(self, context: Any) -> None:
        if self.is_away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the store is away, as the test wants it")

    async def ListUsage(self, request: store_pb2.ListUsageRequest, context: Any) -> Any:
        if self.is_away:
            await self._checked(context)
        self.looks += 1
        return await self._real.ListUsage(request)

    async def PutArtifact(self, requests: AsyncIterator[store_pb2.PutArtifactRequest], context: Any) -> Any:
        await self._checked(context)
        self.uploads += 1
        return await self._real.PutArtifact(requests)

    async def GetArtifact(self, request: store_pb2.GetArtifactRequest, context: Any) -> AsyncIterator[Any]:
        await self._checked(context)
        try:
            async for part in self._real.GetArtifact(request):
                yield part
        except grpc.aio.AioRpcError as err:
            await context.abort(err.code(), err.details())

    async def ReleaseArtifacts(self, request: store_pb2.ReleaseArtifactsRequest, context: Any) -> Any:
        await self._checked(context)
        return await self._real.ReleaseArtifacts(request)

    async def ListReferences(self, request: store_pb2.ListReferencesRequest, context: Any) -> Any:
        await self._checked(context)
        return await self._real.ListReferences(request)

    def artifact_handlers(self) -> dict[str, Any]:
        kinds = {"PutArtifact": "stream_unary", "GetArtifact": "unary_stream"}
        found = {}
        for name in ("PutArtifact", "GetArtifact", "ReleaseArtifacts", "ListReferences"):
            make = getattr(grpc, f"{kinds.get(name, 'unary_unary')}_rpc_method_handler")
            request, response = getattr(store_pb2, f"{name}Request"), getattr(store_pb2, f"{name}Response")
            found[name] = make(getattr(self, name), request.FromString, response.SerializeToString)
        return found


class FakeMesh:
    """Both, served at `address`; `down` and `up` make it go and come."""

    def __init__(self, address: str, store: Any = None) -> None:
        self.address = address
        self.infer = FakeInfer()
        self.store: FakeStore = store or FakeStore()
        self._server: grpc.aio.Server | None = None

    async def up(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 128 << 20)])
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.infer, self._server)
        bulk_pb2_grpc.add_BulkInferenceServicer_to_server(self.infer, self._server)
        handlers = {
            "PutResults": grpc.unary_unary_rpc_method_handler(
                self.store.PutResults,
                store_pb2.PutResultsRequest.FromString,
                store_pb2.PutResultsResponse.SerializeToString,
            ),
            "ListUsage": grpc.unary_unary_rpc_method_handler(
                self.store.ListUsage,
                store_pb2.ListUsageRequest.FromString,
                store_pb2.ListUsageResponse.SerializeToString,
            ),
            "QueryResults": grpc.unary_unary_rpc_method_handler(
                self.store.QueryResults,
                store_pb2.QueryResultsRequest.FromString,
                store_pb2.QueryResultsResponse.SerializeToString,
            ),
        }
        if isinstance(self.store, ArtifactStore):
            handlers |= self.store.artifact_handlers()
        generic = grpc.method_handlers_generic_handler("shoal.store.v1.StoreService", handlers)
        self._server.add_generic_rpc_handlers([generic])
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def down(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
        Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)


@asynccontextmanager
async def mesh_at(folder: Path, store: Any = None) -> AsyncIterator[FakeMesh]:
    """A fake mesh, up, with `store` in place of the fake one."""
    mesh = FakeMesh(f"unix:{folder}/outbound.sock", store)
    await mesh.up()
    try:
        yield mesh
    finally:
        await mesh.down()


class Client:
    """A client of one ingest instance."""

    def __init__(self, address: str) -> None:
        self.channel = connect(address)
        self.stub = ingest_pb2_grpc.IngestServiceStub(self.channel)

    async def submit(self, **fields: Any) -> pb.SubmitResponse:
        response: pb.SubmitResponse = await self.stub.Submit(submit(**fields), timeout=20)
        return response

    async def get(self, job_id: str) -> pb.Job:
        response: pb.GetJobResponse = await self.stub.GetJob(pb.GetJobRequest(id=job_id), timeout=20)
        return response.job

    async def ended(self, job_id: str, within_s: float = 60) -> pb.Job:
        """The job, once it has ended."""
        job = pb.Job()
        async for response in self.stub.WatchJob(pb.WatchJobRequest(id=job_id), timeout=within_s):
            job = response.job
        return job


async def reached(client: Client) -> None:
    """Wait until the instance reaches its mesh: each test has its own, at one address.

    A call of the instance between two meshes fails, and the instance connects again after a backoff. Meanwhile attempts
    are refused, each with two transitions of its job.
    """
    await client.ended((await client.submit(request_id="reached")).job.id)


def submit(model: str = "echo", data: bytes = b"data", request_id: str = "", **fields: Any) -> pb.SubmitRequest:
    """A request that any test may send."""
    request = inference_pb2.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[data])
    return pb.SubmitRequest(request=request, **fields)


async def failing(context: Any, code: grpc.StatusCode, message: str = "as the test wants it", **trailing: str) -> None:
    """Aborts a call."""
    metadata = tuple((key.replace("_", "-"), value) for key, value in trailing.items())
    await context.abort(code, message, metadata)
