"""Batches: rows per second from files to Parquet, beside a loop written by hand, and one job per row.

    python bench/batches.py [--rows 200000] [--width 4] [--rounds 3] [--growth 8]

One tiny model (x [n, width] FP32 -> 2x), one replica, one ingest. The loop reads the same Parquet with pyarrow, and
writes Parquet. Its calls go through the gateway, with 64 rows each and 16 in flight, as those of ingest. The difference
is the cost of durability. Rounds interleave the methods, and every row of every result is checked. Finally, files are
`--growth` times as large: the memory of ingest must not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from node import start, stop
from rich.console import Console
from rich.table import Table

import shoal
from shoal.client import AsyncClient, JobRequest

STACK, CALLS = 64, 16


def save_model(path: Path, width: int) -> None:
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [make.make_tensor_value_info("x", kind, ["N", width])],
        [make.make_tensor_value_info("y", kind, ["N", width])],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=9), path)


def numbers(rows: int, width: int) -> np.ndarray:
    return (np.arange(rows * width, dtype=np.float64) % 1_000_003).astype(np.float32).reshape(rows, width)


def write_inputs(folder: Path, rows: int, width: int) -> dict[str, Path]:
    x = numbers(rows, width)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), width)
    pq.write_table(pa.table({"x": column}), folder / "in.parquet")
    np.savez(folder / "in.npz", x=x)
    with (folder / "in.jsonl").open("w") as file:
        file.writelines(f'{{"x": {row}}}\n' for row in x.tolist())
    return {name: folder / f"in.{name}" for name in ("parquet", "npz", "jsonl")}


def check(parts: list[Path], rows: int, width: int) -> None:
    table = pa.concat_tables([pq.read_table(path) for path in sorted(parts)])
    flat = table.column("y").combine_chunks().flatten().to_numpy()
    if table.num_rows != rows or not np.array_equal(flat.reshape(rows, width), 2 * numbers(rows, width)):
        sys.exit("a row of the results is wrong or missing")


def batch(client: shoal.Client, source: Path, out: Path, rows: int, width: int) -> float:
    ended = client.batches.wait(client.batches.submit("double", source, out).id)
    if ended.state != "succeeded":
        sys.exit(f"the batch {ended.state}: {ended.message}")
    check([*out.glob("part-*.parquet")], rows, width)
    shutil.rmtree(out)
    return ended.seconds


def by_hand(gateway: str, source: Path, out: Path, rows: int, width: int) -> float:
    began = time.perf_counter()
    asyncio.run(_loop(gateway, source, out))
    took = time.perf_counter() - began
    check([out], rows, width)
    return took


async def _loop(gateway: str, source: Path, out: Path) -> None:
    places = asyncio.Semaphore(CALLS)

    async def ask(client: AsyncClient, x: np.ndarray) -> Any:
        async with places:
            return (await client.infer("double", {"x": x}))["y"]

    async with AsyncClient(gateway) as client:
        writer: Any = None
        for piece in pq.ParquetFile(source).iter_batches(4096, columns=["x"]):
            x = piece.column(0).flatten().to_numpy().reshape(len(piece), -1)
            answers = await asyncio.gather(*(ask(client, x[at : at + STACK]) for at in range(0, len(x), STACK)))
            y = np.concatenate(answers)
            table = pa.table({"y": pa.FixedSizeListArray.from_arrays(pa.array(y.reshape(-1)), y.shape[1])})
            writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()


def job_per_row(client: shoal.Client, rows: int, width: int) -> float:
    """Return the seconds until the last of `rows` jobs has ended."""
    x = numbers(rows, width)
    began = time.perf_counter()
    requests = (JobRequest("double", {"x": row[np.newaxis]}) for row in x)
    ids = [ack.job_id for ack in client.jobs.submit_many(requests)]
    for job_id in reversed(ids):
        client.jobs.result(job_id)
    return time.perf_counter() - began


@contextmanager
def highest_memory(pid: int) -> Any:
    """Sample the memory of a process during the block; yield a list of one element, the maximum in MiB."""
    seen, stop_it = [0.0], Event()

    def sample() -> None:
        while not stop_it.wait(0.05):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            seen[0] = max(seen[0], pages * 4096 / (1 << 20))

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop_it.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("width", 4), ("rounds", 3), ("growth", 8), ("jobs", 5_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node, ready, _ = start(folder)
        try:
            run(options, folder, str(ready["gateway"]), int(ready["pids"]["ingest-0"]))  # type: ignore[index]
        finally:
            stop(node)


def run(options: argparse.Namespace, folder: Path, gateway: str, ingest: int) -> None:
    save_model(folder / "double.onnx", options.width)
    push = [sys.executable, "-m", "shoal.cli.main", "models", "push", str(folder / "double.onnx"), "--gateway", gateway]
    subprocess.run(push, check=True, stdout=subprocess.DEVNULL)
    sources = write_inputs(folder, options.rows, options.width)
    rows, width, out = options.rows, options.width, folder / "out"
    with shoal.Client(gateway) as client:
        ways: dict[str, Callable[[], float]] = {
            f"batch, {kind}": lambda source=source: batch(client, source, out, rows, width)
            for kind, source in sources.items()
        }
        ways["by hand, parquet"] = lambda: by_hand(gateway, sources["parquet"], folder / "hand.parquet", rows, width)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, work in ways.items():
                seconds[way].append(work())
        jobs = job_per_row(client, options.jobs, width)
        with highest_memory(ingest) as small:
            batch(client, sources["parquet"], out, rows, width)
        large = folder / "large"
        large.mkdir()
        many = write_inputs(large, rows * options.growth, width)
        grown = {}
        for kind, source in many.items():
            with highest_memory(ingest) as seen:
                took = batch(client, source, out, rows * options.growth, width)
            grown[kind] = (source.stat().st_size / (1 << 20), took, seen[0])
    show(options, seconds, jobs, small[0], grown)


def show(
    options: argparse.Namespace, seconds: dict[str, list[float]], jobs: float, small: float, grown: dict[str, Any]
) -> None:
    hand = statistics.median(seconds["by hand, parquet"])
    table = Table(title=f"{options.rows:,} rows of {options.width} FP32, median of {options.rounds}")
    for column in ("way", "rows/s", "least", "most", "beside by hand"):
        table.add_column(column)
    for way, all_of in seconds.items():
        rates = sorted(options.rows / each for each in all_of)
        table.add_row(
            way,
            *(f"{rate:,.0f}" for rate in (statistics.median(rates), rates[0], rates[-1])),
            f"{hand / statistics.median(all_of):.2f}",
        )
    table.add_row(f"a job per row ({options.jobs:,})", f"{options.jobs / jobs:,.0f}", "", "", "")
    Console().print(table)
    memory = Table(title="memory of ingest, MiB at most")
    for column in ("file", "rows", "MiB of file", "rows/s", "ingest, MiB"):
        memory.add_column(column)
    memory.add_row("in.parquet", f"{options.rows:,}", "", "", f"{small:,.0f}")
    many = options.rows * options.growth
    for kind, (size, took, most) in grown.items():
        memory.add_row(f"in.{kind}", f"{many:,}", f"{size:,.0f}", f"{many / took:,.0f}", f"{most:,.0f}")
    Console().print(memory)


if __name__ == "__main__":
    main()
