"""A response cache over a model under the test's control: what runs, when it begins, and how it ends."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace

import numpy as np

from services.infer.requests import request as requests
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.response_cache.cache import ResponseCache
from services.infer.response_cache.key import ResponseKeys
from services.infer.response_cache.store import ResponseStore
from services.infer.scheduling.statistics import Statistics
from shoal.errors import DeadlineExceeded
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from shoal.oip.datatypes import BY_NAME
from tests.infer.conftest import request

ANY = tuple(
    TensorSpec(name, BY_NAME[kind], dims)
    for name, kind, dims in (("x", "FP32", (-1, -1)), ("n", "INT32", (-1, -1)), ("s", "BYTES", (-1,)))
)


class Clock:
    """Stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Run:
    """One execution, from its submission to its end."""

    request: InferenceRequest
    deadline: float
    end: asyncio.Future[None]
    tenant: str = ""
    is_waiting: bool = True
    is_abandoned: bool = False


class Runs:
    """A scheduler that runs what it is told to. Every output is -x, as a view of a larger batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.all: list[Run] = []

    @property
    def open(self) -> list[Run]:
        return [run for run in self.all if not run.end.done()]

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        if self.clock() >= deadline:
            raise DeadlineExceeded("too late")
        run = Run(request, deadline, asyncio.get_running_loop().create_future(), tenant)
        self.all.append(run)
        if deadline != math.inf:
            asyncio.get_running_loop().call_later(deadline - self.clock(), self._expire, run)
        try:
            await run.end
        except asyncio.CancelledError:
            run.is_abandoned = True
            raise
        x = next(iter(request.inputs.values()))
        batch = np.concatenate([x, x]) if x.dtype == object else np.concatenate([-x, x])
        return InferenceResult([batch[: len(x)]], ExecutionTimes(len(x)), 0, "idle")

    def _expire(self, run: Run) -> None:
        if run.is_waiting and self.clock() >= run.deadline and not run.end.done():
            self.finish(run, DeadlineExceeded("in the queue"))

    def is_waiting(self, request: InferenceRequest) -> bool:
        return any(run.request is request and run.is_waiting for run in self.open)

    def finish(self, run: Run | None = None, error: Exception | None = None) -> None:
        """Ends one run, by default the oldest."""
        run = run or self.open[0]
        if error is None:
            run.end.set_result(None)
        else:
            run.end.set_exception(error)


class Bench:
    """A response cache and what is around it."""

    def __init__(self, limit_bytes: int = 1 << 20, ttl_s: float = math.inf) -> None:
        self.clock, self.statistics = Clock(), Statistics()
        self.store = ResponseStore(limit_bytes)
        self.runs = Runs(self.clock)
        keys = ResponseKeys("m", 1, "digest", model_config_pb2.ModelConfig(), Signature(ANY, ANY))
        self.cache = ResponseCache(keys, self.runs, self.store, self.statistics, ttl_s=ttl_s, clock=self.clock)

    def ask(
        self, asked: pb.ModelInferRequest, deadline: float = math.inf, *, tenant: str = "", inner_call: object = None
    ) -> asyncio.Task:
        request = read(asked)
        request = replace(request, parameters=replace(request.parameters, inner_call=inner_call))
        return asyncio.create_task(self.cache.result(request, asked.parameters, deadline, tenant))


def read(asked: pb.ModelInferRequest) -> InferenceRequest:
    """A call for a model that takes any of the inputs, and returns the output of the same name."""
    names = [tensor.name for tensor in asked.inputs]
    specs = tuple(spec for spec in ANY if spec.name in names)
    return requests.read(asked, Signature(specs, specs))


def floats(*shape: int, value: float = 1.0, **parameters: object) -> pb.ModelInferRequest:
    """A request of FP32 `x`, all `value`."""
    asked = request("m", x=np.full(shape, value, np.float32))
    for name, given in parameters.items():
        kind = "bool" if isinstance(given, bool) else "int64" if isinstance(given, int) else "string"
        setattr(asked.parameters[name], f"{kind}_param", given)
    return asked


async def settle() -> None:
    """Lets everything go on as far as it can without time passing."""
    for _ in range(12):
        await asyncio.sleep(0)
