"""Cost of the scheduler per call, without the model's own time: submit, queue, batch, split, deliver.

    python bench/scheduler.py [--calls 20000] [--rounds 5] [--thread]

A substitute for a model takes about 10 us for any batch (a NumPy addition and a busy wait). A fixed number of callers
submit one row each in a closed loop. `--thread` runs the model off the event loop, like a longer model. Figures are CPU
time of all threads, without the model's; `p50` is the latency of one caller.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from services.infer.requests.outcome import InferenceResult
from services.infer.requests.parameters import NONE
from services.infer.requests.request import InferenceRequest, WantedOutput
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.runtimes.runtime import Session
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.execution import Execution
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from shoal.oip.datatypes import BY_NAME

IN_FLIGHT = (1, 8, 64, 256)
MODEL_NS = 10_000

X, Y = TensorSpec("x", BY_NAME["FP32"], (-1, 16)), TensorSpec("y", BY_NAME["FP32"], (-1, 16))


class Model(Session):
    """Session that computes y = x + 1 in MODEL_NS of CPU time."""

    inputs, outputs, text = (X,), (Y,), False

    def __init__(self, *, only_computes: bool) -> None:
        self.only_computes = only_computes
        self.runs = 0

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        self.runs += 1
        until = time.perf_counter_ns() + MODEL_NS
        y = inputs["x"] + 1
        while time.perf_counter_ns() < until:
            pass
        return [y]

    def close(self) -> None: ...


class Caller:
    """Closed-loop caller without tasks: submits again after each result, as a network server does."""

    is_direct = True
    writes = True

    def __init__(self, scheduler: Scheduler, calls: int, done: asyncio.Event, tenant: str, deadline_s: float) -> None:
        self.scheduler, self.left, self.done, self.tenant, self.deadline_s = scheduler, calls, done, tenant, deadline_s
        x = np.zeros((1, 16), np.float32)
        self.call = InferenceRequest({"x": x}, (WantedOutput(Y),), 1, x.nbytes, ("x", 16), NONE)
        self.seconds: list[float] = []

    def go(self) -> None:
        self.began = time.perf_counter()
        self.scheduler.start(self.call, time.monotonic() + self.deadline_s, self.tenant, self)

    def succeeded(self, result: InferenceResult) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.left -= 1
        if self.left > 0:
            # A server reads the next request in another iteration of the event loop.
            asyncio.get_running_loop().call_soon(self.go)
        else:
            self.done.set()

    def failed(self, error: BaseException) -> None:
        raise error


async def measure(in_flight: int, calls: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Return the CPU microseconds per call, the rows per batch, and the median latency in microseconds."""
    model = Model(only_computes=not options.thread)
    signature = Signature((X,), (Y,), 64)
    scheduler = Scheduler(
        "bench",
        lambda: Execution("bench", model, signature, time.monotonic),
        BatchPolicy(64, 1 << 26, slo_s=options.slo_ms / 1000 if options.slo_ms else float("inf")),
        QueueLimits(),
        Rules(),
        statistics=Statistics(),
    )
    async with scheduler:
        for warm in (True, False):
            each = max((calls // 10 if warm else calls) // in_flight, 1)
            events = [asyncio.Event() for _ in range(in_flight)]
            callers = [
                Caller(scheduler, each, event, f"t{n % options.tenants}" if options.tenants else "", options.deadline_s)
                for n, event in enumerate(events)
            ]
            model.runs = 0
            cpu = time.process_time()
            for caller in callers:
                caller.go()
            for event in events:
                await event.wait()
            cpu = time.process_time() - cpu
    done = each * in_flight
    latency = statistics.median(s for caller in callers for s in caller.seconds)
    return (cpu * 1e6 - model.runs * MODEL_NS / 1000) / done, done / model.runs, latency * 1e6


async def submitted(in_flight: int, calls: int, options: argparse.Namespace) -> float:
    """Return the CPU microseconds per call of tasks that `await submit`."""
    model = Model(only_computes=not options.thread)
    signature = Signature((X,), (Y,), 64)
    policy = BatchPolicy(64, 1 << 26)
    execution = Execution("bench", model, signature, time.monotonic)
    call = Caller(None, 0, asyncio.Event(), "", 0.0).call  # type: ignore[arg-type]
    async with Scheduler("bench", lambda: execution, policy, QueueLimits(), Rules(), statistics=Statistics()) as to:

        async def one(times: int) -> None:
            for _ in range(times):
                await to.submit(call, time.monotonic() + options.deadline_s)

        await asyncio.gather(*(one(max(calls // 10 // in_flight, 1)) for _ in range(in_flight)))
        model.runs = 0
        cpu = time.process_time()
        each = max(calls // in_flight, 1)
        await asyncio.gather(*(one(each) for _ in range(in_flight)))
        cpu = time.process_time() - cpu
    return (cpu * 1e6 - model.runs * MODEL_NS / 1000) / (each * in_flight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--thread", action="store_true", help="never run the model on the event loop")
    parser.add_argument("--tenants", type=int, default=0)
    parser.add_argument("--slo-ms", type=float, default=0.0)
    parser.add_argument("--deadline-s", type=float, default=30.0)
    options = parser.parse_args()
    table = Table("in flight", "us/call, start", "us/call, submit", "rows a batch", "p50 us")
    for in_flight in IN_FLIGHT:
        rounds = [uvloop.run(measure(in_flight, options.calls, options)) for _ in range(options.rounds)]
        tasks = [uvloop.run(submitted(in_flight, options.calls, options)) for _ in range(options.rounds)]
        each, rows, p50 = (statistics.median(column) for column in zip(*rounds, strict=True))
        table.add_row(str(in_flight), f"{each:.1f}", f"{statistics.median(tasks):.1f}", f"{rows:.1f}", f"{p50:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
