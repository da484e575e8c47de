"""One contract for every blob store: a folder, and a real object store that speaks S3."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mesh.process.threads import Threads
from services.store.artifacts.blobs import CHUNK_BYTES, BlobStore
from services.store.artifacts.local_blobs import LocalBlobs
from services.store.artifacts.object_blobs import PART_BYTES, ObjectBlobs
from services.store.artifacts.object_blobs import WINDOW_BYTES as WINDOW
from services.store.artifacts.opening import open_blobs
from shoal.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ShoalError,
    Unavailable,
)
from tests.store.conftest import failing_reads

KEY = "artifacts/ab/abcd"


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(2) as threads:
        yield threads


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, threads: Threads) -> BlobStore:
    if request.param == "folder":
        return open_blobs(f"file://{tmp_path}/ro%20ot", None, threads)[0]
    weed = request.getfixturevalue("weed")
    return ObjectBlobs(weed.store(weed.prefix()))


async def everything(blobs: BlobStore, key: str, offset: int, size: int) -> bytes:
    chunks = [chunk async for chunk in blobs.read(key, offset, size)]
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
    return b"".join(chunks)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, WINDOW - 1, WINDOW, WINDOW + 1, PART_BYTES, 2 * PART_BYTES + 1])
async def test_adopted_and_put_bytes_are_read_back(blobs: BlobStore, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    await blobs.adopt(KEY, tmp_path / "file")
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
    assert await everything(blobs, KEY, 2, WINDOW + 100) == b"c"
    assert await everything(blobs, KEY, 50, 100) == b""


async def test_a_blob_that_is_replaced_while_it_is_read(blobs: BlobStore) -> None:
    old, new = os.urandom(3 * WINDOW), os.urandom(3 * WINDOW)
    await blobs.put(KEY, old)
    chunks = blobs.read(KEY, 0, len(old))
    seen = [await anext(chunks)]
    await blobs.put(KEY, new)
    seen += [chunk async for chunk in chunks]
    # Which of the two comes from then on is for the reader to find out, by the digest: never a third thing.
    whole = b"".join(seen)
    assert len(whole) == len(old)
    assert whole[:WINDOW] == old[:WINDOW]
    for start in range(WINDOW, len(old), WINDOW):
        assert whole[start : start + WINDOW] in (old[start : start + WINDOW], new[start : start + WINDOW])


async def test_what_is_listed(blobs: BlobStore) -> None:
    assert [blob async for blob in blobs.list("artifacts")] == []
    before = datetime.now(UTC) - timedelta(minutes=1)
    sizes = {f"artifacts/{n:02x}/{n}": n for n in range(25)}
    await asyncio.gather(*(blobs.put(key, bytes(size)) for key, size in sizes.items()))
    await blobs.put("artifacts-not/ab/x", b"elsewhere")
    await blobs.put("responses/ab/x", b"elsewhere")
    found = [blob async for blob in blobs.list("artifacts")]
    assert {blob.key: blob.size for blob in found} == sizes
    assert len(found) == len(sizes)
    assert all(before < blob.modified_at <= datetime.now(UTC) + timedelta(minutes=1) for blob in found)
    await asyncio.gather(*(blobs.remove(key) for key in sizes))
    assert [blob async for blob in blobs.list("artifacts")] == []


async def test_many_at_once_under_one_key(blobs: BlobStore) -> None:
    contents = [bytes([n]) * (PART_BYTES + n) for n in range(6)]
    await asyncio.gather(*(blobs.put(KEY, content) for content in contents))
    size = await blobs.size(KEY)
    assert size is not None
    assert await everything(blobs, KEY, 0, size) in contents


async def test_the_place_is_there(blobs: BlobStore) -> None:
    await blobs.check()


async def test_a_folder_that_is_gone(tmp_path: Path, threads: Threads) -> None:
    blobs, _ = open_blobs(f"file://{tmp_path}/root", None, threads)
    await blobs.put(KEY, b"abc")
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root").mkdir()  # What is left of a disk that is not mounted.
    assert await blobs.size(KEY) is None
    with pytest.raises(FailedPrecondition, match="mounted"):
        await blobs.check()


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


async def test_a_blob_that_the_disk_has_lost(tmp_path: Path, threads: Threads) -> None:
    blobs, staging = open_blobs(f"file://{tmp_path}/root", None, threads)
    await blobs.put(KEY, b"abc")
    file = tmp_path / "root" / KEY
    with failing_reads(file, errno.EIO):
        with pytest.raises(DataLoss, match=f"blob {KEY}: the disk cannot read it: Input/output error"):
            await everything(blobs, KEY, 0, 3)
    with failing_reads(file, errno.EIO, is_whole_disk=True), pytest.raises(Unavailable, match="retry"):
        await everything(blobs, KEY, 0, 3)
    assert list(staging.iterdir()) == []
    assert await everything(blobs, KEY, 0, 3) == b"abc"
    # The real thing: nothing lies at address 0 of a process.
    file.unlink()
    file.symlink_to("/proc/self/mem")
    with pytest.raises(DataLoss, match=f"blob {KEY}: the disk cannot read it: Input/output error"):
        await everything(blobs, KEY, 0, 3)


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=["full", "quota", "read-only"])
async def test_a_disk_that_takes_nothing_more_may_have_lost_a_blob(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    blobs, staging = open_blobs(f"file://{tmp_path}/root", None, threads)
    await blobs.put(KEY, b"abc")

    def refusing(fd: int, data: bytes, offset: int) -> int:
        raise OSError(full, os.strerror(full))

    with failing_reads(tmp_path / "root" / KEY, errno.EIO):
        monkeypatch.setattr(os, "pwrite", refusing)
        with pytest.raises(DataLoss, match=KEY):
            await everything(blobs, KEY, 0, 3)
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (errno.EMFILE, Unavailable, "Too many open files: retry in a moment"),
        (errno.ENFILE, Unavailable, "retry in a moment"),
        (errno.ENOMEM, Unavailable, "retry in a moment"),
        (errno.ESTALE, Unavailable, "retry in a moment"),
        (errno.EACCES, PermissionDenied, "the user that the store runs as must own its folder of blobs"),
    ],
    ids=["process", "system", "memory", "network", "owner"],
)
@pytest.mark.parametrize("call", ["open", "stat"])
async def test_what_else_keeps_a_blob_from_being_read_is_no_damage(
    tmp_path: Path,
    threads: Threads,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: int,
    expected: type[ShoalError],
    words: str,
) -> None:
    blobs, _ = open_blobs(f"file://{tmp_path}/root", None, threads)
    await blobs.put(KEY, b"abc")
    real = getattr(os, call)

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if path == tmp_path / "root" / KEY:
            raise OSError(error, os.strerror(error))
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(expected, match=words):
        await (everything(blobs, KEY, 0, 3) if call == "open" else blobs.size(KEY))


async def test_a_folder_is_no_blob(tmp_path: Path, threads: Threads) -> None:
    blobs, _ = open_blobs(f"file://{tmp_path}/root", None, threads)
    await blobs.put(KEY, b"abc")
    assert await blobs.size("artifacts/ab") is None
    assert await blobs.size(f"{KEY}/below") is None
    for key in ("artifacts/ab", f"{KEY}/below"):
        with pytest.raises(NotFound):
            await everything(blobs, key, 0, 3)


def test_an_object_store_gets_the_staging_folder_that_is_given(tmp_path: Path, threads: Threads) -> None:
    blobs, staging = open_blobs("s3://bucket/prefix", tmp_path / "deep" / "staging", threads)
    assert not isinstance(blobs, LocalBlobs)
    assert staging == tmp_path / "deep" / "staging"
    assert staging.is_dir()
