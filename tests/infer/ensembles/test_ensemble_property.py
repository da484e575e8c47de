"""Any graph of steps gives what the same sums give when they are worked out one by one."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.infer.core import InferenceServer
from services.infer.models.control import Control
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources import repository
from shoal.errors import Internal, InvalidArgument, NotFound, Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import Repository, output, request
from tests.infer.ensembles.conftest import parameter, step, tensor, written
from tests.infer.mutation import mutated
from tests.long_form import by_form

MODELS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "double": lambda x: {"y": 2 * x},
    "triple": lambda x: {"y": 3 * x},
    "add": lambda a, b: {"sum": a + b, "difference": a - b},
}
INPUTS = {"double": ("x",), "triple": ("x",), "add": ("a", "b")}
OUTPUTS = {"double": ("y",), "triple": ("y",), "add": ("sum", "difference")}
EXPECTED = (InvalidArgument, NotFound, Unavailable, Internal)


class Served:
    """A core that lives as long as the module's tests, in a loop of its own."""

    def __init__(self, root) -> None:
        self.root, self.loop, self.stack = root, asyncio.new_event_loop(), AsyncExitStack()
        self.count = 0
        folder = Repository(root)
        folder.bare("double", onnx_files.scale(2.0, dims=("n", 4)))
        folder.bare("triple", onnx_files.scale(3.0, dims=("n", 4)))
        folder.bare("add", onnx_files.add())

    async def start(self) -> None:
        self.models = await self.stack.enter_async_context(Models(LoadContext.of(OnnxRuntime(), QueueLimits())))
        control = Control(self.models, partial(repository.look, self.root))
        self.control = await self.stack.enter_async_context(control)
        self.core = InferenceServer(self.models, "test/infer-0", control=self.control)
        self.control.offer(repository.scan(self.root))
        await self.models.settled()

    async def load(self, text: str) -> str:
        """Loads another ensemble; returns its name."""
        self.count += 1
        name = f"e{self.count}"
        asked = pb.RepositoryModelLoadRequest(model_name=name)
        (self.root / name / "1").mkdir(parents=True)
        (self.root / name / "config.pbtxt").write_text(text)
        await self.core.load_model(asked)
        return name


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("models"))
    made.loop.run_until_complete(made.start())
    yield made
    made.loop.run_until_complete(made.stack.aclose())
    made.loop.close()


@st.composite
def graphs(draw) -> list[tuple[str, list[str], list[str], str]]:
    """Steps: model, the tensors it takes, those it gives, and its condition. In an order that can be followed."""
    known, steps = ["in0", "in1"], []
    for n in range(draw(st.integers(1, 7))):
        model = draw(st.sampled_from(sorted(MODELS)))
        takes = [draw(st.sampled_from(known)) for _ in INPUTS[model]]
        gives = [f"t{n}_{k}" for k in range(len(OUTPUTS[model]))]
        when = ""
        if draw(st.integers(0, 3)) == 0:
            sign = draw(st.sampled_from([">", "<="]))
            when = f"count({draw(st.sampled_from(known))}) {sign} {draw(st.integers(0, 3))}"
        steps.append((model, takes, gives, when))
        known += gives
    return steps


def reference(steps, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    """Every tensor; None: skipped."""
    values: dict[str, np.ndarray | None] = dict(inputs)
    for model, takes, gives, when in steps:
        given = [values[name] for name in takes]
        if any(value is None for value in given) or not holds(when, values):
            values.update(dict.fromkeys(gives))
        else:
            values.update(zip(gives, MODELS[model](*given).values(), strict=True))
    return values


def holds(when: str, values: dict[str, np.ndarray | None]) -> bool:
    if not when:
        return True
    counted, sign, number = when.split()
    value = values[counted.removeprefix("count(").removesuffix(")")]
    return value is not None and (len(value) > int(number) if sign == ">" else len(value) <= int(number))


def text_of(steps, order: list[int]) -> str:
    used = {name for _, takes, _, when in steps for name in (*takes, when.partition(")")[0].removeprefix("count("))}
    inputs = [name for name in ("in0", "in1") if name in used]
    more = "max_batch_size: 8 " + "".join(tensor("input", name) for name in inputs)
    more += "".join(tensor("output", name) for _, _, gives, _ in steps for name in gives)
    more += "".join(parameter(f"when.{order.index(n)}", s[3]) for n, s in enumerate(steps) if s[3])
    lines = [
        step(model, dict(zip(INPUTS[model], takes, strict=True)), dict(zip(OUTPUTS[model], gives, strict=True)))
        for model, takes, gives, _ in (steps[n] for n in order)
    ]
    return written(*lines, more=more)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=graphs(), rows=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_any_graph(served, steps, rows, data):
    order = data.draw(st.permutations(range(len(steps))))
    rng = np.random.default_rng(len(steps))

    async def ask(name: str, count: int) -> None:
        signature = served.models.find(name, "").loaded.model.signature
        inputs = {spec.name: rng.integers(-8, 8, (count, 4)).astype(np.float32) for spec in signature.inputs}
        everything = {"in0": np.zeros((count, 4), np.float32), "in1": np.zeros((count, 4), np.float32), **inputs}
        values = reference(steps, everything)
        asked = request(name, **inputs)
        wanted = [spec.name for spec in signature.outputs if values[spec.name] is not None]
        for output_name in wanted or [signature.outputs[0].name]:
            asked.outputs.add(name=output_name)
        if not wanted:
            with pytest.raises(InvalidArgument, match="was skipped for this request"):
                await served.core.infer(asked)
            return
        response = await served.core.infer(asked)
        for output_name in wanted:
            assert np.array_equal(output(response, output_name), values[output_name])

    async def check() -> None:
        name = await served.load(text_of(steps, list(order)))
        await asyncio.gather(*(ask(name, count) for count in rows))
        await served.control.unload(pb.RepositoryModelUnloadRequest(model_name=name))

    served.loop.run_until_complete(check())


@settings(
    max_examples=by_form(60, 150),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=graphs(), seed=st.integers(0, 2**32))
def test_bad_ensembles_are_refused_and_harm_nobody(served, steps, seed):
    text = spoiled(random.Random(seed), text_of(steps, list(range(len(steps)))))
    x = np.ones((2, 4), np.float32)

    async def check() -> None:
        asked = request("e", in0=x, in1=x)
        with suppress(*EXPECTED):
            asked.model_name = await served.load(text)
            await served.core.infer(asked)
        assert np.array_equal(output(await served.core.infer(request("double", x=x)), "y"), 2 * x)

    served.loop.run_until_complete(check())


def spoiled(rng: random.Random, text: str) -> str:
    """A configuration whose names and numbers were mixed up, and at times its bytes."""
    words = re.split(r"(\w+)", text)
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(1, len(words), 2), rng.randrange(1, len(words), 2)
        words[at] = rng.choice([words[other], "", "0", "-1", "999999999999", "e1"])
    data = "".join(words).encode()
    return (mutated(rng, [data], 1) if rng.random() < 0.2 else data).decode("utf-8", "replace")
