"""The store's registry followed: snapshots, breaks, a start without the store."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager

import pytest

from services.infer.model_files.wanted_models import WantedModel
from services.infer.sources.cache import Cache
from services.infer.sources.registry import Registry
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.clocks import Seconds


class Store:
    """A store that a test speaks for. It breaks when it is given an error."""

    def __init__(self) -> None:
        self.said: asyncio.Queue = asyncio.Queue()
        self.artifacts: dict[str, bytes] = {}
        self.watches = 0

    async def watch(self):
        self.watches += 1
        while True:
            word = await self.said.get()
            if isinstance(word, Exception):
                raise word
            if word is None:
                return
            yield pb.WatchModelsResponse(snapshot=word)

    async def read(self, sha256: str, offset: int):
        if sha256 not in self.artifacts:
            raise Unavailable("the store is away")
        yield self.artifacts[sha256][offset:]

    def file(self, path: str, data: bytes) -> pb.ModelFile:
        sha256 = hashlib.sha256(data).hexdigest()
        self.artifacts[sha256] = data
        return pb.ModelFile(path=path, sha256=sha256, size_bytes=len(data))


def version(name: str, number: int, *files: pb.ModelFile, aliases: tuple[str, ...] = ()) -> pb.ModelVersion:
    return pb.ModelVersion(name=name, version=number, files=files, content_digest=f"{name}{number}", aliases=aliases)


class Bench:
    def __init__(self, root) -> None:
        self.store = Store()
        self.cache = Cache(root, "infer-0", self.store)
        self.cache.start()
        self.heard: list[list[WantedModel]] = []
        self.clock = Seconds()
        self.registry = Registry(self.store, self.cache, self.heard.append, self.clock)

    @asynccontextmanager
    async def following(self):
        task = asyncio.create_task(self.registry.follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def wanted(self) -> dict[str, tuple[int, ...]]:
        return {model.name: tuple(v.version for v in model.versions) for model in self.heard[-1]} if self.heard else {}


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


async def test_each_snapshot_is_what_is_wanted(bench):
    async with bench.following():
        bench.store.said.put_nowait([version("a", 1), version("b", 1), version("a", 2)])
        await until(lambda: bench.wanted() == {"a": (2,), "b": (1,)})
        assert bench.registry.is_tried.is_set()
        assert bench.heard[-1][0].available == {1, 2}
        bench.store.said.put_nowait([version("a", 1, aliases=("stable",)), version("a", 2)])
        await until(lambda: bench.wanted() == {"a": (1, 2)})
        assert bench.heard[-1][0].stable == 1
        bench.store.said.put_nowait([])
        await until(lambda: bench.wanted() == {})


async def test_the_newest_versions_configuration_picks(bench):
    policy = bench.store.file("../config.pbtxt", b"version_policy { all {} }")
    async with bench.following():
        bench.store.said.put_nowait([version("a", 1), version("a", 2, policy)])
        await until(lambda: bench.wanted() == {"a": (1, 2)})
        nonsense = bench.store.file("../config.pbtxt", b"what is this")
        bench.store.said.put_nowait([version("a", 1), version("a", 2, policy), version("a", 3, nonsense)])
        await until(lambda: bench.wanted() == {"a": (3,)})
        nothing = bench.store.file("../config.pbtxt", b"version_policy { specific { versions: [9] } }")
        bench.store.said.put_nowait([version("a", 4, nothing)])
        await until(lambda: bench.wanted() == {"a": ()})
        assert "selects none" in bench.heard[-1][0].problem


async def test_a_trial_waits_for_a_store_that_is_unavailable_for_a_moment(bench):
    data = b"a model"
    file = bench.store.file("model.onnx", data)
    del bench.store.artifacts[file.sha256]
    asyncio.get_running_loop().call_later(0.5, bench.store.artifacts.__setitem__, file.sha256, data)
    async with bench.registry.unregistered(version("a", 1, file)) as wanted:
        assert wanted.version == 1


async def test_a_watch_that_breaks_is_opened_again(bench):
    async with bench.following():
        bench.store.said.put_nowait([version("a", 1)])
        for word in (Unavailable("gone"), None, RuntimeError("a fault of ours")):
            bench.store.said.put_nowait(word)
        bench.store.said.put_nowait([version("a", 2)])
        await until(lambda: bench.wanted() == {"a": (2,)})
        assert bench.store.watches == 4


async def test_a_start_without_the_store_serves_what_was_known(bench, tmp_path):
    async with bench.following():
        bench.store.said.put_nowait([version("a", 3, aliases=("stable",))])
        await until(lambda: bench.wanted() == {"a": (3,)})
    await until(lambda: bench.cache.remembered() is not None)
    again = Bench(tmp_path)
    again.store.said.put_nowait(Unavailable("away"))
    async with again.following():
        await until(lambda: again.wanted() == {"a": (3,)})
        assert again.heard[-1][0].stable == 3
        again.store.said.put_nowait([version("a", 4)])
        await until(lambda: again.wanted() == {"a": (4,)})


async def test_a_first_start_without_the_store_waits_for_nobody(bench):
    bench.store.said.put_nowait(Unavailable("away"))
    async with bench.following():
        await until(bench.registry.is_tried.is_set)
        assert bench.heard == []


async def test_a_damaged_memory_is_left_out(bench):
    bench.cache.remember(b"\xff\xff\xff")
    async with bench.following():
        bench.store.said.put_nowait([version("a", 1)])
        await until(lambda: bench.wanted() == {"a": (1,)})
        assert len(bench.heard) == 1


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a" * 129])
async def test_a_name_that_is_none_is_left_out(bench, name):
    async with bench.following():
        bench.store.said.put_nowait([version("good", 1), version(name, 1), version("zero", 0)])
        await until(lambda: bench.wanted() == {"good": (1,)})


async def test_a_store_that_is_away_is_a_warning_after_the_start_and_after_a_snapshot(bench, caplog):
    def levels() -> list[str]:
        return [record.levelname for record in caplog.records if "cannot be watched" in record.message]

    async def breaks(count: int) -> None:
        bench.store.said.put_nowait(Unavailable("away"))
        await until(lambda: len(levels()) == count, f"break {count}")

    caplog.set_level("INFO", "services.infer.sources.registry")
    async with bench.following():
        await breaks(1)
        bench.clock.now += 31
        await breaks(2)
        assert levels() == ["INFO", "WARNING"]
    caplog.clear()
    async with bench.following():
        bench.store.said.put_nowait([version("a", 1)])
        await breaks(1)
        assert levels() == ["WARNING"]
