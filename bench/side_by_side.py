"""Comparison of contenders: interleaved rounds, medians, ratios to the first, and the list of missing packages."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Clock = Callable[[Callable[[], Any]], float]
MISSING: set[str] = set()


def peer(name: str) -> Any:
    """Return a package to compare with, or add it to MISSING and return None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        MISSING.add(name.partition(".")[0])
        return None


Runs = dict[str, Callable[[], Any]]


@dataclass
class Case:
    """One piece of work for several contenders. The first contender is ours."""

    title: str
    items: int
    """Number of items per run, for a rate."""
    item: str
    runs: Runs
    notes: dict[str, str] = field(default_factory=dict)
    """Error of the result, or missing features, by contender."""


def measure(case: Case, rounds: int, clock: Clock | None = None) -> dict[str, list[float]]:
    """Return the seconds of each round by contender. Each contender runs once before."""
    clock = clock or wall
    for run in case.runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in case.runs}
    for _ in range(rounds):
        for name, run in case.runs.items():
            taken[name].append(clock(run))
    return taken


LEAST_SECONDS = 0.001


def wall(run: Callable[[], Any]) -> float:
    """Return the wall seconds of one run. A short run is repeated for a millisecond."""
    return _seconds(run, time.perf_counter)


def processor(run: Callable[[], Any]) -> float:
    """Return the CPU seconds of one run, of all threads: more reliable than the wall time on a busy machine."""
    return _seconds(run, time.process_time)


def _seconds(run: Callable[[], Any], now: Callable[[], float]) -> float:
    began = now()
    runs, taken = 0, 0.0
    while taken < LEAST_SECONDS:
        run()
        runs += 1
        taken = now() - began
    return taken / runs


def show(cases: Iterable[Case], rounds: int, console: Console, clock: Clock | None = None) -> None:
    for case in cases:
        table = Table(title=case.title, title_justify="left")
        table.add_column("contender")
        for column in (f"{case.item}/s", "us", "slower than ours"):
            table.add_column(column, justify="right")
        table.add_column("result")
        taken = measure(case, rounds, clock)
        first = statistics.median(taken[next(iter(taken))])
        for name, seconds in taken.items():
            median = statistics.median(seconds)
            table.add_row(
                name,
                f"{case.items / median:,.0f}",
                f"{1e6 * median:,.1f}",
                f"{median / first:.2f}",
                case.notes.get(name, ""),
            )
        console.print(table)
    if MISSING:
        console.print(f"not compared, because not installed: {', '.join(sorted(MISSING))}")


def compared(title: str, items: int, item: str, runs: Runs) -> Case:
    """Return a case with notes on the difference of each result to ours, the run with the name shoal."""
    results = {name: _first(run()) for name, run in runs.items()}
    ours = results["shoal"]
    notes = {name: _difference(ours, result) for name, result in results.items() if name != "shoal"}
    return Case(title, items, item, runs, notes)


def _first(result: Any) -> np.ndarray:
    """Return the array of a result, or the first array of a tuple."""
    array = np.asarray(result[0] if isinstance(result, tuple | list) else result)
    return array.copy()


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f"another shape: {list(theirs.shape)}"
    if np.array_equal(ours, theirs):
        return "equal to ours"
    return f"differs from ours by {np.abs(ours.astype(np.float64) - theirs).max():.1e} at most"


def onnx_model(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: list[Any]) -> bytes:
    """Return a serialized ONNX model of a graph. The package onnx must be installed."""
    make = peer("onnx").helper
    graph = make.make_graph(nodes, "peer", inputs, outputs, initializers)
    model: bytes = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9).SerializeToString()
    return model


def session(model: bytes, threads: int = 1) -> Any:
    """Return a session of ONNX Runtime, which must be installed."""
    ort = peer("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
