"""Several infer processes at one address: two workers beside one, and the cost of sharing a model between them.

    python bench/workers.py [--rounds 5] [--seconds 2] [--in-flight 32]

    one            --workers 1
    two            --workers 2, each with the models
    two, shared    --workers 2, with each model in one process that both workers feed (isolation: shared)

Every execution has one thread. The generator shares the processors with the servers. With only two processors, the rate
of two workers means little; use the CPU time per request instead. All servers run, and rounds interleave them. Every
answer is compared with the expected one of its request. The models are `latent` (much work, little to send) and `mlp`
(batched rows cost far less than single rows).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from infer import ROOT, Measured, Server, answers, loaded
from infer_models import Sample, save
from oip_load import Requests
from rich.console import Console
from rich.table import Table

_MODELS = ("latent", "mlp")
_SHARED = 'max_batch_size: 64\nparameters { key: "isolation" value { string_value: "shared" } }\n'


def shared(models: Path, folder: Path) -> Path:
    """Write a second repository of the models, with shared isolation."""
    for name in _MODELS:
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").symlink_to(models / f"{name}.onnx")
        (folder / name / "config.pbtxt").write_text(_SHARED)
    return folder


def start(name: str, models: Path, workers: int, port: int, samples: dict[str, Sample]) -> Server:
    """Start `shoal serve`, and wait for correct answers."""
    command = [sys.executable, "-m", "shoal.cli.main", "serve", str(models), "--port", str(port)]
    env = {**os.environ, "SHOAL_INFER_THREADS": "1"}
    process = subprocess.Popen([*command, "--workers", str(workers)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    server = Server(name, f"127.0.0.1:{port}", process.pid, process)
    for model in _MODELS:
        while not uvloop.run(answers(server, samples[model])):
            if process.poll() is not None:
                sys.exit(f"the server '{name}' ended with status {process.returncode}")
            time.sleep(0.05)
    return server


def show(servers: list[Server], found: dict[tuple[str, str], Measured], in_flight: int, console: Console) -> None:
    table = Table(title=f"{in_flight} requests in flight; medians, and ratios to one worker")
    for column in ("model", "server", "requests/s", "ratio", "CPU us/request", "ratio", "p99 ms", "wrong", "MB"):
        table.add_column(column, justify="left" if column in ("model", "server") else "right")
    for model in _MODELS:
        first = found[servers[0].name, model]
        for server in servers:
            one = found[server.name, model]
            rate, cpu = statistics.median(one.rates), statistics.median(one.cpu_us)
            table.add_row(
                model,
                server.name,
                f"{rate:,.0f}",
                f"{rate / max(statistics.median(first.rates), 1e-9):.2f}",
                f"{cpu:,.0f}",
                f"{cpu / max(statistics.median(first.cpu_us), 1e-9):.2f}",
                f"{statistics.median(one.p99_ms):.1f}",
                str(one.wrong + one.refused),
                f"{server.memory_mb():,.0f}",
            )
        table.add_section()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--port", type=int, default=18_300)
    args = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch, "models")
        models.mkdir()
        samples = save(models)
        variants = [("one", models, 1), ("two", models, 2), ("two, shared", shared(models, Path(scratch, "shared")), 2)]
        servers: list[Server] = []
        try:
            for n, (name, folder, workers) in enumerate(variants):
                servers.append(start(name, folder, workers, args.port + n, samples))
            found = {(server.name, model): Measured() for server in servers for model in _MODELS}
            for _ in range(args.rounds):
                for model in _MODELS:
                    requests = Requests.of(model, samples[model].inputs, samples[model].outputs)
                    for server in servers:
                        measured = uvloop.run(loaded(server, requests, args.in_flight, args.seconds))
                        found[server.name, model].add(*measured)
            show(servers, found, args.in_flight, console)
        finally:
            for server in servers:
                if server.process is not None:
                    server.process.send_signal(signal.SIGTERM)
                    server.process.wait(20)


if __name__ == "__main__":
    main()
