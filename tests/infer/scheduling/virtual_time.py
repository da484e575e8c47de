"""The scheduler in simulated time: a loop whose clock jumps to the next thing that happens, and instances that take as
long as they are told. Deterministic, and an hour takes milliseconds.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from services.infer.requests.parameters import Parameters
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.execution import Execution, ExecutionItem
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from services.infer.scheduling.worker import Done
from shoal.oip.datatypes import BY_NAME

X, Y = TensorSpec("x", BY_NAME["FP64"], (-1, 1)), TensorSpec("y", BY_NAME["FP64"], (-1, 1))
SIGNATURE = Signature((X,), (Y,), 64)

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """No sockets and no threads, only timers."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` in simulated time, which begins at 0."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class Model(Session):
    """y = 2x + 1. Fails for the values in `poison`, and remembers when it ran what."""

    inputs, outputs, text = (X,), (Y,), False

    def __init__(self, clock: Callable[[], float], poison: set[float] | None = None) -> None:
        self.clock = clock
        self.poison = poison if poison is not None else set()
        self.runs: list[tuple[float, list[float]]] = []

    def run(self, inputs: Any, outputs: Sequence[str]) -> list[Any]:
        x = inputs["x"]
        self.runs.append((self.clock(), x[:, 0].tolist()))
        if self.poison.intersection(x[:, 0].tolist()):
            raise ModelFailed("poison")
        return [2 * x + 1]

    def close(self) -> None: ...


class SimulatedWorker:
    """An instance whose batches take `cost(rows)` seconds."""

    def __init__(self, execution: Execution, loop: asyncio.AbstractEventLoop, cost: Callable[[int], float]) -> None:
        self.execution = execution
        self._loop = loop
        self._cost = cost
        self._wake: asyncio.TimerHandle | None = None
        self.is_running = self.is_closed = False

    def run(self, jobs: Sequence[ExecutionItem], done: Done) -> None:
        assert not self.is_running, "one batch at a time"
        assert not self.is_closed
        self._sleep_on()
        self.is_running = True
        outcomes = self.execution.run(jobs)
        seconds = self.seconds(jobs)

        def finished() -> None:
            self.is_running = False
            done(outcomes, seconds)

        self._loop.call_later(seconds, finished)

    def seconds(self, jobs: Sequence[ExecutionItem]) -> float:
        return self._cost(sum(job.request.rows for job in jobs))

    def wake_in(self, seconds: float, wake: Callable[[], None]) -> None:
        assert not self.is_running
        self._sleep_on()
        self._wake = self._loop.call_later(max(seconds, 0.0), wake)

    def close(self) -> None:
        assert not self.is_running
        self._sleep_on()
        self.is_closed = True

    def _sleep_on(self) -> None:
        if self._wake is not None:
            self._wake.cancel()


def call(first: float, rows: int = 1, *, key: object = "k", timeout_us: int = 0, priority: int = 0) -> InferenceRequest:
    """A call with the values first, first + 0.001, ..."""
    x = np.array([first + n / 1000 for n in range(rows)])[:, None]
    return InferenceRequest({"x": x}, (WantedOutput(Y),), rows, x.nbytes, key, Parameters(timeout_us, priority))


class Bench:
    """A scheduler in simulated time, and its model."""

    def __init__(
        self, cost: Callable[[int], float], *args: Any, poison: set[float] | None = None, **kwargs: Any
    ) -> None:
        clock = asyncio.get_running_loop().time
        self.model, self.statistics = Model(clock, poison), Statistics()
        self.scheduler = Scheduler(
            "m",
            lambda: Execution("m", self.model, SIGNATURE, clock),
            *args,
            statistics=self.statistics,
            clock=clock,
            worker=lambda execution, loop, name: SimulatedWorker(execution, loop, cost),
            **kwargs,
        )
