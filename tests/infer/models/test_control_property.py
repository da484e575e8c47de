"""Any sequence of loads, overrides, unloads and changes of the folder: what serves is always what the last good word
said, and calls never fail while anything serves."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from services.infer.core import InferenceServer
from services.infer.models.control import Control
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources.repository import look, scan
from shoal.errors import Internal, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

X = floats([1, 2, 3, 4])


class Bench:
    """A model `m`, and what should be true of it."""

    def __init__(self, root: Path, models: Models, control: Control, chance: random.Random) -> None:
        self.root, self.models, self.control, self.chance = root, models, control, chance
        self.core = InferenceServer(models, "r", control=control)
        self.serves: float | None = None
        self.folder: float | None = None
        """What the model in the folder multiplies by; None: it is broken."""
        self.factors = iter(range(2, 10_000))

    async def served_factor(self) -> float | None:
        try:
            return float(output(await self.core.infer(request("m", x=X)), "y")[0, 0])
        except (NotFound, Unavailable):
            return None

    async def change(self) -> None:
        self.folder = None if self.chance.random() < 0.3 else float(next(self.factors))
        data = onnx_files.scale(self.folder).SerializeToString() if self.folder else os.urandom(20)
        draft = self.root / "draft"
        draft.write_bytes(data)
        draft.rename(self.root / "m/1/model.onnx")

    async def load(self) -> None:
        try:
            await self.core.load_model(pb.RepositoryModelLoadRequest(model_name="m"))
            assert self.folder is not None
            self.serves = self.folder
        except InvalidArgument:
            assert self.folder is None

    async def override(self) -> None:
        asked = pb.RepositoryModelLoadRequest(model_name="m")
        asked.parameters["config"].string_param = f'{{"max_batch_size": {self.chance.randint(0, 8)}}}'
        factor = float(next(self.factors))
        is_good = self.chance.random() < 0.6
        data = onnx_files.scale(factor).SerializeToString() if is_good else b"?"
        for number in self.chance.sample(range(1, 5), self.chance.randint(1, 2)):
            asked.parameters[f"file:{number}/model.onnx"].bytes_param = data
        try:
            await self.core.load_model(asked)
            assert is_good
            self.serves = factor
        except InvalidArgument:
            assert not is_good

    async def nonsense(self) -> None:
        asked = pb.RepositoryModelLoadRequest(model_name=self.chance.choice(["m", "n"]))
        asked.parameters[self.chance.choice(["config", "file:1/x"])].string_param = "?"
        with pytest.raises((Internal, InvalidArgument)):
            await self.core.load_model(asked)

    async def unload(self) -> None:
        await self.core.unload_model(pb.RepositoryModelUnloadRequest(model_name="m"))
        self.serves = None

    async def step(self) -> None:
        steps: list[Callable] = [self.change, self.load, self.load, self.override, self.override, self.nonsense]
        await self.chance.choice([*steps, self.unload])()


@pytest.mark.parametrize("seed", range(6))
async def test_what_serves_is_what_was_said(models_folder: Repository, tmp_path: Path, seed: int):
    models_folder.put("m", onnx_files.scale(1))
    root, kept = models_folder.root, tmp_path / "kept"
    kept.mkdir()
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits())) as models:
        async with Control(models, partial(look, root), folder=kept) as control:
            control.offer(scan(root))
            await models.settled()
            bench = Bench(root, models, control, random.Random(seed))
            bench.serves = bench.folder = 1.0
            for _ in range(40):
                await bench.step()
                assert await bench.served_factor() == bench.serves
                await until(lambda: len(os.listdir(kept)) <= 1)
    assert os.listdir(kept) == []


@pytest.mark.parametrize("seed", range(3))
async def test_calls_never_fail_while_words_are_said(models_folder: Repository, tmp_path: Path, seed: int):
    models_folder.put("m", onnx_files.scale(1))
    root = models_folder.root
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits())) as models:
        async with Control(models, partial(look, root), folder=tmp_path) as control:
            control.offer(scan(root))
            await models.settled()
            bench = Bench(root, models, control, random.Random(seed))
            bench.folder = 1.0
            stop, said = asyncio.Event(), 0

            async def caller() -> None:
                nonlocal said
                while not stop.is_set():
                    assert await bench.served_factor() is not None
                    said += 1

            callers = [asyncio.create_task(caller()) for _ in range(4)]
            words = (bench.load, bench.override, bench.nonsense, bench.change)
            for _ in range(5):
                tasks = [asyncio.ensure_future(bench.chance.choice(words)()) for _ in range(6)]
                # Words that are said at the same time may overrule each other, and judge a folder that changes.
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    assert outcome is None or isinstance(outcome, ShoalError | AssertionError)
            stop.set()
            await asyncio.gather(*callers)
            assert said
