"""Versions that come and go while they are called."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from services.infer.core import InferenceServer
from services.infer.model_files.wanted_models import ModelFiles, WantedModel, WantedVersion
from services.infer.models import models as models_module
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.models.version import State
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.onnx_session import OnnxSession
from services.infer.scheduling.queue import QueueLimits
from shoal.errors import NotFound, Unavailable
from tests.breakable import PATIENCE_S, until
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request

X = floats([1, 2, 3, 4])


class Files:
    """Where versions come from: files of a folder, which can be held back, or fail."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.opened: list[int] = []
        self.closed: list[int] = []

    def version(self, number: int, model: onnx.ModelProto | None = None, *, digest: str = "") -> WantedVersion:
        folder = self.root / f"{number}{digest}"
        if model is not None:
            folder.mkdir(parents=True)
            onnx.save(model, folder / "model.onnx")
        return WantedVersion(number, digest or str(number), partial(self.open, number, folder))

    @asynccontextmanager
    async def open(self, number: int, folder: Path):
        self.opened.append(number)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        yield ModelFiles(None, folder, "model.onnx")
        self.closed.append(number)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
async def models():
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits())) as models:
        yield models


def wanted(*versions: WantedVersion, stable: int | None = None, available: tuple[int, ...] = ()) -> WantedModel:
    return WantedModel("m", versions, frozenset({v.version for v in versions} | set(available)), stable)


def states(models: Models) -> dict[int | None, str]:
    return {row.version: row.state.value for row in models.index()}


async def version_and_factor(models: Models, version: str = "") -> tuple[str, float]:
    response = await InferenceServer(models, "r").infer(request("m", version=version, x=X))
    return response.model_version, float(output(response, "y")[0, 0])


async def test_a_version_that_loads_is_not_served_yet(models, files):
    files.gate.clear()
    assert not models.is_ready()
    models.want([wanted(files.version(1, onnx_files.scale(2)))])
    await until(lambda: states(models) == {1: "LOADING"})
    assert not models.is_ready()
    with pytest.raises(Unavailable, match="'m' has no version that is ready"):
        models.find("m", "")
    with pytest.raises(Unavailable, match=r"'m' version 1 is not ready \(LOADING\)"):
        models.find("m", "1")
    files.gate.set()
    await models.settled()
    assert models.is_ready()
    assert await version_and_factor(models) == ("1", 2.0)
    await until(lambda: models.ready_set.value == (("m", (1,), False, ""),))


async def test_a_new_version_takes_over_without_a_failed_call(models, files):
    one, two = files.version(1, onnx_files.scale(1)), files.version(2, onnx_files.scale(2))
    models.want([wanted(one)])
    await models.settled()
    stop, seen = asyncio.Event(), set()

    async def caller() -> None:
        while not stop.is_set():
            version, value = await version_and_factor(models)
            assert value == float(version)
            seen.add(version)

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    files.gate.clear()
    models.want([wanted(two, available=(1,))])
    await until(lambda: 2 in files.opened)
    assert states(models) == {1: "READY", 2: "LOADING"}
    await until(lambda: "1" in seen)
    files.gate.set()
    await until(lambda: "2" in seen)
    await until(lambda: states(models) == {2: "READY"})
    await until(lambda: files.closed == [1])
    stop.set()
    await asyncio.gather(*callers)
    with pytest.raises(NotFound):
        models.find("m", "1")


async def test_the_loads_of_a_tenant_leave_a_place_to_others(models, files):
    files.gate.clear()
    flood = [replace(files.version(n, onnx_files.scale(2)), tenant="flood") for n in range(1, 9)]
    other = replace(files.version(99, onnx_files.scale(2)), tenant="other")
    models.want([replace(wanted(version), name=f"m{version.version}") for version in flood])
    await until(lambda: files.opened != [])
    models.want_one(replace(wanted(other), name="other"))
    await until(lambda: 99 in files.opened)
    cores = len(os.sched_getaffinity(0))
    assert len(files.opened) <= min(cores, 8) + 1
    files.gate.set()
    await models.settled()
    assert len(models.names()) == 9


async def test_the_load_of_a_model_that_is_removed_ends(models, files):
    models.want([wanted(files.version(1, onnx_files.endless()))])
    await until(lambda: files.opened == [1])
    # Its thread runs, and would for ten minutes.
    await asyncio.sleep(0.5)
    models.want([])
    await until(lambda: not models.knows("m"))


async def test_a_version_that_fails_does_not_take_the_old_one_away(models, files):
    one, two = files.version(1, onnx_files.scale(1)), files.version(2, onnx_files.unservable())
    models.want([wanted(one)])
    await models.settled()
    models.want([wanted(two, available=(1,))])
    await models.settled()
    assert states(models) == {1: "READY", 2: "UNAVAILABLE"}
    assert not models.is_ready()
    assert await version_and_factor(models) == ("1", 1.0)
    # When it is taken back, all is well again; when the old one is removed too, nothing is left.
    models.want([wanted(one)])
    await models.settled()
    assert states(models) == {1: "READY"}
    assert models.is_ready()
    models.want([wanted(two)])
    await until(lambda: states(models) == {2: "UNAVAILABLE"})


async def test_the_alias_decides_for_calls_that_name_no_version(models, files):
    one, two = files.version(1, onnx_files.scale(1)), files.version(2, onnx_files.scale(2))
    models.want([wanted(one, two, stable=1)])
    await models.settled()
    assert await version_and_factor(models) == ("1", 1.0)
    assert await version_and_factor(models, "2") == ("2", 2.0)
    models.want([wanted(one, two, stable=2)])
    assert await version_and_factor(models) == ("2", 2.0)
    models.want([wanted(one, two)])
    assert await version_and_factor(models) == ("2", 2.0)


async def test_an_alias_of_a_version_that_is_not_ready_leaves_the_newest(models, files):
    one, two = files.version(1, onnx_files.scale(1)), files.version(2, onnx_files.unservable())
    models.want([wanted(one, two, stable=2)])
    await models.settled()
    assert await version_and_factor(models) == ("1", 1.0)


async def test_a_removed_model_finishes_its_calls_and_frees_its_files(models, files):
    models.want([wanted(files.version(1, onnx_files.scale(1)))])
    await models.settled()
    with models.use("m", "") as version:
        models.want([])
        with pytest.raises(NotFound):
            models.find("m", "")
        await until(lambda: version.state is State.UNLOADING)
        assert states(models) == {1: "UNLOADING"}
        assert files.closed == []
        # The call that held it is completed.
        assert version.scheduler is not None
    await until(lambda: files.closed == [1])
    await until(lambda: models.index() == [])
    assert models.is_ready()
    await until(lambda: models.ready_set.value == ())


async def test_changes_shortly_after_each_other_are_published_together(models, files, monkeypatch):
    monkeypatch.setattr(models_module, "_LONGEST_PAUSE_S", 1000.0)
    monkeypatch.setattr(models_module, "_PAUSE_SHARE", 1e15)
    published: list[tuple] = []

    async def follow() -> None:
        async for ready in models.ready_set.follow():
            published.append(tuple(name for name, *_ in ready))

    following = asyncio.create_task(follow())
    version = files.version(1, onnx_files.scale())
    names = [f"m{number}" for number in range(5)]
    try:
        for name in names:
            await models.want_one(WantedModel(name, (version,), frozenset({1}))).is_settled.wait()
        models.want([WantedModel(name, (version,), frozenset({1})) for name in names])
        assert models.names() == names
        assert not any(published), "the first publication precedes the loads, and a pause of 1000 s follows"
        await models.settled()
        await until(lambda: published[-1] == tuple(names))
        assert len(published) == 2
    finally:
        following.cancel()


async def test_other_content_under_the_same_number_is_another_version(models, files):
    models.want([wanted(files.version(1, onnx_files.scale(1), digest="a"))])
    await models.settled()
    models.want([wanted(files.version(1, onnx_files.scale(5), digest="b"))])
    await models.settled()
    assert await version_and_factor(models) == ("1", 5.0)
    await until(lambda: files.closed == [1])


async def test_files_that_could_not_be_had_are_asked_for_again(models, files):
    files.errors = [Unavailable("the store is away"), OSError(28, "No space left on device")]
    models.want([wanted(files.version(1, onnx_files.scale(3)))])
    await models.settled()
    assert states(models) == {1: "UNAVAILABLE"}
    assert "the store is away" in models.index()[0].reason
    await until(lambda: states(models) == {1: "READY"})
    assert files.opened == [1, 1, 1]
    assert await version_and_factor(models) == ("1", 3.0)


async def test_a_broken_model_is_not_tried_again_and_again(models, files):
    bad = wanted(files.version(1, onnx_files.unservable()))
    models.want([bad])
    await models.settled()
    models.want([wanted(*bad.versions, available=(7,))])
    await models.settled()
    assert files.opened == [1]


async def test_leaving_while_loading_waits_for_nobody(files):
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits())) as models:
        files.gate.clear()
        models.want([wanted(files.version(1, onnx_files.scale(1)))])
        await until(lambda: files.opened == [1])


async def test_many_models_come_and_go(models, files, tmp_path):
    kept = files.version(1, onnx_files.scale(2))
    for round_ in range(5):
        names = [f"m{n}" for n in range(round_, round_ + 6)]
        models.want([WantedModel(name, (kept,), frozenset({1})) for name in names])
        await models.settled()
        assert models.is_ready()
        await until(lambda names=names: models.names() == sorted(names))
        core = InferenceServer(models, "r")
        responses = await asyncio.gather(*(core.infer(request(name, x=X)) for name in names))
        for response in responses:
            np.testing.assert_array_equal(output(response, "y"), 2 * X)


async def test_leaving_ends_in_time_although_a_request_runs_on(files, monkeypatch):
    # The time of a stop is over already.
    monkeypatch.setattr("services.infer.models.models._MIN_DRAIN_S", 0.0)
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits(), drain_ms=600_000)) as models:
        models.want([wanted(files.version(1, onnx_files.slow(20_000)))])
        await models.settled()
        calls = [asyncio.create_task(version_and_factor(models)) for _ in range(3)]
        # Its caller leaves, and the run goes on.
        calls.append(asyncio.create_task(version_and_factor(models)))
        version = models.find("m", "")
        await until(lambda: version._users == 4)
        calls.pop().cancel()
        models.stop_by(time.monotonic(), time.monotonic())
    assert [type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True)] == [Unavailable] * 3
    assert states(models) == {}


async def test_leaving_ends_in_time_although_the_clean_up_of_a_model_runs_on(files, monkeypatch):
    monkeypatch.setattr("services.infer.models.models._MIN_END_S", 0.0)
    may_end, has_ended = threading.Event(), threading.Event()
    monkeypatch.setattr(OnnxSession, "close", lambda session: (may_end.wait(PATIENCE_S), has_ended.set()))
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits(), drain_ms=600_000)) as models:
        models.want([wanted(files.version(1, onnx_files.scale(2)))])
        await models.settled()
        # The clean-up begins in this time, in a thread, and does not end in it.
        models.stop_by(time.monotonic(), time.monotonic() + 3)
    assert not has_ended.is_set()
    may_end.set()
    assert await asyncio.to_thread(has_ended.wait, PATIENCE_S)


async def test_a_new_version_does_not_cut_the_requests_of_the_old_one(files):
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits(), drain_ms=0)) as models:
        models.want([wanted(files.version(1, onnx_files.slow(3_000)))])
        await models.settled()
        call = asyncio.create_task(version_and_factor(models))
        old = models.find("m", "")
        await until(lambda: old._users == 1)
        models.want([wanted(files.version(2, onnx_files.scale(3)))])
        await models.settled()
        assert (await version_and_factor(models))[0] == "2"
        assert (await call)[0] == "1"
