"""Ingest as real processes, beside a mesh with a model that describes itself and doubles rows."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import model_config_pb2
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.ingest.faults import Client, FakeInfer, FakeMesh

ENDED = {pb.BATCH_STATE_SUCCEEDED, pb.BATCH_STATE_FAILED, pb.BATCH_STATE_CANCELLED}
LEASE = {"lease_ms": 2_000, "renew_ms": 500, "poll_ms": 50, "batch_urls": "file:///,s3://"}
Before = Callable[[list[int], Any], Awaitable[None]]


class Doubling(FakeInfer):
    """The model `double`: x FP32 [4] to y = 2x. `before(rows, context)` (by their first value) may wait or abort.

    And the model `length`: data BYTES [] to n INT64 [], its length, and text BYTES [], the data again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: Before | None = None
        self.rows: Counter[int] = Counter()
        self.sizes: list[int] = []
        self.is_there = True

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Any) -> oip.ModelMetadataResponse:
        if request.name == "length":
            found = oip.ModelMetadataResponse(name=request.name, versions=["1"])
            found.inputs.add(name="data", datatype="BYTES", shape=[-1])
            found.outputs.add(name="n", datatype="INT64", shape=[-1])
            found.outputs.add(name="text", datatype="BYTES", shape=[-1])
            return found
        if request.name != "double" or not self.is_there:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name!r}")
        found = oip.ModelMetadataResponse(name=request.name, versions=["1"])
        found.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
        found.outputs.add(name="y", datatype="FP32", shape=[-1, 4])
        return found

    async def ModelConfig(self, request: oip.ModelConfigRequest, context: Any) -> oip.ModelConfigResponse:
        return oip.ModelConfigResponse(config=model_config_pb2.ModelConfig(name=request.name, max_batch_size=8))

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> oip.ModelInferResponse:
        if request.model_name == "length":
            return self._length(request)
        if not self.is_there:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model_name!r}")
        x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(-1, 4)
        rows = x[:, 0].astype(int).tolist()
        if self.before is not None:
            await self.before(rows, context)
        self.rows.update(rows)
        self.sizes.append(len(rows))
        answer = oip.ModelInferResponse(model_name="double", model_version="1", raw_output_contents=[(x * 2).tobytes()])
        answer.outputs.add(name="y", datatype="FP32", shape=x.shape)
        return answer

    def _length(self, request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        raw, sizes, at = request.raw_input_contents[0], [], 0
        while at < len(raw):
            sizes.append(int.from_bytes(raw[at : at + 4], "little"))
            at += 4 + sizes[-1]
        self.sizes.append(len(sizes))
        answer = oip.ModelInferResponse(model_name="length", model_version="1")
        answer.outputs.add(name="n", datatype="INT64", shape=[len(sizes)])
        answer.outputs.add(name="text", datatype="BYTES", shape=[len(sizes)])
        answer.raw_output_contents.extend([np.array(sizes, np.int64).tobytes(), raw])
        return answer


class BatchMesh(FakeMesh):
    """A mesh with that model."""

    infer: Doubling

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.infer = Doubling()


@asynccontextmanager
async def batch_mesh(folder: Path) -> AsyncIterator[BatchMesh]:
    mesh = BatchMesh(f"unix:{folder}/outbound.sock")
    await mesh.up()
    try:
        yield mesh
    finally:
        await mesh.down()


@pytest.fixture
async def mesh(run_dir: Path) -> AsyncIterator[BatchMesh]:  # type: ignore[override]
    async with batch_mesh(run_dir) as one:
        yield one


class BatchClient(Client):
    """A client that asks for batches of the model `double`."""

    async def submit_batch(self, inputs: str, output: str, *, model: str = "double", **fields: Any) -> pb.Batch:
        request = pb.SubmitBatchRequest(inputs=[inputs], output=output, model_name=model, **fields)
        answer: pb.SubmitBatchResponse = await self.stub.SubmitBatch(request, timeout=30)
        return answer.batch

    async def get_batch(self, batch_id: str) -> pb.Batch:
        answer: pb.GetBatchResponse = await self.stub.GetBatch(pb.GetBatchRequest(id=batch_id), timeout=20)
        return answer.batch

    async def until_mesh_is_reached(self) -> None:
        """Wait until the instance reaches its mesh: each test has its own, at one address.

        A call of the instance between two meshes fails, and the instance connects again after a backoff.
        """

        async def is_reached() -> bool:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await self.submit_batch("file:///in/", "file:///out", model="nobody's")
            return refused.value.code() == grpc.StatusCode.NOT_FOUND

        await until(is_reached, "a call to the mesh")

    async def batch_ended(self, batch_id: str, within_s: float = 60) -> pb.Batch:
        """The batch, once it has ended. Whoever answers may be killed meanwhile."""
        last = pb.Batch()

        async def has_ended() -> bool:
            nonlocal last
            try:
                last = await self.get_batch(batch_id)
            except grpc.aio.AioRpcError as err:
                if err.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                return False
            return last.state in ENDED

        await until(has_ended, f"the end of batch {batch_id}", within_s=within_s, every_s=0.1)
        return last


@pytest.fixture(scope="module")
def shared_ingest(mongo_uri: str, shared_database: str) -> Iterator[IngestProcess]:
    """An instance with short leases, for the tests of a module."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        mesh = f"unix:{folder}/outbound.sock"
        with IngestProcess(Path(folder), 0, mongo_uri, shared_database, mesh, **LEASE) as process:
            process.wait_until_ready()
            yield process


@pytest.fixture
async def client(mesh: BatchMesh, start_ingest: StartIngest) -> AsyncIterator[BatchClient]:  # type: ignore[override]
    """A client of an instance with short leases."""
    ingest = start_ingest(**LEASE)
    await ingest.until_ready()
    made = BatchClient(ingest.address)
    yield made
    await made.channel.close()
