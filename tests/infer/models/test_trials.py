"""Trial loads: a version is loaded, warmed and unloaded beside the served ones, and nothing of it stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.rpc.places import Places
from services.infer.loading import privileges
from services.infer.model_files.wanted_models import WantedVersion
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.models.trials import Trials
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from shoal.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted, Unavailable
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.models.test_models import Files, states, version_and_factor, wanted


class World:
    """Served models, and trials whose files come from a folder, after `gate` is open."""

    def __init__(self, models: Models, trials: Trials, files: Files) -> None:
        self.models, self.trials, self.files = models, trials, files
        self.versions: dict[str, WantedVersion] = {}
        self.entered = 0
        trials.bind(self._source)

    @asynccontextmanager
    async def _source(self, model: store_pb2.ModelVersion, caller: bytes) -> AsyncIterator[WantedVersion]:
        self.entered += 1
        yield self.versions[model.name]

    def has(self, name: str, model: Any, *, number: int = 1) -> None:
        self.versions[name] = self.files.version(number, model, digest=f"trial-{name}")

    async def tried(self, name: str, **options: Any) -> int:
        """Try a model; return the number of messages that it has begun."""
        return len([None async for _ in self.trials.run(store_pb2.ModelVersion(name=name), **options)])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
async def world(files: Files) -> AsyncIterator[World]:
    context = LoadContext.of(OnnxRuntime(), QueueLimits())
    async with Models(context) as models, Trials(context, models, limit_s=30) as trials:
        yield World(models, trials, files)


async def test_a_trial_changes_nothing_of_what_is_served(world: World) -> None:
    world.models.want([wanted(world.files.version(1, onnx_files.scale(3)))])
    await world.models.settled()
    world.has("m", onnx_files.scale(5), number=2)
    world.has("other", onnx_files.scale(5))
    before = world.models.index(), world.models.awaited.value, world.models.ready_set.value
    for name in ("m", "other"):
        assert await world.tried(name) == 1
    assert (world.models.index(), world.models.awaited.value, world.models.ready_set.value) == before
    assert await version_and_factor(world.models) == ("1", 3.0)
    assert not world.models.knows("other")
    assert world.files.closed == [2, 1]


async def test_a_version_that_cannot_be_loaded_has_a_reason_and_holds_no_slot(world: World) -> None:
    world.has("bad", onnx_files.unservable())
    world.has("good", onnx_files.scale(2))
    for _ in range(3):
        with pytest.raises(FailedPrecondition) as refused:
            await world.tried("bad")
        assert refused.value.message
    await world.tried("good")


async def test_a_model_with_code_is_tried_for_callers_that_may_run_code(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise FailedPrecondition("it runs code")

    monkeypatch.setattr(privileges, "check", refuse)
    world.has("m", onnx_files.scale(2))
    with pytest.raises(FailedPrecondition, match="it runs code"):
        await world.tried("m", allow_code=False)
    await world.tried("m", allow_code=True)


async def test_a_trial_reaches_another_server_only_for_callers_that_may_run_code(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "backend", "remote")
    world.has("m", onnx_files.scale(2))
    with pytest.raises(FailedPrecondition, match="reaches an address"):
        await world.tried("m", allow_code=False)


async def test_a_trial_whose_caller_leaves_frees_its_slot(world: World) -> None:
    world.has("m", onnx_files.scale(2))
    world.files.gate.clear()
    trial = asyncio.create_task(world.tried("m"))
    await until(lambda: world.files.opened == [1], "the trial opens its files")
    trial.cancel()
    await asyncio.wait({trial})
    world.files.gate.set()
    assert await world.tried("m") == 1


async def test_too_many_trials_are_refused_while_one_hangs(world: World) -> None:
    world.trials._places = Places(3, "trial loads")
    world.has("m", onnx_files.scale(2))
    world.files.gate.clear()
    waiting = [asyncio.create_task(world.tried("m")) for _ in range(3)]
    await until(lambda: world.entered == 3, "all trials wait")
    with pytest.raises(ResourceExhausted) as refused:
        await world.tried("m")
    assert refused.value.retry_after_ms
    # A registered model is loaded meanwhile.
    world.files.gate.set()
    world.models.want([wanted(world.files.version(7, onnx_files.scale(3)))])
    await world.models.settled()
    assert states(world.models) == {7: "READY"}
    await asyncio.gather(*waiting)


async def test_a_trial_of_a_model_that_never_ends_is_over_when_its_caller_leaves(world: World) -> None:
    world.has("endless", onnx_files.endless())
    world.has("good", onnx_files.scale(2))
    trial = asyncio.create_task(world.tried("endless"))
    await until(lambda: world.files.opened == [1], "the trial opens its files")
    # A trial that only waits for a slot has not begun.
    await asyncio.sleep(0.5)
    trial.cancel()
    await asyncio.wait({trial})
    assert await asyncio.wait_for(world.tried("good"), 30) == 1


async def test_the_trials_of_a_tenant_leave_a_slot_to_others(world: World) -> None:
    for n in range(64):
        world.has(f"m{n}", onnx_files.scale(2))
    world.files.gate.clear()
    flood = [asyncio.create_task(world.tried(f"m{n}", tenant="flood")) for n in range(64)]
    await until(lambda: world.files.opened != [], "trials run")
    refused = [each for each in flood if each.done()]
    # Two thirds of the places are a tenant's.
    assert 20 <= len(refused) <= 22
    assert all(isinstance(each.exception(), ResourceExhausted) for each in refused)
    world.has("other", onnx_files.scale(2), number=99)
    other = asyncio.create_task(world.tried("other", tenant="other"))
    await until(lambda: 99 in world.files.opened, "the other tenant's trial runs")
    world.files.gate.set()
    assert await other == 1
    await asyncio.gather(*flood, return_exceptions=True)


async def test_a_trial_has_a_time_limit(files: Files) -> None:
    context = LoadContext.of(OnnxRuntime(), QueueLimits())
    async with Models(context) as models, Trials(context, models, limit_s=0.2) as trials:
        world = World(models, trials, files)
        world.has("m", onnx_files.scale(2))
        files.gate.clear()
        with pytest.raises(DeadlineExceeded, match=r"the trial load of m took more than 0\.2 s"):
            await world.tried("m")


async def test_an_instance_that_starts_tries_nothing() -> None:
    context = LoadContext.of(OnnxRuntime(), QueueLimits())
    async with Models(context) as models, Trials(context, models, limit_s=30) as trials:
        with pytest.raises(Unavailable, match="this instance is starting"):
            [None async for _ in trials.run(store_pb2.ModelVersion(name="m"))]


async def test_models_are_awaited_until_they_are_ready_or_given_up(world: World) -> None:
    models, files = world.models, world.files
    assert models.awaited.value is None
    files.gate.clear()
    models.want([wanted(files.version(1, onnx_files.scale(1)))])
    await until(lambda: models.awaited.value == ("m",), "it is awaited while it loads")
    files.gate.set()
    await until(lambda: models.awaited.value == (), "it is ready")
    # A new version beside a serving one, and a file that is broken for good: nobody waits for them.
    files.gate.clear()
    models.want([wanted(files.version(2, onnx_files.unservable()), available=(1,))])
    await until(lambda: 2 in files.opened, "the new version loads")
    assert models.awaited.value == ()
    files.gate.set()
    await models.settled()
    models.want([])
    await until(lambda: not models.knows("m"), "it is gone")
    models.want([wanted(files.version(3, onnx_files.unservable()))])
    await models.settled()
    await until(lambda: models.awaited.value == (), "it is broken")
    files.errors = [OSError("the store is away")]
    files.gate.clear()
    models.want([wanted(files.version(4, onnx_files.scale(4)))])
    await until(lambda: models.awaited.value == ("m",), "it may come")
    files.gate.set()
    await until(lambda: models.awaited.value == (), "it came")
