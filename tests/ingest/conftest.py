"""Ingest as real processes, beside a mesh that a test can break."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, connect, ensure_collection
from mesh.rpc.access import Access
from mesh.rpc.channel import connect as connect_channel
from services.ingest.app import run
from services.ingest.config import IngestConfig
from services.ingest.documents import INDEXES, JOBS, VALIDATOR
from shoal.ingest.v1 import ingest_pb2_grpc
from tests.breakable import PATIENCE_S, Process, until
from tests.ingest.faults import Client, FakeMesh, mesh_at
from tests.ingest.making import TestClock


class IngestProcess(Process):
    """One `python -m services.ingest`."""

    def __init__(self, folder: Path, n: int, mongo: str, database: str, mesh: str, **settings: object) -> None:
        self.folder = folder
        self.address = f"unix:{folder}/ingest-{n}.sock"
        env = {
            "INSTANCE": f"ingest-{n}",
            "LISTEN": self.address,
            "MESH": mesh,
            "MONGO": mongo,
            "DATABASE": database,
            "NOTICE_MS": 0,
            "DRAIN_MS": 2_000,
            **{key.upper(): value for key, value in settings.items()},
        }
        super().__init__(
            [sys.executable, "-m", "services.ingest"],
            folder / f"ingest-{n}.log",
            {f"SHOAL_INGEST_{key}": str(value) for key, value in env.items()},
        )

    def wait(self, within_s: float) -> int:
        """Its exit status, once it has ended by itself."""
        assert self._popen is not None
        return self._popen.wait(within_s)

    async def until_ready(self) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def serves() -> bool:
                assert self.is_running(), self.log.read_text()[-3000:]
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
                except grpc.aio.AioRpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            await until(serves, f"{self.address} serving")

    def wait_until_ready(self) -> None:
        """The same, for a fixture that has no event loop."""
        deadline = time.monotonic() + PATIENCE_S
        with grpc.insecure_channel(self.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            while True:
                assert self.is_running(), self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, "ingest did not become ready"
                try:
                    answer = check(health_pb2.HealthCheckRequest(), timeout=1, wait_for_ready=True)
                except grpc.RpcError:
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return


StartIngest = Callable[..., IngestProcess]


@asynccontextmanager
async def running_ingest(config: IngestConfig, access: Access | None) -> AsyncIterator[Any]:
    """An instance in this process, and a stub for it."""
    task = asyncio.create_task(run(config, access))
    try:
        async with connect_channel(config.listen) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def serves() -> bool:
                if task.done():
                    await task
                try:
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                except grpc.aio.AioRpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            await until(serves, "ingest serves")
            yield ingest_pb2_grpc.IngestServiceStub(channel)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def jobs(mongo_uri: str, mongo_database: str) -> AsyncIterator[AsyncCollection[Document]]:
    """ingest's collection of jobs, in a database of the test's own."""
    async with connect(mongo_uri) as client:
        yield await ensure_collection(client[mongo_database], JOBS, validator=VALIDATOR, indexes=INDEXES)


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


@pytest.fixture
async def own_mesh(run_dir: Path) -> AsyncIterator[FakeMesh]:
    """A mesh for the instances that `start_ingest` starts."""
    async with mesh_at(run_dir) as fake:
        yield fake


# Starting a process takes a second or more, so tests that need nothing special share one per module. Its mesh is each
# test's own, at the same address.


@pytest.fixture(scope="module")
def shared_database() -> str:
    return f"test_{uuid.uuid4().hex[:16]}"


@pytest.fixture(scope="module")
def shared_ingest(mongo_uri: str, shared_database: str) -> Iterator[IngestProcess]:
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        mesh = f"unix:{folder}/outbound.sock"
        # Nobody kills or freezes it: no lease is to lapse, even if the machine stands still for seconds.
        with IngestProcess(Path(folder), 0, mongo_uri, shared_database, mesh, lease_ms=60_000) as process:
            process.wait_until_ready()
            yield process


@pytest.fixture
async def mesh(shared_ingest: IngestProcess) -> AsyncIterator[FakeMesh]:
    async with mesh_at(shared_ingest.folder) as fake:
        yield fake


@pytest.fixture
def start_ingest(run_dir: Path, mongo_uri: str, mongo_database: str) -> Iterator[StartIngest]:
    """Starts an instance; a second call with the same number makes a new process object for the same name."""
    with ExitStack() as stack:

        def start(n: int = 0, mesh: str = f"unix:{run_dir}/outbound.sock", mongo: str = mongo_uri, **settings: object):
            return stack.enter_context(IngestProcess(run_dir, n, mongo, mongo_database, mesh, **settings))

        yield start  # type: ignore[misc]


@pytest.fixture
async def client(mesh: FakeMesh, shared_ingest: IngestProcess) -> AsyncIterator[Client]:
    """A client of the shared instance, with a mesh beside it."""
    served = Client(shared_ingest.address)
    yield served
    await served.channel.close()
