"""Kill test of job queues, ours beside others: all worker processes are killed together, repeatedly.

    python bench/kill_jobs.py [--jobs 500] [--peers celery-redis,celery-rabbitmq,dramatiq,arq
                              --root UNPACKED --python VENV/bin/python --arq-python VENV/bin/python]

Jobs of 20 ms, two workers. Five times, after 60 more jobs have ended, the whole tree of workers is killed with kill -9
and restarted. Each start and each end of a job's work is written to a file in one unbuffered line, so duplicate runs
are visible. Shoal's tree is ingest, which dispatches jobs, and both infer, which run them. Recovery timeouts of the
others are shortened to 5 to 10 s (`queues/tasks.py`); their defaults are a minute to an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from node import save_model
from queues import node as ours
from queues.peers import Places, queue

KILLS, BETWEEN, WORK_MS = 5, 60, 20
_STALLED_S = 150.0
MODEL = """
import os, time

MARKS = {marks!r}

def mark(what, number):
    with open(MARKS, "ab", buffering=0) as out:
        out.write(b"%s %d\\n" % (what, number))

class Model:
    inputs = {{"x": ("FP32", [-1, 4])}}
    outputs = {{"y": ("FP32", [-1, 4])}}
    max_batch_size = 1

    def predict(self, batch):
        number = int(batch["x"][0, 0])
        mark(b"start", number)
        time.sleep({work_s})
        mark(b"end", number)
        return {{"y": 2 * batch["x"]}}
"""


def counted(marks: Path, what: str) -> Counter[int]:
    if not marks.exists():
        return Counter()
    lines = (line.split() for line in marks.read_text().splitlines())
    return Counter(int(number) for kind, number in lines if kind == what and int(number) >= 0)


def killed(marks: Path, results: Callable[[], int], total: int, restart: Callable[[], object]) -> tuple[float, int]:
    """Kill the workers KILLS times; return the seconds from the last kill to the last result, and the results."""
    for kill in range(1, KILLS + 1):
        while len(counted(marks, "end")) < kill * BETWEEN:
            time.sleep(0.05)
        restart()
    last = moved = time.perf_counter()
    seen = results()
    while seen < total and time.perf_counter() - moved < _STALLED_S:
        time.sleep(0.05)
        if (now := results()) > seen:
            seen, moved = now, time.perf_counter()
    return moved - last, seen


def shoal(folder: Path, jobs: int) -> tuple[Path, float, int]:
    folder.mkdir()
    marks = folder / "marks"
    code = MODEL.format(marks=str(marks), work_s=WORK_MS / 1000)
    (folder / "slow" / "1").mkdir(parents=True)
    (folder / "slow" / "1" / "model.py").write_text(code)
    isolation = 'parameters { key: "isolation" value { string_value: "none" } }'
    (folder / "slow" / "config.pbtxt").write_text(f'backend: "python"\n{isolation}\n')
    with ours.node(folder, "--replicas", "infer=2") as node:
        node.push(folder / "slow")
        # Discard the lines of the warm-up.
        marks.unlink(missing_ok=True)

        def restart() -> None:
            for name, pid in node.pids().items():
                if name.startswith(("ingest", "infer")):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        asyncio.run(ours.numbered(node.gateway, "slow", jobs))
        took, seen = killed(marks, node.results, jobs, restart)
    return marks, took, seen


def peer(name: str, places: Places, folder: Path, jobs: int) -> tuple[Path, float, int]:
    model = folder.with_suffix(".onnx")
    save_model(model)
    marks = folder.with_suffix(".marks")
    with queue(name, places, folder, model, MARKS=str(marks), WORK_MS=str(WORK_MS)) as other:
        other.call("submit", jobs, 1)
        before = other.stored()
        with other.working(2) as restart:
            took, seen = killed(marks, lambda: other.stored() - before, jobs, restart)
    return marks, took, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--peers", default="", help="comma-separated: celery-redis, celery-rabbitmq, dramatiq, arq")
    parser.add_argument("--root", type=Path, help="folder of the unpacked Debian packages of Redis and RabbitMQ")
    parser.add_argument("--python", type=Path, help="interpreter of an environment with celery[redis], dramatiq[redis]")
    parser.add_argument("--arq-python", type=Path, help="interpreter of an environment with arq")
    args = parser.parse_args()
    table = Table("queue", "results", "never ended", "ended twice", "started twice", "last result after last kill, s")
    with tempfile.TemporaryDirectory(prefix="kill-jobs-") as name:
        folder = Path(name)
        for queue_name in ("shoal", *(peer for peer in args.peers.split(",") if peer)):
            if queue_name == "shoal":
                marks, took, seen = shoal(folder / queue_name, args.jobs)
            else:
                places = Places(args.root.resolve(), args.python.absolute(), args.arq_python.absolute())
                marks, took, seen = peer(queue_name, places, folder / queue_name, args.jobs)
            starts, ends = counted(marks, "start"), counted(marks, "end")
            twice = [sum(count > 1 for count in counts.values()) for counts in (ends, starts)]
            row = (queue_name, *map(str, (seen, args.jobs - len(ends), *twice)), f"{took:.1f}")
            print(*row, flush=True)
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
