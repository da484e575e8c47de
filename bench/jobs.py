"""Shoal's jobs beside other job queues: submit and drain rates, latency, and cost by the length of the queue.

    python bench/jobs.py [--jobs 5000] [--rounds 3] [--queued 1000,100000]
                         [--peers celery-redis,celery-rabbitmq,dramatiq,arq
                          --root UNPACKED --python VENV/bin/python --arq-python VENV/bin/python]

Every queue runs the same tiny model (x [1,4] FP32 -> 2x), stores its results, and acknowledges after the data is on
disk: MongoDB with w=majority, j=true; Redis with appendfsync always; RabbitMQ with publisher confirms. Clients, servers
and workers share the machine.

    submit x1, x8    one client, or eight concurrent ones, that wait for each acknowledgement; no worker runs
    stream           one stream of submits, 100 jobs per message, as the client library sends them
    stream x1        one stream of submits, one job per message
    Kafka            jobs accepted from a topic that is full before the node starts (broker: Tansu, in memory)
    drain            a queue that is full before its worker starts: jobs/s from the first stored result to the last
    p50, p99         one job at a time, at most 20 per second, from submit to the read result
    run p50          as p50, on an open RunStream
    grpc             as the column of that name, with generated stubs over grpc.aio instead of Shoal's client library

Rounds interleave the queues, so that drifting machine speed affects all alike: trust the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from node import MODEL, save_model
from queues import node as ours
from queues.peers import Places, queue
from streams import CONNECTORS, fill, producer_of, tansu

COLUMNS = (
    "submit x1 /s",
    "submit x8 /s",
    "grpc x8 /s",
    "stream /s",
    "stream x1 /s",
    "Kafka /s",
    "drain /s",
    "p50 ms",
    "p99 ms",
    "grpc p50 ms",
    "run p50 ms",
)
Measured = dict[str, list[float]]
_STALLED_S = 60.0
# Limit of a connector's unanswered messages. No worker answers in this benchmark, and a connector polls while a quarter
# of the limit is free.
_MOST_IN_FLIGHT, _FROM_KAFKA = 10_000, 7_000


def drain(results: Callable[[], int], total: int, every_s: float) -> float:
    """Return the jobs per second from the first result until `results()`, their number, reaches `total`."""
    first, began, seen, moved = 0, 0.0, results(), time.perf_counter()
    while True:
        count, now = results(), time.perf_counter()
        if count > seen:
            seen, moved = count, now
            if not began:
                first, began = count, now
        if count >= total:
            return (count - first) / max(now - began, 1e-9)
        if now - moved > _STALLED_S:
            sys.exit(f"stalled at {count} of {total} results")
        time.sleep(every_s)


def shoal(folder: Path, jobs: int) -> Measured:
    folder.mkdir()
    model = folder / f"{MODEL}.onnx"
    save_model(model)
    found: Measured = {}
    with ours.node(folder) as node:
        node.push(model)
    with ours.node(folder, "--services", "store,ingest") as node:
        asyncio.run(ours.unary(node.gateway, MODEL, 1, 50))
        found["submit x1 /s"] = [asyncio.run(ours.unary(node.gateway, MODEL, 1, jobs // 4))]
        found["submit x8 /s"] = [asyncio.run(ours.unary(node.gateway, MODEL, 8, jobs))]
        found["grpc x8 /s"] = [asyncio.run(ours.unary_grpc(node.gateway, MODEL, 8, jobs))]
        found["stream x1 /s"] = [asyncio.run(ours.streamed(node.gateway, MODEL, jobs * 2, each=1))]
        found["stream /s"] = [asyncio.run(ours.streamed(node.gateway, MODEL, jobs * 4))]
        total = 50 + jobs // 4 + jobs * 2 + jobs * 2 + jobs * 4
    found["Kafka /s"] = [from_kafka(folder / "kafka", min(jobs * 2, _FROM_KAFKA))]
    with ours.node(folder) as node:
        rate = drain(node.results, total, 0.01)
        found["drain /s"] = [rate]
        took = asyncio.run(ours.latency(node.gateway, MODEL, 100))
        found["p50 ms"], found["p99 ms"] = [took["p50"]], [took["p99"]]
        found["grpc p50 ms"] = [asyncio.run(ours.latency_grpc(node.gateway, MODEL, 100))["p50"]]
        found["run p50 ms"] = [asyncio.run(ours.stream_latency(node.gateway, MODEL, 100))["p50"]]
    return found


def from_kafka(folder: Path, count: int) -> float:
    """Return the jobs per second that become durable from a topic of `count` messages, without a worker."""
    folder.mkdir()
    connectors = folder / "streams.toml"
    with tansu(folder) as broker:
        connectors.write_text(CONNECTORS.format(broker=broker, in_flight=_MOST_IN_FLIGHT))
        fill(producer_of(broker), count)
        with ours.node(folder, "--services", "store,ingest", "--connectors", str(connectors)) as node:
            return drain(node.jobs, count, 0.01)


def peer(name: str, places: Places, folder: Path, jobs: int) -> Measured:
    model = folder.with_suffix(".onnx")
    save_model(model)
    with queue(name, places, folder, model) as other:
        found: Measured = {
            "submit x1 /s": [other.call("submit", jobs // 4, 1)],
            "submit x8 /s": [other.call("submit", jobs, 8)],
        }
        total = jobs // 4 + jobs
        for processes in (1, 2):
            if processes == 2:
                other.call("submit", jobs, 8)
                total = jobs
            expected = other.stored() + total
            with other.working(processes):
                rate = drain(other.stored, expected, 0.01)
                found.setdefault("drain /s", []).append(rate)
                if processes == 1:
                    took = other.call("latency", 100)
                    found["p50 ms"], found["p99 ms"] = [took["p50"]], [took["p99"]]
        # The better of one and two worker processes.
        found["drain /s"] = [max(found["drain /s"])]
    return found


def lengths(folder: Path, queued: list[int]) -> Table:
    """Return a table of the cost per job and the memory, by the length of the queue."""
    table = Table("queued", "drained", "jobs/s", "CPU us per job", *ours.PARTS, "ingest MB", "mongod MB")
    for count in queued:
        place = folder / f"queued-{count}"
        place.mkdir()
        save_model(place / f"{MODEL}.onnx")
        with ours.node(place) as node:
            node.push(place / f"{MODEL}.onnx")
        with ours.node(place, "--services", "store,ingest") as node:
            asyncio.run(ours.streamed(node.gateway, MODEL, count))
        with ours.node(place) as node:
            already, cpu = node.results(), node.cpu_s()
            rate = drain(node.results, min(count, 20_000), 0.02)
            drained = node.results() - already
            spent = {part: (after - cpu[part]) / drained * 1e6 for part, after in node.cpu_s().items()}
            memory = (node.rss_mb("ingest-0"), node.rss_mb("mongod"))
            table.add_row(
                f"{count:,}",
                f"{drained:,}",
                f"{rate:,.0f}",
                f"{sum(spent.values()):,.0f}",
                *(f"{spent.get(part, 0):,.0f}" for part in ours.PARTS),
                *(f"{mb:,.0f}" for mb in memory),
            )
    return table


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Measured]:
    rows: dict[str, Measured] = {}
    for number in range(args.rounds):
        for name in ("shoal", *args.peers):
            place = folder / f"{name}-{number}"
            if name == "shoal":
                found = shoal(place, args.jobs)
            else:
                places = Places(args.root.resolve(), args.python.absolute(), args.arq_python.absolute())
                found = peer(name, places, place, args.jobs)
            for column, values in found.items():
                rows.setdefault(name, {}).setdefault(column, []).extend(values)
            print(name, {column: round(values[-1], 1) for column, values in found.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queued", default="1000,100000")
    parser.add_argument("--peers", default="", help="comma-separated: celery-redis, celery-rabbitmq, dramatiq, arq")
    parser.add_argument("--root", type=Path, help="folder of the unpacked Debian packages of Redis and RabbitMQ")
    parser.add_argument("--python", type=Path, help="interpreter of an environment with celery[redis], dramatiq[redis]")
    parser.add_argument("--arq-python", type=Path, help="interpreter of an environment with arq")
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="jobs-") as name:
        folder = Path(name)
        if args.rounds:
            table = Table("queue", *COLUMNS, title=f"{args.jobs} jobs, median of {args.rounds}")
            for row, columns in measured(args, folder).items():
                cells = [columns.get(column, []) for column in COLUMNS]
                table.add_row(row, *(f"{statistics.median(cell):,.1f}" if cell else "-" for cell in cells))
            Console(width=140).print(table)
        if queued := [int(count) for count in args.queued.split(",") if count]:
            Console(width=140).print(lengths(folder, queued))


if __name__ == "__main__":
    main()
