"""Overhead of an ensemble: the same models called one after the other, and as an ensemble.

    python bench/ensemble.py [--calls 2000] [--rounds 7]

Real ONNX models of a few microseconds (y = x + 1, [n,16]) in one process, without a network server. `steps` is the
least work of a caller without an ensemble: the callback of one scheduler starts the next call with the result, without
a task or a check. `ensemble` is one call. Rounds interleave both; figures are medians of rounds. `chain` calls one
model after the other; `fan` calls four models with the same tensor, and a fifth one with their outputs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.models.version import Version
from services.infer.requests import ragged
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.parameters import NONE
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, WantedOutput, key_of
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources import repository

MOST = 8
CHAINS = (1, 2, 4, 8)
IN_FLIGHT = (1, 8, 64)
FAN = 4


def save(root: Path) -> None:
    """Write the models next0..next7 (y = x + 1) and sum4, and the ensembles chainN and fan4."""
    dims = ("n", 16)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in "xy")
    one = numpy_helper.from_array(np.float32(1), "one")
    for n in range(MOST):
        _onnx(root / f"next{n}.onnx", [helper.make_node("Add", ["x", "one"], ["y"])], [x], y, [one])
    names = [f"x{n}" for n in range(FAN)]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in names]
    _onnx(root / "sum4.onnx", [helper.make_node("Sum", names, ["y"])], inputs, y, [])
    for count in CHAINS:
        _ensemble(root, f"chain{count}", [(f"next{n}", {"x": f"t{n}"}, f"t{n + 1}") for n in range(count)])
    fan: list[tuple[str, dict[str, str], str]] = [(f"next{n}", {"x": "t"}, f"x{n}") for n in range(FAN)]
    _ensemble(root, "fan4", [*fan, ("sum4", {name: name for name in names}, "y")])


def _onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
    weights: Sequence[onnx.TensorProto],
) -> None:
    graph = helper.make_graph(nodes, "bench", inputs, [output], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def _ensemble(root: Path, name: str, steps: Sequence[tuple[str, dict[str, str], str]]) -> None:
    text = 'platform: "ensemble" ensemble_scheduling {'
    for model, inputs, output in steps:
        maps = " ".join(f'input_map {{ key: "{key}" value: "{tensor}" }}' for key, tensor in inputs.items())
        text += (
            f'step {{ model_name: "{model}" model_version: -1 {maps} output_map {{ key: "y" value: "{output}" }} }}\n'
        )
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(text + "}")


@dataclass(frozen=True)
class Target:
    """A model version to call, with the requested outputs."""

    version: Version
    outputs: tuple[WantedOutput, ...]

    @classmethod
    def of(cls, version: Version) -> Target:
        return cls(version, tuple(WantedOutput(spec) for spec in version.loaded.model.signature.outputs))

    def call(self, **inputs: Value) -> InferenceRequest:
        size = sum(map(ragged.size_bytes, inputs.values()))
        key = key_of(inputs, self.outputs, self.version.loaded.model.signature)
        return InferenceRequest(inputs, self.outputs, 1, size, key, NONE)


class Caller:
    """Closed-loop caller: starts the next request in the loop iteration after a result, as a network server does."""

    is_direct = False
    writes = True

    def __init__(self, calls: int, expected: float) -> None:
        self.left, self.expected = calls, expected
        self.done = asyncio.Event()
        self.seconds: list[float] = []
        self.x = np.zeros((1, 16), np.float32)

    def go(self) -> None:
        self.began = time.perf_counter()
        self.ask()

    def ask(self) -> None:
        raise NotImplementedError

    def over(self, y: Value) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        assert y[0][0] == self.expected
        self.left -= 1
        if self.left > 0:
            asyncio.get_running_loop().call_soon(self.go)
        else:
            self.done.set()

    def failed(self, error: BaseException) -> None:
        raise error


class Whole(Caller):
    """Caller of one model or ensemble per request."""

    def __init__(self, calls: int, expected: float, to: Target) -> None:
        super().__init__(calls, expected)
        self.to = to
        self.input = to.version.loaded.model.signature.inputs[0].name

    def ask(self) -> None:
        self.to.version.scheduler.start(self.to.call(**{self.input: self.x}), time.monotonic() + 30, "", self)

    def succeeded(self, result: InferenceResult) -> None:
        self.over(result.outputs[0])


class Chain(Caller):
    """Caller of several models per request, one after the other."""

    def __init__(self, calls: int, expected: float, models: Sequence[Target]) -> None:
        super().__init__(calls, expected)
        self.models = models

    def ask(self) -> None:
        self.at = 0
        self.next(self.x)

    def next(self, x: Value) -> None:
        to = self.models[self.at]
        self.at += 1
        to.version.scheduler.start(to.call(x=x), time.monotonic() + 30, "", self)

    def succeeded(self, result: InferenceResult) -> None:
        y = result.outputs[0]
        if self.at < len(self.models):
            self.next(y)
        else:
            self.over(y)


class FanBranch:
    """Receiver of the result of one model of a fan."""

    is_direct = False
    writes = False

    def __init__(self, fan: Fan, index: int) -> None:
        self.fan, self.index = fan, index
        self.failed = fan.failed

    def succeeded(self, result: InferenceResult) -> None:
        self.fan.branch_succeeded(self.index, result.outputs[0])


class Fan(Caller):
    """Caller of several models with one tensor, and of a last model with their outputs."""

    def __init__(self, calls: int, expected: float, models: Sequence[Target], last: Target) -> None:
        super().__init__(calls, expected)
        self.models, self.last = models, last

    def ask(self) -> None:
        self.parts: dict[str, Value] = {}
        for n, to in enumerate(self.models):
            to.version.scheduler.start(to.call(x=self.x), time.monotonic() + 30, "", FanBranch(self, n))

    def branch_succeeded(self, index: int, y: Value) -> None:
        self.parts[f"x{index}"] = y
        if len(self.parts) == len(self.models):
            self.last.version.scheduler.start(self.last.call(**self.parts), time.monotonic() + 30, "", self)

    def succeeded(self, result: InferenceResult) -> None:
        self.over(result.outputs[0])


async def measure(make: Callable[[int], Caller], in_flight: int, calls: int) -> tuple[float, float]:
    """Return the CPU time per request and the median latency, both in microseconds."""
    callers = [make(max(calls // in_flight, 1)) for _ in range(in_flight)]
    cpu = time.process_time()
    for caller in callers:
        caller.go()
    for caller in callers:
        await caller.done.wait()
    cpu = time.process_time() - cpu
    seconds = [second for caller in callers for second in caller.seconds]
    return cpu * 1e6 / len(seconds), statistics.median(seconds) * 1e6


async def run(options: argparse.Namespace, table: Table) -> None:
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save(root)
        models = await stack.enter_async_context(Models(LoadContext.of(OnnxRuntime(), QueueLimits(), threads=1)))
        models.want(repository.scan(root))
        await models.settled()
        assert models.is_ready(), models.index()
        to = {name: Target.of(models.find(name, "")) for name in models.names()}
        steps = [to[f"next{n}"] for n in range(MOST)]
        kinds: list[tuple[str, int, Callable[[int], Caller], Callable[[int], Caller]]] = [
            (
                f"chain of {count}",
                count,
                partial(Chain, expected=float(count), models=steps[:count]),
                partial(Whole, expected=float(count), to=to[f"chain{count}"]),
            )
            for count in CHAINS
        ]
        fan = partial(Fan, expected=float(FAN), models=steps[:FAN], last=to["sum4"])
        kinds.append((f"fan of {FAN} and 1", FAN + 1, fan, partial(Whole, expected=float(FAN), to=to["fan4"])))
        for name, count, apart, whole in kinds:
            for in_flight in IN_FLIGHT:
                rounds = []
                for n in range(options.rounds + 1):
                    both = [await measure(make, in_flight, options.calls) for make in (apart, whole)]
                    # The first round warms up.
                    if n:
                        rounds.append((*both[0], *both[1]))
                cpu_a, p50_a, cpu_b, p50_b = (statistics.median(column) for column in zip(*rounds, strict=True))
                added = statistics.median((cpu - before) / count for before, _, cpu, _ in rounds)
                table.add_row(
                    *(name, f"{in_flight}", f"{cpu_a:.0f}", f"{cpu_b:.0f}", f"{added:.1f}"),
                    *(f"{p50_a:.0f}", f"{p50_b:.0f}", f"{(p50_b - p50_a) / count:.1f}" if in_flight == 1 else ""),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=2_000, help="requests per kind and round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = Table(
        *(
            "what",
            "in flight",
            "CPU us: steps",
            "ensemble",
            "added a step",
            "p50 us: steps",
            "ensemble",
            "added a step",
        ),
        title=f"{options.rounds} rounds of {options.calls} requests, medians",
    )
    uvloop.run(run(options, table))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
