"""The cache of the store's files: whole and verified, resumed, shared, and proof against odd registries."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from services.infer.sources.cache import Cache
from shoal.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from tests.breakable import until

DATA = os.urandom(3_000_001)
SHA = hashlib.sha256(DATA).hexdigest()


class Source:
    """Sends artifacts in chunks; breaks or lies as it is told."""

    def __init__(self, **artifacts: bytes) -> None:
        self.artifacts = {hashlib.sha256(data).hexdigest(): data for data in artifacts.values()}
        self.reads: list[tuple[str, int]] = []
        self.break_after: int | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, sha256: str, offset: int):
        self.reads.append((sha256, offset))
        if sha256 not in self.artifacts:
            raise NotFound(f"no artifact {sha256}")
        data = self.artifacts[sha256][offset:]
        for at in range(0, len(data), 1 << 20):
            await self.gate.wait()
            if self.break_after is not None and offset + at >= self.break_after:
                raise Unavailable("the store is gone")
            yield data[at : at + (1 << 20)]


@pytest.fixture
def source() -> Source:
    return Source(data=DATA)


@pytest.fixture
def cache(tmp_path: Path, source: Source) -> Cache:
    cache = Cache(tmp_path / "cache", "infer-0", source)
    cache.start()
    return cache


def sibling(tmp_path: Path, source: Source) -> Cache:
    other = Cache(tmp_path / "cache", "infer-1", source)
    other.start()
    return other


async def test_a_file_is_fetched_once(cache, source):
    blob = await cache.fetch(SHA, len(DATA))
    assert blob.read_bytes() == DATA
    assert await cache.fetch(SHA, len(DATA)) == blob
    assert source.reads == [(SHA, 0)]


async def test_a_broken_download_goes_on_where_it_stopped(cache, source):
    source.break_after = 2 << 20
    with pytest.raises(Unavailable):
        await cache.fetch(SHA, len(DATA))
    source.break_after = None
    assert (await cache.fetch(SHA, len(DATA))).read_bytes() == DATA
    assert source.reads == [(SHA, 0), (SHA, 2 << 20)]


@pytest.mark.parametrize("what", ["other bytes", "too few", "too many"])
async def test_damaged_bytes_are_never_used(cache, source, what):
    right = source.artifacts[SHA]
    source.artifacts[SHA] = {
        "other bytes": DATA[:-1] + bytes([DATA[-1] ^ 1]),
        "too few": DATA[:-1],
        "too many": DATA + b"?",
    }[what]
    with pytest.raises(DataLoss, match=SHA):
        await cache.fetch(SHA, len(DATA))
    source.artifacts[SHA] = right
    # Whatever was left behind does not spoil the next try, or the one after.
    for _ in range(2):
        try:
            blob = await cache.fetch(SHA, len(DATA))
            break
        except DataLoss:
            continue
    assert blob.read_bytes() == DATA


async def test_a_file_that_went_bad_on_disk_is_fetched_again(cache, source):
    blob = await cache.fetch(SHA, len(DATA))
    blob.write_bytes(b"bad")
    assert (await cache.fetch(SHA, len(DATA))).read_bytes() == DATA
    assert len(source.reads) == 2


async def test_siblings_share_one_download(cache, source, tmp_path):
    other = sibling(tmp_path, source)
    source.gate.clear()
    tasks = [asyncio.ensure_future(c.fetch(SHA, len(DATA))) for c in (cache, other, cache)]
    await until(lambda: bool(source.reads))
    source.gate.set()
    assert {task.read_bytes() for task in await asyncio.gather(*tasks)} == {DATA}
    assert source.reads == [(SHA, 0)]


async def test_a_version_is_laid_out_as_in_a_repository(cache, source, tmp_path):
    config = b"max_batch_size: 3"
    source.artifacts[hashlib.sha256(config).hexdigest()] = config
    files = [
        ("model.onnx", SHA, len(DATA)),
        ("parts/weights.bin", SHA, len(DATA)),
        ("../config.pbtxt", hashlib.sha256(config).hexdigest(), len(config)),
    ]
    async with cache.open("m", 7, files) as folder, cache.open("m", 7, files) as again:
        assert folder != again
        assert (folder / "7/model.onnx").read_bytes() == (folder / "7/parts/weights.bin").read_bytes() == DATA
        assert (folder / "config.pbtxt").read_bytes() == config
    assert not folder.exists()
    async with cache.open("m", 7, files) as folder:
        sibling(tmp_path, source)
        assert folder.exists()
        cache.start()  # As the next process of this instance does, after a kill.
        assert not folder.exists()


async def test_a_version_without_files_of_its_own_has_a_folder(cache, source):
    async with cache.open("m", 3, [("../config.pbtxt", SHA, len(DATA))]) as folder:
        assert (folder / "3").is_dir()


@pytest.mark.parametrize(
    "path",
    ["", "..", "../", "/etc/passwd", "../../x", "a/../../x", "../a/../../x", "a\\b", "a\0b", "..//../x", "/../x"],
)
async def test_a_path_cannot_leave_the_models_folder(cache, path):
    with pytest.raises(FailedPrecondition, match="not inside a model's folder"):
        async with cache.open("m", 1, [(path, SHA, len(DATA))]):
            pass


async def test_a_path_is_named_once(cache, source):
    other = b"other"
    source.artifacts[hashlib.sha256(other).hexdigest()] = other
    twice = [("a", SHA, len(DATA)), ("./a", hashlib.sha256(other).hexdigest(), len(other))]
    with pytest.raises(FailedPrecondition, match="the file 'a' twice"):
        async with cache.open("m", 1, twice):
            pass
    assert (await cache.fetch(SHA, len(DATA))).read_bytes() == DATA


@pytest.mark.parametrize("sha256", ["", "../../x", SHA.upper(), SHA + "0"], ids=["empty", "path", "upper", "long"])
async def test_a_digest_must_be_one(cache, sha256):
    with pytest.raises(FailedPrecondition, match="no SHA-256 digest"):
        await cache.fetch(sha256, 1)


async def test_the_registry_is_remembered(cache, source, tmp_path):
    assert cache.remembered() is None
    cache.remember(b"one")
    cache.remember(b"two")
    assert sibling(tmp_path, source).remembered() == b"two"


async def test_what_no_model_needs_goes_after_a_week(cache, source):
    other = b"other"
    source.artifacts[hashlib.sha256(other).hexdigest()] = other
    kept, gone = await cache.fetch(SHA, len(DATA)), await cache.fetch(hashlib.sha256(other).hexdigest(), len(other))
    now = gone.stat().st_mtime
    cache.prune(frozenset({SHA}), now + 6 * 24 * 3600)
    assert gone.exists()
    cache.prune(frozenset({SHA}), now + 8 * 24 * 3600)
    assert (kept.exists(), gone.exists()) == (True, False)
