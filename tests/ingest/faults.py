"""infer and store for ingest's tests, at one address like the mesh, and as faulty as a test wants them.

They keep the contract: a job's first result stands for ever. Whatever else happens, a test says in `model` and `store`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from mesh.channel import connect
from shoal.inference.v2 import inference_pb2, inference_pb2_grpc
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.ingest.v1 import ingest_pb2_grpc
from shoal.store.v1 import store_pb2

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


class FakeInfer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Runs `model`; counts calls by request id."""

    def __init__(self) -> None:
        self.model: Model = echo
        self.calls: Counter[str] = Counter()
        self.metadata: dict[str, dict[str, str]] = {}

    async def ModelInfer(self, request: inference_pb2.ModelInferRequest, context: Any) -> Any:
        self.calls[request.id] += 1
        self.metadata[request.id] = dict(context.invocation_metadata())
        return await self.model(request, context)


class FakeStore:
    """Keeps results; the first of a job's generation stands. `before` runs first in each put, and may abort or wait."""

    def __init__(self) -> None:
        self.results: dict[str, store_pb2.Result] = {}
        self.puts: defaultdict[str, list[store_pb2.Result]] = defaultdict(list)
        self.sizes: list[int] = []
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

    async def QueryResults(self, request: store_pb2.QueryResultsRequest, context: Any) -> Any:
        found = [self.results[job_id] for job_id in request.job_ids if job_id in self.results]
        return store_pb2.QueryResultsResponse(results=found)


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
        handlers = {
            "PutResults": grpc.unary_unary_rpc_method_handler(
                self.store.PutResults,
                store_pb2.PutResultsRequest.FromString,
                store_pb2.PutResultsResponse.SerializeToString,
            ),
            "QueryResults": grpc.unary_unary_rpc_method_handler(
                self.store.QueryResults,
                store_pb2.QueryResultsRequest.FromString,
                store_pb2.QueryResultsResponse.SerializeToString,
            ),
        }
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


def submit(model: str = "echo", data: bytes = b"data", request_id: str = "", **fields: Any) -> pb.SubmitRequest:
    """A request that any test may send."""
    request = inference_pb2.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[data])
    return pb.SubmitRequest(request=request, **fields)


async def failing(context: Any, code: grpc.StatusCode, message: str = "as the test wants it", **trailing: str) -> None:
    """Aborts a call."""
    metadata = tuple((key.replace("_", "-"), value) for key, value in trailing.items())
    await context.abort(code, message, metadata)
