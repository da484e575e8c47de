"""Client of one of the other queues, for its own environment: `python caller.py submit N CLIENTS`, `latency N`.

Prints one JSON document. `submit` times N jobs of CLIENTS concurrent clients (threads; asyncio tasks for arq).
`latency` is the time from submit to the read result, one job at a time.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import tasks


def send(number: int) -> Any:
    return tasks.task.delay(number) if tasks.KIND.startswith("celery") else tasks.task.send(number)


def wait(sent: Any) -> Any:
    if tasks.KIND.startswith("celery"):
        return sent.get(timeout=60)
    return sent.get_result(block=True, timeout=60_000)


def submit(count: int, clients: int) -> float:
    # Connect before the measurement.
    send(-1)
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        list(pool.map(send, range(count)))
        return count / (time.perf_counter() - began)


async def submit_arq(count: int, clients: int) -> float:
    from arq import create_pool

    pool = await create_pool(tasks.WorkerSettings.redis_settings)
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await pool.enqueue_job("task", number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - began)


def latency(count: int) -> list[float]:
    took = []
    for number in range(count):
        began = time.perf_counter()
        wait(send(number))
        took.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.03)
    return took


async def latency_arq(count: int) -> list[float]:
    from arq import create_pool

    pool, took = await create_pool(tasks.WorkerSettings.redis_settings), []
    for number in range(count):
        began = time.perf_counter()
        job = await pool.enqueue_job("task", number)
        await job.result(timeout=60, poll_delay=0.003)
        took.append((time.perf_counter() - began) * 1e3)
        await asyncio.sleep(0.03)
    return took


def main() -> None:
    what, *texts = sys.argv[1:]
    numbers = [int(text) for text in texts]
    is_arq = tasks.KIND == "arq"
    if what == "submit":
        found: Any = asyncio.run(submit_arq(*numbers)) if is_arq else submit(*numbers)
    else:
        found = sorted(asyncio.run(latency_arq(*numbers)) if is_arq else latency(*numbers))
        found = {"p50": statistics.median(found), "p99": found[int(len(found) * 0.99) - 1]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
