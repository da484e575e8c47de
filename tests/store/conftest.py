"""The store service as it runs, in this process, on a unix socket, over a real mongod and a folder."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.rpc.access import Access
from mesh.rpc.channel import connect
from services.store.app import run
from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc
from tests.breakable import until


@dataclass(frozen=True)
class Store:
    """A running store and a stub for it."""

    config: StoreConfig
    stub: store_pb2_grpc.StoreServiceAsyncStub
    channel: grpc.aio.Channel

    @property
    def root(self) -> Path:
        return Path(self.config.blobs.removeprefix("file://"))

    @property
    def staged(self) -> list[Path]:
        return sorted((self.root / "staging").iterdir())

    def blobs(self, digest: str) -> list[Path]:
        """The files that hold an artifact's bytes: one, but for what is left of broken or replaced uploads."""
        return sorted((self.root / "artifacts" / digest[:2]).glob(f"{digest}*"))

    def blob(self, digest: str) -> Path:
        (path,) = self.blobs(digest)
        return path

    async def put(self, data: bytes, **header: object) -> pb.PutArtifactResponse:
        return await self.stub.PutArtifact(iter(upload(data, **header)))

    async def get(self, digest: str, offset: int = 0) -> tuple[int, bytes]:
        messages = [m async for m in self.stub.GetArtifact(pb.GetArtifactRequest(sha256=digest, offset=offset))]
        assert not any(m.size_bytes for m in messages[1:])
        assert all(len(m.chunk) <= 1 << 20 for m in messages)
        return messages[0].size_bytes, b"".join(m.chunk for m in messages)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def header(**fields: object) -> pb.PutArtifactRequest:
    return pb.PutArtifactRequest(header=pb.PutArtifactRequest.Header(**fields))


def upload(
    data: bytes, *, chunk_bytes: int = 1 << 20, offset: int = 0, **fields: object
) -> Iterator[pb.PutArtifactRequest]:
    yield header(**{"sha256": sha256(data), "size_bytes": len(data), "offset": offset, **fields})
    for at in range(offset, len(data), chunk_bytes):
        yield pb.PutArtifactRequest(chunk=data[at : at + chunk_bytes])


async def serving(channel: grpc.aio.Channel) -> bool:
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.aio.AioRpcError:
        return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@contextlib.asynccontextmanager
async def running_store(
    config: StoreConfig, *, wait: bool = True, access: Access | None = None
) -> AsyncIterator[Store]:
    task = asyncio.create_task(run(config, access))
    try:
        async with connect(config.listen) as channel:
            if wait:
                await until(lambda: _serving(task, channel), "the store serves")
            yield Store(config, store_pb2_grpc.StoreServiceStub(channel), channel)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _serving(task: asyncio.Task[None], channel: grpc.aio.Channel) -> bool:
    if task.done():
        await task
    return await serving(channel)


def store_config(mongo_uri: str, database: str, socket: Path, blobs: Path, **fields: object) -> StoreConfig:
    given = {"instance": "store-0", "listen": f"unix:{socket}", "mongo": mongo_uri, "database": database}
    return StoreConfig.model_validate({**given, "blobs": f"file://{blobs}", "drain_ms": 2_000, **fields})


@pytest.fixture
def config(mongo_uri: str, mongo_database: str, run_dir: Path, tmp_path: Path) -> StoreConfig:
    return store_config(mongo_uri, mongo_database, run_dir / "store-0.sock", tmp_path / "blobs")


@pytest.fixture
async def store(config: StoreConfig) -> AsyncIterator[Store]:
    async with running_store(config) as running:
        yield running


# A store that starts makes its collections and indexes. Tests that leave nothing behind, or only data that no other
# test looks at, share one per module, and its event loop: they are marked `on_shared_loop`.
on_shared_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_store(mongo_uri: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Store]:
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        socket, blobs = Path(folder) / "store-0.sock", tmp_path_factory.mktemp("blobs")
        async with running_store(store_config(mongo_uri, f"test_{uuid.uuid4().hex[:16]}", socket, blobs)) as running:
            yield running


@contextmanager
def failing_reads(file: Path, error: int, *, is_whole_disk: bool = False) -> Iterator[None]:
    """Reading `file` fails with the errno `error` inside the block; with the whole disk, so does syncing any."""
    pread, fsync = os.pread, os.fsync

    def failing_pread(fd: int, size: int, offset: int) -> bytes:
        if Path(os.readlink(f"/proc/self/fd/{fd}")) == file:
            raise OSError(error, os.strerror(error))
        return pread(fd, size, offset)

    def failing_fsync(fd: int) -> None:
        if is_whole_disk:
            raise OSError(error, os.strerror(error))
        fsync(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", failing_pread)
        patch.setattr(os, "fsync", failing_fsync)
        yield


async def refused(call: object, code: grpc.StatusCode, *words: str) -> str:
    """Asserts that a call ends with `code` and a message that says `words`; gives the message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ended(call)
    assert caught.value.code() == code, caught.value
    for word in words:
        assert word in caught.value.details()
    return caught.value.details()


async def _ended(call: object) -> None:
    if hasattr(call, "__await__"):
        await call
        return
    async for _ in call:
        pass


async def stored(store: Store, *contents: bytes) -> Sequence[str]:
    for content in contents:
        await store.put(content)
    return [sha256(content) for content in contents]
