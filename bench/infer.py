"""The inference server beside any other server of the protocol, under the same load.

    python bench/infer.py [--rounds 5] [--seconds 1.5] [--endpoints-only] [--overload]
                          [--endpoint triton=127.0.0.1:8001 --endpoint-pid triton=PID ...]

Four models (`infer_models`). Requests are encoded once, and every answer is compared with the expected one of its
request. Each server runs on processor 0 with one thread for the model, the generator on the other processors. Rounds
interleave the servers; the tables show medians, and ratios to the first server. An endpoint must serve tiny, mlp, cnn
(and latent, for --overload) from `--models FOLDER` (written when missing).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from infer_models import Sample, save, session
from oip_load import Count, Load, Requests
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LOADS = (("tiny", 1), ("tiny", 8), ("tiny", 64), ("tiny", 256), ("mlp", 1), ("mlp", 64), ("cnn", 1), ("cnn", 64))
_TICKS = os.sysconf("SC_CLK_TCK")
_DEADLINE_S = 0.05


@dataclass
class Server:
    """A server to measure."""

    name: str
    address: str
    pid: int | None = None
    process: subprocess.Popen[bytes] | None = None
    start_s: float = float("nan")

    def cpu_s(self) -> float:
        """Processor time so far, of the process and what it started."""
        return sum(_cpu_s(pid) for pid in process_tree(self.pid)) if self.pid else float("nan")

    def memory_mb(self) -> float:
        return sum(_rss_mb(pid) for pid in process_tree(self.pid)) if self.pid else float("nan")


@dataclass
class Measured:
    """Results of one server under one load, with one value per round."""

    rates: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: int = 0

    def add(self, count: Count, cpu_s: float) -> None:
        self.rates.append(count.rate)
        self.p50_ms.append(count.quantile_ms(0.5))
        self.p99_ms.append(count.quantile_ms(0.99))
        self.cpu_us.append(1e6 * cpu_s / max(count.good, 1))
        self.wrong += count.wrong
        self.refused += sum(count.by_status.values())


def process_tree(pid: int) -> list[int]:
    """Return `pid` and what it started."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat[stat.rindex(")") + 2 :].split()[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _cpu_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    parts = stat[stat.rindex(")") + 2 :].split()
    return (int(parts[11]) + int(parts[12])) / _TICKS


def _rss_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def start(models: Path, port: int, samples: dict[str, Sample]) -> Server:
    """An infer process on processor 0, once it has answered rightly for every model."""
    env = {
        **os.environ,
        "SHOAL_INFER_LISTEN": f"127.0.0.1:{port}",
        "SHOAL_INFER_REPOSITORY": str(models),
        "SHOAL_INFER_THREADS": "1",
        "SHOAL_INFER_LOG_LEVEL": "WARNING",
    }
    began = time.perf_counter()
    command = ["taskset", "-c", "0", sys.executable, "-m", "services.infer"]
    process = subprocess.Popen(command, env=env, cwd=ROOT)
    server = Server("shoal", f"127.0.0.1:{port}", process.pid, process)
    for name in samples:
        while not uvloop.run(answers(server, samples[name])):
            if process.poll() is not None:
                sys.exit(f"the server ended with status {process.returncode}")
            time.sleep(0.01)
        server.start_s = min(server.start_s, time.perf_counter() - began) if name == "tiny" else server.start_s
    server.start_s = time.perf_counter() - began
    return server


async def answers(server: Server, sample: Sample) -> bool:
    """Return True when the server gives a correct answer now."""
    try:
        async with asyncio.timeout(5):
            load = Load(server.address, Requests.of(sample.name, sample.inputs, sample.outputs))
            return (await load.closed(1, 0.03, 0.0)).good > 0
    except (OSError, TimeoutError):
        return False


def measure(servers: list[Server], samples: dict[str, Sample], rounds: int, seconds: float) -> dict[str, Measured]:
    """Run all loads in interleaved rounds, and return the results by `<server> <model> <in flight>`."""
    found: dict[str, Measured] = {}
    requests = {name: Requests.of(name, sample.inputs, sample.outputs) for name, sample in samples.items()}
    for _ in range(rounds):
        for model, in_flight in LOADS:
            for server in servers:
                count, cpu = uvloop.run(loaded(server, requests[model], in_flight, seconds))
                found.setdefault(f"{server.name} {model} {in_flight}", Measured()).add(count, cpu)
    return found


async def loaded(server: Server, requests: Requests, in_flight: int, seconds: float) -> tuple[Count, float]:
    """Run a load, and return its counts and the server's CPU seconds."""
    load = Load(server.address, requests)
    before = 0.0

    def begin() -> None:
        nonlocal before
        before = server.cpu_s()

    asyncio.get_running_loop().call_later(0.4, begin)
    count = await load.closed(in_flight, seconds)
    return count, server.cpu_s() - before


def show(servers: list[Server], found: dict[str, Measured], console: Console) -> None:
    table = Table(title="requests a second: medians, and ratios to the first server")
    for column in (
        "model",
        "in flight",
        "server",
        "requests/s",
        "ratio",
        "CPU us/request",
        "p50 ms",
        "p99 ms",
        "wrong",
    ):
        table.add_column(column, justify="left" if column in ("model", "server") else "right")
    for model, in_flight in LOADS:
        first = statistics.median(found[f"{servers[0].name} {model} {in_flight}"].rates)
        for server in servers:
            one = found[f"{server.name} {model} {in_flight}"]
            rate = statistics.median(one.rates)
            table.add_row(
                model,
                str(in_flight),
                server.name,
                f"{rate:,.0f}",
                f"{rate / max(first, 1e-9):.2f}",
                f"{statistics.median(one.cpu_us):,.0f}",
                f"{statistics.median(one.p50_ms):.2f}",
                f"{statistics.median(one.p99_ms):.2f}",
                str(one.wrong + one.refused),
            )
        table.add_section()
    console.print(table)


def show_floor(models: Path, samples: dict[str, Sample], console: Console) -> None:
    """Print the rates of ONNX Runtime alone, in this process, on the same processor."""
    os.sched_setaffinity(0, {0})
    table = Table(title="ONNX Runtime in process, rows a second by rows a run")
    for column in ("model", "1", "8", "32", "64"):
        table.add_column(column, justify="right")
    for name, sample in samples.items():
        run = session(models / f"{name}.onnx")
        rates = []
        for rows in (1, 8, 32, 64):
            feed = {"input": sample.inputs[:rows]}
            run.run(None, feed)
            began, runs = time.perf_counter(), 0
            while time.perf_counter() - began < 0.4:
                run.run(None, feed)
                runs += 1
            rates.append(f"{runs * rows / (time.perf_counter() - began):,.0f}")
        table.add_row(name, *rates)
    console.print(table)


def show_overload(servers: list[Server], samples: dict[str, Sample], seconds: float, console: Console) -> None:
    """Offer twice the capacity, with a deadline for each request, and print the results."""
    table = Table(title=f"overload: latent, twice the capacity offered, deadlines of {_DEADLINE_S * 1000:.0f} ms")
    for column in ("server", "capacity/s", "offered/s", "in time/s", "of capacity", "late", "refused", "wrong"):
        table.add_column(column, justify="left" if column == "server" else "right")
    # Requests are small, so that rejected ones cost the generator and the server little.
    sample = samples["latent"]
    requests = Requests.of(sample.name, sample.inputs, sample.outputs)
    for server in servers:
        capacity = uvloop.run(Load(server.address, requests).closed(32, seconds)).rate
        load = Load(server.address, requests, deadline_s=_DEADLINE_S)
        count = uvloop.run(load.open(2 * capacity, 2 * seconds, 1.0))
        table.add_row(
            server.name,
            f"{capacity:,.0f}",
            f"{2 * capacity:,.0f}",
            f"{count.rate:,.0f}",
            f"{count.rate / max(capacity, 1e-9):.2f}",
            str(count.late),
            str(sum(count.by_status.values())),
            str(count.wrong),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--endpoints-only", action="store_true", help="start no server of ours")
    parser.add_argument("--endpoint", action="append", default=[], metavar="NAME=HOST:PORT")
    parser.add_argument("--endpoint-pid", action="append", default=[], metavar="NAME=PID")
    parser.add_argument("--models", type=Path, help="folder for the models")
    parser.add_argument("--port", type=int, default=18_200)
    parser.add_argument("--overload", action="store_true")
    args = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch)
        models.mkdir(parents=True, exist_ok=True)
        samples = save(models)
        pids = dict(pair.split("=") for pair in args.endpoint_pid)
        servers = []
        for pair in args.endpoint:
            name, _, address = pair.partition("=")
            servers.append(Server(name, address, int(pids[name]) if name in pids else None))
        if len(os.sched_getaffinity(0)) > 1:
            os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
        if not args.endpoints_only:
            servers.append(start(models, args.port, samples))
        try:
            for server in servers:
                if server.process is not None:
                    started = f"{server.name}: correct answers of all models {server.start_s:.2f} s after its start"
                    console.print(f"{started}, {server.memory_mb():.0f} MB resident")
            show(servers, measure(servers, samples, args.rounds, args.seconds), console)
            if args.overload:
                show_overload(servers, samples, args.seconds, console)
            for server in servers:
                if server.process is not None:
                    console.print(f"{server.name}: {server.memory_mb():.0f} MB resident after the load")
        finally:
            for server in servers:
                if server.process is not None:
                    server.process.send_signal(signal.SIGTERM)
                    server.process.wait(20)
        show_floor(models, samples, console)


if __name__ == "__main__":
    main()
