"""Artifacts in a real object store: large ones, and everything that goes wrong between here and there."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import obstore
import pytest

from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.object_blobs import PART_BYTES, ObjectBlobs, open_object_store
from shoal.errors import DataLoss, FailedPrecondition, PermissionDenied, ShoalError, Unavailable
from tests.breakable import until
from tests.seaweedfs import WeedProcess
from tests.store.artifacts.conftest import MakeArtifacts, read, uploaded
from tests.store.artifacts.networks import Network
from tests.store.conftest import sha256

pytestmark = [pytest.mark.mongo, pytest.mark.s3]

LARGE = 2 * PART_BYTES + 1


@pytest.fixture
def artifacts(weed: WeedProcess, make_artifacts: MakeArtifacts) -> Artifacts:
    return make_artifacts(ObjectBlobs(weed.store(weed.prefix())))


async def test_artifacts_over_an_object_store(artifacts: Artifacts, tmp_path: Path) -> None:
    data = os.urandom(LARGE)
    artifact, existed = await artifacts.put(await uploaded(data))
    assert (artifact.digest, artifact.size, existed) == (sha256(data), len(data), False)
    assert list((tmp_path / "staging").iterdir()) == []
    assert (await artifacts.put(await uploaded(data)))[1]
    assert await read(artifacts, artifact.digest, 5) == data[5:]


async def test_rot_in_an_object_store(weed: WeedProcess, make_artifacts: MakeArtifacts) -> None:
    blobs = ObjectBlobs(weed.store(weed.prefix()))
    artifacts = make_artifacts(blobs)
    data = os.urandom(3 << 20)
    artifact, _ = await artifacts.put(await uploaded(data))
    await blobs.put(artifact.key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataLoss, match=f"{artifact.digest}.*of bytes {2 << 20} to {(3 << 20) - 1}"):
        await read(artifacts, artifact.digest)
    assert not (await artifacts.put(await uploaded(data)))[1]
    assert await read(artifacts, artifact.digest) == data


async def test_a_url_and_the_usual_variables(s3_access: WeedProcess) -> None:
    store = open_object_store(s3_access.prefix())
    await ObjectBlobs(store).put("a/b/c", b"abc")
    assert await ObjectBlobs(store).size("a/b/c") == 3
    assert bytes(await obstore.get_range_async(store, "a/b/c", start=1, end=3)) == b"bc"


@pytest.mark.parametrize("wrong", [{"secret_access_key": "wrong"}, {"access_key_id": "nobody"}], ids=["secret", "key"])
async def test_wrong_credentials(weed: WeedProcess, make_artifacts: MakeArtifacts, wrong: dict[str, str]) -> None:
    data, url = os.urandom(100), weed.prefix()
    right = make_artifacts(ObjectBlobs(weed.store(url)))
    await right.put(await uploaded(data))
    blobs = ObjectBlobs(weed.store(url, **wrong))
    for call in (blobs.check(), blobs.size("k"), blobs.put("k", b"x"), blobs.put("k", bytes(LARGE)), blobs.remove("k")):
        with pytest.raises(PermissionDenied, match="credentials"):
            await call
    with pytest.raises(PermissionDenied, match="credentials"):
        await read(make_artifacts(blobs), sha256(data))
    assert await read(right, sha256(data)) == data  # Not taken for damaged.


async def test_the_bucket_is_gone(weed: WeedProcess, make_artifacts: MakeArtifacts) -> None:
    bucket = f"gone-{uuid.uuid4().hex[:12]}"
    weed.make_bucket(bucket)
    blobs = ObjectBlobs(weed.store(f"s3://{bucket}/prefix"))
    artifacts = make_artifacts(blobs)
    data, later = os.urandom(LARGE), os.urandom(LARGE)
    await artifacts.put(await uploaded(data))
    weed.drop_bucket(bucket)

    with pytest.raises(FailedPrecondition, match="bucket does not exist"):
        await read(artifacts, sha256(data))
    with pytest.raises(FailedPrecondition, match="bucket does not exist"):
        await artifacts.put(await uploaded(later))
    with pytest.raises(FailedPrecondition, match="bucket does not exist"):
        await anext(blobs.list("artifacts"))

    weed.make_bucket(bucket)
    # Known, and not marked as damaged: only now it is certain that the bytes are lost.
    assert sha256(data) in await artifacts.find([sha256(data)])
    assert (await artifacts.stat(sha256(later)))[1] == len(later)  # What was uploaded in vain is not uploaded twice.
    await artifacts.put(await uploaded(later, offset=len(later)))
    assert await read(artifacts, sha256(later)) == later
    with pytest.raises(DataLoss, match="missing"):
        await read(artifacts, sha256(data))


@pytest.fixture
async def network(weed: WeedProcess) -> AsyncIterator[Network]:
    async with Network(weed.endpoint).open() as network:
        yield network


async def test_a_slow_network(weed: WeedProcess, network: Network, make_artifacts: MakeArtifacts) -> None:
    artifacts = make_artifacts(ObjectBlobs(weed.store(weed.prefix(), endpoint=network.endpoint)))
    network.pause_s = 0.002  # 30 MB/s at most, on each connection.
    data = os.urandom(LARGE)
    await artifacts.put(await uploaded(data))
    assert await read(artifacts, sha256(data)) == data


async def test_a_network_that_stands_still(
    s3_access: WeedProcess, network: Network, make_artifacts: MakeArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", network.endpoint)
    # A request as short as that fails soon; the retries after it end with their own limit.
    store = open_object_store(s3_access.prefix(), request=timedelta(seconds=2))
    artifacts = make_artifacts(ObjectBlobs(store))
    data = os.urandom(3 << 20)
    await artifacts.put(await uploaded(data))
    network.passing.clear()
    with pytest.raises(Unavailable, match="retry"):
        await read(artifacts, sha256(data))
    network.passing.set()
    assert await read(artifacts, sha256(data)) == data


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_bytes_that_change_on_the_way_up(
    s3_access: WeedProcess, network: Network, make_artifacts: MakeArtifacts, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", network.endpoint)
    artifacts = make_artifacts(ObjectBlobs(open_object_store(s3_access.prefix())))
    mark = os.urandom(16)
    data = os.urandom(size) + mark + os.urandom(size)
    network.spoils = mark
    with pytest.raises(ShoalError):
        await artifacts.put(await uploaded(data))
    assert await artifacts.find([sha256(data)]) == {}
    network.spoils = b""
    await artifacts.put(await uploaded(data, offset=(await artifacts.stat(sha256(data)))[1]))
    assert await read(artifacts, sha256(data)) == data


async def test_the_object_store_is_killed_in_the_middle_of_an_upload(
    tmp_path: Path, make_artifacts: MakeArtifacts
) -> None:
    with WeedProcess(tmp_path / "weed") as weed:
        weed.wait_until_ready()
        async with Network(weed.endpoint).open() as network:
            artifacts = make_artifacts(ObjectBlobs(weed.store(weed.prefix(), endpoint=network.endpoint)))
            before, data = os.urandom(LARGE), os.urandom(4 * LARGE)
            await artifacts.put(await uploaded(before))
            network.passed, network.pause_s = 0, 0.005
            call = asyncio.create_task(artifacts.put(await uploaded(data)))
            await until(lambda: network.passed > LARGE, "a part of it is there")
            weed.kill()
            network.pause_s = 0.0
            with pytest.raises(Unavailable, match="retry"):
                await call
            assert (await artifacts.stat(sha256(data)))[1] == len(data)  # All of it is kept here.
            weed.start()
            weed.wait_until_ready()
            await artifacts.put(await uploaded(data, offset=len(data)))
            for there in (before, data):
                assert await read(artifacts, sha256(there)) == there
