"""Rot is found wherever a read begins, before a wrong byte is passed on; and an artifact of an older version."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.process.threads import Threads
from services.store.artifacts import blocks as blocks_module
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.blocks import BlockHash, Blocks, block_bytes
from services.store.artifacts.opening import open_blobs
from services.store.documents import Collections
from shoal.errors import Aborted, DataLoss, NotFound, Unavailable
from tests.store.artifacts.conftest import MakeArtifacts, read, uploaded
from tests.store.conftest import sha256

pytestmark = pytest.mark.mongo

MIB = 1 << 20


@pytest.fixture
def blobs(tmp_path: Path, threads: Threads) -> BlobStore:
    return open_blobs(f"file://{tmp_path}/root", None, threads)[0]


@pytest.fixture
def artifacts(blobs: BlobStore, make_artifacts: MakeArtifacts) -> Artifacts:
    return make_artifacts(blobs)


def blob_of(tmp_path: Path, data: bytes) -> Path:
    (path,) = (tmp_path / "root" / "artifacts" / sha256(data)[:2]).glob(f"{sha256(data)}*")
    return path


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 200), each=st.integers(1, 30), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_blocks_do_not_depend_on_how_their_bytes_came(size: int, each: int, cuts: list[int]) -> None:
    data = bytes(range(256))[:size]
    hashed = BlockHash(each)
    places = [0, *sorted(min(cut, size) for cut in cuts), size]
    for start, end in itertools.pairwise(places):
        hashed.update(data[start:end])
    blocks = hashed.blocks()
    assert len(blocks) == -(-size // each)
    for index in range(len(blocks)):
        start, end = blocks.span(index, size)
        assert blocks.is_right(index, data[start:end])
        assert not blocks.is_right(index, data[start : end - 1])
    assert not Blocks(each, blocks.digests).is_right(len(blocks), b"")


@pytest.mark.parametrize("size", [0, 1, 64 << 30, (64 << 30) + 1, 1 << 42])
def test_digests_of_blocks_always_fit_a_document(size: int) -> None:
    each = block_bytes(size)
    assert each >= MIB
    assert -(-size // each) * 32 <= 2 << 20


@pytest.mark.parametrize("at", [0, MIB - 1, 2 * MIB, 5 * MIB + 99])
async def test_no_wrong_byte_is_ever_passed_on(artifacts: Artifacts, tmp_path: Path, at: int) -> None:
    data = os.urandom(5 * MIB + 100)
    digest = sha256(data)
    await artifacts.put(await uploaded(data))
    flip(blob_of(tmp_path, data), at)
    _, chunks = await artifacts.reader.read(digest, 0)
    seen = bytearray()

    async def reading() -> None:
        async for chunk in chunks:
            seen.extend(chunk)

    with pytest.raises(DataLoss, match=rf"{digest}.*of bytes {at // MIB * MIB} to"):
        await reading()
    assert seen == data[: at // MIB * MIB]


async def test_rot_that_a_read_does_not_touch_is_not_its_concern(artifacts: Artifacts, tmp_path: Path) -> None:
    data = os.urandom(4 * MIB)
    await artifacts.put(await uploaded(data))
    flip(blob_of(tmp_path, data), 10)
    assert await read(artifacts, sha256(data), MIB + 5) == data[MIB + 5 :]
    # Within the block: its start is not asked for, yet the block is not what it was.
    with pytest.raises(DataLoss):
        await read(artifacts, sha256(data), MIB - 5)


@pytest.mark.parametrize("size", [1, MIB, 3 * MIB + 17])
async def test_every_offset_of_a_right_one(artifacts: Artifacts, size: int) -> None:
    data = os.urandom(size)
    await artifacts.put(await uploaded(data))
    for offset in {0, 1, size // 2, size - 1, size, min(MIB, size), min(MIB + 1, size)}:
        assert await read(artifacts, sha256(data), offset) == data[offset:]


async def test_larger_blocks(artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_MOST_BLOCKS", 3)
    data = os.urandom(9 * MIB + 5)  # Blocks of 4 MiB, which are read in pieces and passed on in pieces.
    await artifacts.put(await uploaded(data))
    for offset in (0, 1, 4 * MIB - 1, 4 * MIB, 9 * MIB, len(data)):
        assert await read(artifacts, sha256(data), offset) == data[offset:]
    flip(blob_of(tmp_path, data), 7 * MIB)
    with pytest.raises(DataLoss, match=f"of bytes {4 * MIB} to {8 * MIB - 1}"):
        await read(artifacts, sha256(data), 4 * MIB)


async def of_an_older_version(collections: Collections, artifacts: Artifacts, tmp_path: Path, data: bytes) -> Path:
    """An artifact as an older version stored it: neither key, nor blocks, nor a time to keep it."""
    await artifacts.put(await uploaded(data))
    gone = {"key": "", "blocks": "", "block_bytes": "", "keep_until": ""}
    await collections.artifacts.update_one({"_id": sha256(data)}, {"$unset": gone})
    path = blob_of(tmp_path, data)
    return path.rename(path.with_name(sha256(data)))


async def test_an_artifact_of_an_older_version(collections: Collections, artifacts: Artifacts, tmp_path: Path) -> None:
    data = os.urandom(2 * MIB + 3)
    path = await of_an_older_version(collections, artifacts, tmp_path, data)
    assert (await artifacts.put(await uploaded(data)))[1]
    assert await read(artifacts, sha256(data), MIB + 1) == data[MIB + 1 :]
    flip(path, 2 * MIB)
    with pytest.raises(DataLoss, match=f"of bytes {2 * MIB}"):  # It has its blocks by now.
        await read(artifacts, sha256(data), 2 * MIB + 2)
    assert not (await artifacts.put(await uploaded(data)))[1]
    assert await read(artifacts, sha256(data)) == data


async def test_an_artifact_of_an_older_version_that_rotted(
    collections: Collections, artifacts: Artifacts, tmp_path: Path
) -> None:
    data = os.urandom(2 * MIB)
    flip(await of_an_older_version(collections, artifacts, tmp_path, data), 5)
    with pytest.raises(DataLoss, match="hash to"):
        await read(artifacts, sha256(data), MIB)


async def test_an_upload_whose_document_cannot_be_written_is_kept(
    collections: Collections, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(2 * MIB)

    async def away(*_: object) -> None:
        raise Unavailable("MongoDB does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_written", away)
        with pytest.raises(Unavailable):
            await artifacts.put(await uploaded(data))
    assert (await artifacts.stat(sha256(data)))[1] == len(data)
    stored, existed = await artifacts.put(await uploaded(data, offset=len(data)))
    assert (stored.size, existed) == (len(data), False)
    assert await read(artifacts, sha256(data)) == data


async def test_one_that_is_replaced_or_removed_while_it_is_read(
    collections: Collections, artifacts: Artifacts, tmp_path: Path
) -> None:
    data = os.urandom(9 * MIB)
    await artifacts.put(await uploaded(data))
    blob = blob_of(tmp_path, data)

    _, chunks = await artifacts.reader.read(sha256(data), 0)
    await anext(chunks)
    blob.unlink()
    await collections.artifacts.update_one({"_id": sha256(data)}, {"$set": {"damaged": True}})
    await artifacts.put(await uploaded(data))
    with pytest.raises(Aborted, match="uploaded again"):
        [chunk async for chunk in chunks]

    _, chunks = await artifacts.reader.read(sha256(data), 0)
    await anext(chunks)
    blob_of(tmp_path, data).unlink()
    await collections.artifacts.delete_one({"_id": sha256(data)})
    with pytest.raises(NotFound, match="removed"):
        [chunk async for chunk in chunks]
