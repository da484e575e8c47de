"""Tasks of the other queues, for their own environments with Celery, Dramatiq or arq, onnxruntime and numpy.

Environment variables: QUEUE (celery-redis, celery-rabbitmq, dramatiq, arq), QUEUE_URL, RESULTS_URL, MODEL (an .onnx
file), and for the kill test MARKS (a file with a line for each start and each end) and WORK_MS.
"""

from __future__ import annotations

import os
import time
from typing import Any

KIND = os.environ["QUEUE"]
URL, RESULTS = os.environ["QUEUE_URL"], os.environ.get("RESULTS_URL", os.environ["QUEUE_URL"])
_MARKS, _WORK_S = os.environ.get("MARKS"), float(os.environ.get("WORK_MS", "0")) / 1000
_session: Any = None


def mark(what: str, number: int) -> None:
    """Append one line to MARKS in one write, so that a killed process leaves no partial line."""
    if _MARKS:
        with open(_MARKS, "ab", buffering=0) as out:
            out.write(f"{what} {number}\n".encode())


def infer(number: int) -> list[float]:
    """Run the tiny model on four numbers, as every queue of the comparison does."""
    global _session
    import numpy as np
    import onnxruntime

    if _session is None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        _session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
    mark("start", number)
    if _WORK_S:
        time.sleep(_WORK_S)
    answer = _session.run(None, {"x": np.full((1, 4), number, np.float32)})[0]
    mark("end", number)
    return [float(value) for value in answer[0]]


if KIND.startswith("celery"):
    from celery import Celery

    app = Celery("tasks", broker=URL, backend=RESULTS)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=4,
        broker_transport_options={"visibility_timeout": 10} if KIND == "celery-redis" else {"confirm_publish": True},
        broker_connection_retry_on_startup=True,
    )
    task = app.task(infer, name="infer")
elif KIND == "dramatiq":
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.results import Results
    from dramatiq.results.backends.redis import RedisBackend

    broker = RedisBroker(url=URL, heartbeat_timeout=5_000)
    broker.add_middleware(Results(backend=RedisBackend(url=RESULTS)))
    dramatiq.set_broker(broker)
    task = dramatiq.actor(infer, store_results=True, actor_name="infer")
else:
    from arq.connections import RedisSettings

    async def task(ctx: dict[str, Any], number: int) -> list[float]:
        return infer(number)

    class WorkerSettings:
        functions = (task,)
        redis_settings = RedisSettings.from_dsn(URL)
        poll_delay = 0.05
        job_timeout = 5
        keep_result = 3_600
