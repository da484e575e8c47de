"""One contract for every blob store, and the whole artifact path over an object store."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from mesh import mongo
from services.store.artifacts import blobs as blobs_module
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.blobs import CHUNK_BYTES, BlobStore, LocalBlobs, ObjectBlobs, open_blobs
from services.store.artifacts.staging import Staging
from services.store.artifacts.threads import Threads
from services.store.artifacts.uploads import Upload
from services.store.documents import Collections
from shoal.errors import DataLoss, Internal, NotFound, ResourceExhausted
from tests.store.conftest import sha256, upload

KEY = "artifacts/ab/abcd"
WINDOW = blobs_module._WINDOW_BYTES


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(2) as threads:
        yield threads


@pytest.fixture(params=["folder", "object store"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, threads: Threads) -> BlobStore:
    if request.param == "folder":
        return open_blobs(f"file://{tmp_path}/ro%20ot", None, threads)[0]
    return ObjectBlobs(MemoryStore())


async def everything(blobs: BlobStore, key: str, offset: int, size: int) -> bytes:
    chunks = [chunk async for chunk in blobs.read(key, offset, size)]
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
    return b"".join(chunks)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, WINDOW - 1, WINDOW, WINDOW + 1, 20 << 20])
async def test_adopted_and_put_bytes_are_read_back(blobs: BlobStore, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    await blobs.adopt(KEY, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    await blobs.put("responses/x", data)
    for key in (KEY, "responses/x"):
        assert await blobs.size(key) == size
        assert await everything(blobs, key, 0, size) == data
        for offset in {0, size // 3, max(size - 1, 0), size}:
            assert await everything(blobs, key, offset, size) == data[offset:]


async def test_what_is_not_there(blobs: BlobStore) -> None:
    assert await blobs.size(KEY) is None
    with pytest.raises(NotFound, match=KEY):
        await everything(blobs, KEY, 0, 10)
    await blobs.remove(KEY)
    await blobs.put(KEY, b"x")
    await blobs.remove(KEY)
    assert await blobs.size(KEY) is None


async def test_a_blob_is_replaced_whole(blobs: BlobStore) -> None:
    await blobs.put(KEY, b"long and old")
    await blobs.put(KEY, b"new")
    assert await blobs.size(KEY) == 3
    assert await everything(blobs, KEY, 0, 3) == b"new"


async def test_a_blob_that_is_shorter_than_it_should_be(blobs: BlobStore) -> None:
    await blobs.put(KEY, b"abc")
    assert await everything(blobs, KEY, 0, 100) == b"abc"


async def test_a_local_blob_is_synced_before_it_has_its_name(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        acts.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
        real_fsync(fd)

    def replace(source: Path, target: Path) -> None:
        acts.append("rename")
        real_replace(source, target)

    blobs, _ = open_blobs(f"file://{tmp_path}/root", None, threads)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    await blobs.put(KEY, b"abc")
    # The folders artifacts and artifacts/ab are new: the folders above them are synced too.
    assert acts == ["sync file", "sync folder", "sync folder", "rename", "sync folder"]


async def test_a_disk_that_is_full_or_broken(tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, staging = open_blobs(f"file://{tmp_path}/root", None, threads)
    for error, expected in [(28, ResourceExhausted), (5, Internal)]:

        def failing(fd: int, error: int = error) -> None:
            raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(expected, match="disk"):
                await blobs.put(KEY, b"abc")
        assert await blobs.size(KEY) is None
        assert list(staging.iterdir()) == []


def test_an_object_store_gets_the_staging_folder_that_is_given(tmp_path: Path, threads: Threads) -> None:
    blobs, staging = open_blobs("s3://bucket/prefix", tmp_path / "deep" / "staging", threads)
    assert not isinstance(blobs, LocalBlobs)
    assert staging == tmp_path / "deep" / "staging"
    assert staging.is_dir()


@pytest.fixture
async def artifacts(mongo_uri: str, mongo_database: str, tmp_path: Path, threads: Threads) -> AsyncIterator[Artifacts]:
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        staging = Staging(tmp_path, 4, 60)
        blobs = ObjectBlobs(MemoryStore())
        yield Artifacts(collections, blobs, staging, threads, max_bytes=1 << 30, clock=lambda: datetime.now(UTC))


async def uploaded(data: bytes, **fields: object) -> Upload:
    async def messages():
        for message in upload(data, **fields):
            yield message

    return await Upload.opened(messages(), 60)


@pytest.mark.mongo
async def test_artifacts_over_an_object_store(artifacts: Artifacts, tmp_path: Path) -> None:
    data = os.urandom((20 << 20) + 1)
    artifact, existed = await artifacts.put(await uploaded(data))
    assert (artifact.digest, artifact.size, existed) == (sha256(data), len(data), False)
    assert list(tmp_path.iterdir()) == []
    assert (await artifacts.put(await uploaded(data)))[1]
    _, chunks = await artifacts.read(artifact.digest, 5)
    assert b"".join([chunk async for chunk in chunks]) == data[5:]


@pytest.mark.mongo
async def test_rot_in_an_object_store(artifacts: Artifacts) -> None:
    data = os.urandom(3 << 20)
    artifact, _ = await artifacts.put(await uploaded(data))
    await artifacts._blobs.put(f"artifacts/{artifact.digest[:2]}/{artifact.digest}", b"?" + data[1:])
    _, chunks = await artifacts.read(artifact.digest, 0)
    with pytest.raises(DataLoss, match="damaged"):
        [chunk async for chunk in chunks]
    assert not (await artifacts.put(await uploaded(data)))[1]
