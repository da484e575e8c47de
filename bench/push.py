"""Time of `shoal models push` of a folder of many small models, by phase, and the processor time of each process.

    python -m bench.push [--models 500] [--runs 1] [--replicas 1] [--broken 0] [--precedence]

Each model has bytes of its own, so nothing is shared. Client and node share the machine's processors. A phase is the
mean time of one model's calls; several models are pushed at a time, so that phases do not add up to the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table
from siege.servers import take_precedence

from shoal.client import AsyncClient
from shoal.client.models import readiness, trial, upload
from shoal.client.models.push import Push

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def save_models(folder: Path, count: int, broken: int) -> None:
    """Write `count` models (x [N, 4] FP32 -> x + a constant), and `broken` ones that cannot be loaded."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    for number in range(count):
        constant = onnx.numpy_helper.from_array(np.full(4, number, np.float32), "c")
        graph = make.make_graph(
            [make.make_node("Add", ["x", "c"], ["y"])],
            "shift",
            [make.make_tensor_value_info("x", kind, ["N", 4])],
            [make.make_tensor_value_info("y", kind, ["N", 4])],
            [constant],
        )
        path = folder / f"shift-{number:04}" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9), path)
    for number in range(broken):
        path = folder / f"broken-{number:04}" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not a model %d" % number)


@asynccontextmanager
async def node(folder: Path, replicas: int) -> AsyncIterator[dict[str, Any]]:
    """Run `shoal up`; yield its ready document."""
    ready, runtime = folder / "ready.json", folder / "runtime"
    runtime.mkdir(mode=0o700)
    command = [sys.executable, "-m", "shoal.cli.main", "up", "--data-dir", str(folder / "data"), "--gateway-port", "0"]
    command += ["--admin-port", "0", "--ready-file", str(ready), "--replicas", f"infer={replicas}"]
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, env=environ)
    try:
        while not ready.exists():
            if process.returncode is not None:
                sys.exit("the node did not start: run `shoal up` to see why")
            await asyncio.sleep(0.05)
        yield json.loads(ready.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


class Phases:
    """Seconds of each phase of a push, over all models. Use as a `with` block around the push."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Phases:
        self._time(upload, "digest", "hash the files")
        self._time(upload, "put", "upload")
        self._time(Push, "_known", "read the registered versions")
        self._time(trial, "run", "trial load")
        self._time(Push, "_registered", "all up to the registration")
        self._time(readiness, "wait_ready", "wait until ready everywhere")
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, function in self._replaced:
            setattr(owner, name, function)

    def _time(self, owner: Any, name: str, phase: str) -> None:
        function: Callable[..., Awaitable[Any]] = getattr(owner, name)

        async def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return await function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - began

        self._replaced.append((owner, name, function))
        setattr(owner, name, timed)


def cpu_s(pid: int) -> float:
    """Return the processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


async def measure(
    count: int, replicas: int, broken: int, settled: list[float], *, precedence: bool
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Push the models to a new node. Return the seconds, those of each phase, and processor seconds by process."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-push-") as scratch:
        models, folder = Path(scratch, "models"), Path(scratch, "node")
        folder.mkdir()
        save_models(models, count, broken)
        async with node(folder, replicas) as document, AsyncClient(document["gateway"]) as client:
            pids = {"client": os.getpid(), **document["pids"]}
            if precedence:
                take_precedence(pids.values())
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            began = time.perf_counter()
            with Phases() as phases:
                outcomes = await client.models.push_all(
                    models, settled=lambda _: settled.append(time.perf_counter() - began), timeout=600
                )
            seconds = time.perf_counter() - began
            used = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
            failed = [outcome for outcome in outcomes if outcome.error is not None]
            if len(failed) != broken:
                sys.exit(f"{len(failed)} models were not pushed, the first one because: {failed[0].error}")
    return seconds, phases.seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--broken", type=int, default=0, help="models that cannot be loaded, beside the others")
    parser.add_argument("--runs", type=int, default=1, help="runs, each on a new node")
    parser.add_argument("--precedence", action="store_true", help="run before other work of the machine; needs root")
    arguments = parser.parse_args()
    total = arguments.models + arguments.broken
    console = Console(width=120)
    for _ in range(arguments.runs):
        settled: list[float] = []
        run = measure(arguments.models, arguments.replicas, arguments.broken, settled, precedence=arguments.precedence)
        seconds, phases, used = asyncio.run(run)
        table = Table(title=f"{total} models, {arguments.replicas} replicas: {seconds:.1f} s, {total / seconds:.0f}/s")
        table.add_column("phase")
        table.add_column("ms per model", justify="right")
        for phase, taken in phases.items():
            table.add_row(phase, f"{taken / total * 1e3:.0f}")
        console.print(table)
        table = Table("process", title="processor time")
        table.add_column("s", justify="right")
        for name, taken in sorted(used.items(), key=lambda pair: -pair[1]):
            table.add_row(name, f"{taken:.1f}")
        console.print(table)
        quarters = (settled[total * part // 4 - 1] for part in (1, 2, 3, 4))
        console.print("seconds until each quarter was pushed:", ", ".join(f"{at:.1f}" for at in quarters))


if __name__ == "__main__":
    main()
