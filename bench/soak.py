"""Soak test of `shoal serve`: every answer is checked, memory must not grow, and no call or resource may be lost.

    python bench/soak.py [--seconds 600] [--front auto|h2|envoy] [--in-flight 32] [--seed 1]

Nine models (ONNX batched, unbatched, of text, cached, slow, raising, reloaded under load; Python; decoupled). Callers
cancel, set short deadlines, send bad requests, stream, compress and disconnect. Exits with 1 and a reason after a wrong
answer, a lost call or an impossible status. The same holds when memory grew, threads or descriptors leaked, or the
server's counters are inconsistent.

Limits: memory may grow by 24 MiB and 5 % from the second to the last quarter of the time. After all callers have
disconnected, 2 more threads and 8 more descriptors than before are accepted. The first quarter is the warm-up, in which
pools and buffers reach their size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soak_models
from rich.console import Console
from rich.table import Table
from soak_callers import Caller, Tally
from soak_watch import Memory, Resources, resources

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc

MIB = 1 << 20
GROWTH_BYTES, GROWTH_SHARE = 24 * MIB, 0.05
MORE_THREADS, MORE_DESCRIPTORS = 2, 8
RELOAD_EVERY_S = 4.0
SAMPLE_EVERY_S = 0.5
# Time for the server to release the resources of its callers.
QUIET_S = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--front", choices=("auto", "h2", "envoy"), default="auto")
    parser.add_argument("--in-flight", type=int, default=32, help="number of callers, each with one call in flight")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-soak-") as folder:
        root = Path(folder)
        soak_models.write(root / "models")
        server, pid, address = start(root, args.front)
        try:
            problems = asyncio.run(soak(address, pid, args.seconds, args.in_flight, args.seed))
            problems += stop(server, root / "serve.log")
        finally:
            if server.poll() is None:
                server.kill()
            server.wait()
        for problem in problems[:20]:
            print(f"PROBLEM {problem}", file=sys.stderr)
        if len(problems) > 20:
            print(f"and {len(problems) - 20} more", file=sys.stderr)
        if problems:
            kept = Path(tempfile.gettempdir()) / f"shoal-soak-{pid}.log"
            shutil.copy(root / "serve.log", kept)
            print(f"the server's log is kept: {kept}", file=sys.stderr)
            sys.exit(1)


def start(root: Path, front: str) -> tuple[subprocess.Popen[str], int, str]:
    """`shoal serve`, ready; the pid of its server, and where it is."""
    command = [
        sys.executable,
        "-m",
        "shoal.cli.main",
        "serve",
        str(root / "models"),
        "--port",
        "0",
        "--json",
        "--front",
        front,
        "--model-control",
        "explicit",
        "--load-model",
        "*",
    ]
    environ = {
        **os.environ,
        "SHOAL_INFER_RESPONSE_CACHE_BYTES": str(MIB),
        "SHOAL_INFER_THREADS": "1",
    }
    with (root / "serve.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
    assert server.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = server.stdout.readline()
        if not line:
            sys.exit(f"the server did not start:\n{(root / 'serve.log').read_text()[-3000:]}")
        text += line
    said = json.loads(text)
    if unready := [model for model in said["models"] if model["state"] != "READY"]:
        server.kill()
        sys.exit(f"not ready: {unready}")
    return server, said["pid"], said["address"]


def stop(server: subprocess.Popen[str], log: Path) -> list[str]:
    """Stop the server, and return problems: a bad exit status, or errors in its log."""
    server.terminate()
    status = server.wait(60)
    problems = [] if status == 0 else [f"the server ended with {status}"]
    for line in log.read_text().splitlines():
        # Lines of the runtimes are not JSON.
        try:
            record = json.loads(line)
        except ValueError:
            continue
        is_expected = "Failed to process the request(s) for model 'table'" in record.get("message", "")
        if record.get("level") in ("ERROR", "CRITICAL") and not is_expected:
            problems.append(f"the log: {record['message'][:300]} {record.get('exception', '')[-500:]}")
    return problems


async def soak(address: str, pid: int, seconds: float, in_flight: int, seed: int) -> list[str]:
    """Run the load, print the table, and return the problems."""
    tally, memory = Tally(), Memory(time.monotonic)
    await load(address, tally, in_flight, seed, for_s(min(3.0, seconds / 10)))
    before = await quiet(pid)
    end = for_s(seconds)
    watch = asyncio.create_task(watching(pid, memory, end))
    reloads = asyncio.create_task(reloading(address, end, tally))
    began = time.monotonic()
    await load(address, tally, in_flight, seed + 1000, end)
    took = time.monotonic() - began
    await asyncio.gather(watch, reloads)
    after = await quiet(pid, before)
    statistics = await counters(address)
    show(tally, memory, before, after, took)
    return [*tally.wrong, *leaks(memory, before, after), *inconsistencies(tally, statistics)]


def for_s(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


async def load(address: str, tally: Tally, in_flight: int, seed: int, is_over: Callable[[], bool]) -> None:
    await asyncio.gather(*(Caller(address, seed + n, tally).run(is_over) for n in range(in_flight)))


async def watching(pid: int, memory: Memory, is_over: Callable[[], bool]) -> None:
    while not is_over():
        memory.sample(pid)
        await asyncio.sleep(SAMPLE_EVERY_S)


async def reloading(address: str, is_over: Callable[[], bool], tally: Tally) -> None:
    """Reload a model repeatedly while it is called. No call may fail."""
    async with connect(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        while not is_over():
            await asyncio.sleep(RELOAD_EVERY_S)
            request = pb.RepositoryModelLoadRequest(model_name="reloaded")
            # Each load changes the length of the queue; an unchanged configuration would not be loaded again.
            calls = 1000 + len(tally.outcomes) + tally.outcomes["reload", "OK"]
            config = {"max_batch_size": 8, "dynamic_batching": {"default_queue_policy": {"max_queue_size": calls}}}
            request.parameters["config"].string_param = json.dumps(config)
            try:
                await stub.RepositoryModelLoad(request, timeout=60)
                tally.add("reload", "OK")
            except Exception as err:
                tally.add("reload", "FAILED")
                tally.wrong.append(f"reload: {err}")


async def quiet(pid: int, before: Resources | None = None) -> Resources:
    """Wait until the server has released its resources, or for QUIET_S; return the resources."""
    end = for_s(QUIET_S if before else 2.0)
    while True:
        now = resources(pid)
        if end() or (before is not None and not _leaked(before, now)):
            return now
        await asyncio.sleep(0.2)


def _leaked(before: Resources, after: Resources) -> list[str]:
    leaked = []
    if after.threads > before.threads + MORE_THREADS:
        leaked.append(f"threads: {before.threads} before, {after.threads} after")
    if after.descriptors > before.descriptors + MORE_DESCRIPTORS:
        leaked.append(f"descriptors: {before.descriptors} before, {after.descriptors} after")
    return leaked


def leaks(memory: Memory, before: Resources, after: Resources) -> list[str]:
    found, growth = _leaked(before, after), memory.growth_bytes()
    limit = GROWTH_BYTES + GROWTH_SHARE * before.rss_bytes
    if growth > limit:
        found.append(f"the memory grew by {growth / MIB:.0f} MiB; the limit is {limit / MIB:.0f} MiB")
    return found


async def counters(address: str) -> dict[str, Any]:
    async with connect(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        response = await stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=30)
    return {each.name: each for each in response.model_stats}


def inconsistencies(tally: Tally, statistics: dict[str, Any]) -> list[str]:
    """Return contradictions between the server's counters and the callers' counts.

    The server may count more answers than its callers, because a cancelled call may have been answered.
    """
    found = []
    for name, seen in tally.answered.items():
        stats = statistics[name].inference_stats
        # A reload resets the counters.
        if name != "reloaded" and stats.success.count < seen:
            found.append(f"{name}: callers received {seen} correct answers, the server counts {stats.success.count}")
        if stats.compute_infer.count + stats.cache_hit.count != stats.success.count:
            found.append(f"{name}: executed and cached answers do not add up to all answers: {stats}")
    cached = statistics["triple"].inference_stats
    if not cached.cache_hit.count or abs(cached.cache_miss.count - cached.compute_infer.count) > tally.outcomes.total():
        found.append(f"triple: the response cache does not add up: {cached}")
    if tally.outcomes["bad", "INTERNAL"] and not statistics["table"].inference_stats.fail.count:
        found.append("table: failed calls are not counted")
    return found


def show(tally: Tally, memory: Memory, before: Resources, after: Resources, took: float) -> None:
    table = Table(title=f"{sum(tally.outcomes.values())} outcomes in {took:.0f} s", title_justify="left")
    for column in ("calls", "outcomes"):
        table.add_column(column)
    kinds: dict[str, Counter[str]] = {}
    for (kind, outcome), count in tally.outcomes.items():
        kinds.setdefault(kind, Counter())[outcome] += count
    for kind, outcomes in kinds.items():
        table.add_row(kind, ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common()))
    table.add_section()
    growth, slope = memory.growth_bytes() / MIB, memory.slope_bytes_a_minute() / MIB
    table.add_row(
        "memory", f"{before.rss_bytes / MIB:.0f} MiB, growth {growth:+.1f} MiB, slope {slope:+.2f} MiB a minute"
    )
    table.add_row("threads", f"{before.threads} before, {after.threads} after")
    table.add_row("descriptors", f"{before.descriptors} before, {after.descriptors} after")
    Console().print(table)


if __name__ == "__main__":
    main()
