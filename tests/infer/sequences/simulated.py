"""The sequence scheduler in simulated time, over a model that adds up and remembers what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.infer.requests.parameters import Parameters
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.statistics import Statistics
from services.infer.sequences.execution import SequenceExecution
from services.infer.sequences.scheduler import SequenceScheduler
from services.infer.sequences.settings import CORRID, END, READY, START, Control, SequenceSettings, State
from shoal.oip.datatypes import BY_NAME
from tests.infer.scheduling.virtual_time import SimulatedWorker

FP64, INT64, BOOL = BY_NAME["FP64"], BY_NAME["INT64"], BY_NAME["BOOL"]
Y = TensorSpec("y", FP64, (-1, 1))
CONTROLS = (
    *(Control(name, kind, BOOL) for name, kind in (("START", START), ("END", END), ("READY", READY))),
    Control("CORRID", CORRID, INT64),
)
STATE = State("total_in", "total_out", FP64, (1,), (1,))
FIRST = {"total_in": np.zeros((1, 1))}


def settings(
    *, direct: bool = True, slots: int = 2, rows: int = 2, idle_s: float = 60.0, delay_s: float = 0.0, **more: Any
) -> SequenceSettings:
    return SequenceSettings(
        CONTROLS, (STATE,), direct, slots, BatchPolicy(rows, 1 << 60, delay_s), idle_s=idle_s, **more
    )


@dataclass(frozen=True)
class Ran:
    """One row of one run."""

    at: float
    instance: int
    run: int
    row: int
    id: int
    starts: bool
    ends: bool
    x: float


class Model(Session):
    """total = total + x. Fails for the values in `poison`."""

    inputs, outputs, text = (), (Y,), False

    def __init__(self, instance: int, log: list[Ran], poison: set[float], clock: Callable[[], float]) -> None:
        self.instance, self.log, self.poison, self.clock = instance, log, poison, clock
        self.runs = 0

    def run(self, inputs: Any, outputs: Sequence[str]) -> list[Any]:
        assert list(outputs) == ["y", "total_out"]
        self.runs += 1
        ready = inputs["READY"][:, 0]
        x = inputs["x"]
        assert ready.any(), "a batch of nobody"
        assert not x[~ready].any()
        assert not inputs["CORRID"][~ready].any()
        assert not inputs["START"][~ready].any()
        if self.poison.intersection(x[:, 0].tolist()):
            raise ModelFailed("poison")
        for row in np.flatnonzero(ready):
            told = [inputs[name][row, 0] for name in ("CORRID", "START", "END")]
            self.log.append(Ran(self.clock(), self.instance, self.runs, int(row), *told, x[row, 0]))
        total = inputs["total_in"] + x
        return [total, total.copy()]

    def close(self) -> None: ...


def step(
    id: int | str, x: float = 1.0, *, start: bool = False, end: bool = False, timeout_us: int = 0, key: object = "k"
) -> InferenceRequest:
    asked = Parameters(timeout_us, sequence_id=id, sequence_start=start, sequence_end=end)
    array = np.array([[x]])
    return InferenceRequest({"x": array}, (WantedOutput(Y),), 1, array.nbytes, key, asked)


class Bench:
    """A scheduler in simulated time: each run takes `seconds`."""

    def __init__(self, given: SequenceSettings, *, instances: int = 1, seconds: float = 0.01, **more: Any) -> None:
        clock = asyncio.get_running_loop().time
        self.log: list[Ran] = []
        self.poison: set[float] = set()
        self.statistics = Statistics()
        signature = Signature((), (Y,), given.policy.max_rows)

        def execution(n: int) -> SequenceExecution:
            return SequenceExecution("m", Model(n, self.log, self.poison, clock), signature, given, FIRST, clock)

        self.scheduler = SequenceScheduler(
            "m",
            execution,
            given,
            more.pop("limits", QueueLimits()),
            instances=instances,
            first_shapes=((1, 1),),
            statistics=self.statistics,
            clock=clock,
            worker=lambda execution, loop, name: SimulatedWorker(execution, loop, lambda rows: seconds),
            **more,
        )

    async def total(self, call: InferenceRequest, **more: Any) -> float:
        result = await self.scheduler.submit(call, **more)
        return float(result.outputs[0][0, 0])
