"""The kill test of job queues, and the poison job: who works on jobs is killed, again and again, in the middle of it.

Jobs of 20 ms; after each further 60 results all that works on jobs (ingest and infer) is killed at once: twice, and
five times in the long form. bench/kill_jobs.py does the same beside other queues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from mesh.rpc.channel import connect
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.breakable import until
from tests.chaos.workload import are_ended, question
from tests.long_form import by_form
from tests.node.conftest import python_model

pytestmark = [pytest.mark.node, pytest.mark.timeout(400)]

JOBS, KILLS = by_form((200, 2), (500, 5))
BETWEEN = 60
POISON = 666.0
MODEL = """
import os
import time

class Model:
    inputs = {"x": ("FP32", [-1, 4])}
    outputs = {"y": ("FP32", [-1, 4])}
    max_batch_size = 4

    def predict(self, batch):
        x = batch["x"]
        if (x == 666).any():
            os._exit(7)
        time.sleep(0.02 * len(x))
        return {"y": 2 * x}
"""


@pytest.fixture(scope="module")
def running(node: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A node with one infer, which shares its process with the model."""
    folder = python_model(tmp_path_factory.mktemp("models") / "slow", MODEL)
    one = node()
    one.shoal("models", "push", str(folder), timeout_s=120)
    return one


async def submitted(gateway: str, *numbers: float) -> list[str]:
    async with connect(gateway) as channel:
        stub = ingest_pb2_grpc.IngestServiceStub(channel)
        submits = [ingest_pb2.SubmitRequest(request=question(number, "slow")) for number in numbers]
        requests = [ingest_pb2.SubmitStreamRequest(sequence=n, submit=submit) for n, submit in enumerate(submits)]
        answers = [answer async for answer in stub.SubmitStream(iter(requests), timeout=60)]
    assert all(answer.job_id for answer in answers)
    return [answer.job_id for answer in answers]


async def results_of(gateway: str, ids: Sequence[str]) -> dict[str, store_pb2.Result]:
    found: dict[str, store_pb2.Result] = {}
    async with connect(gateway) as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        for first in range(0, len(ids), 100):
            asked = store_pb2.QueryResultsRequest(job_ids=ids[first : first + 100], page_size=1_000)
            for result in (await stub.QueryResults(asked, timeout=30, wait_for_ready=True)).results:
                assert result.job_id not in found
                found[result.job_id] = result
    return found


async def test_killed_again_and_again_no_job_is_lost_doubled_or_stuck(running: Any) -> None:
    ids = await submitted(running.gateway, *map(float, range(JOBS)))
    for kill in range(1, KILLS + 1):

        async def are_there(count: int = kill * BETWEEN) -> bool:
            return len(await results_of(running.gateway, ids)) >= count

        await until(are_there, f"{kill * BETWEEN} results", within_s=90, every_s=0.2)
        workers = {name: running.kill(name) for name in ("ingest-0", "infer-0")}
        for name, pid in workers.items():
            await asyncio.to_thread(running.wait_until_restarted, name, pid)
    await until(lambda: are_ended(running.gateway), "every job ended", within_s=120, every_s=0.5)
    results = await results_of(running.gateway, ids)
    assert results.keys() == set(ids)
    for number, job_id in enumerate(ids):
        result = results[job_id]
        story = f"attempt {result.attempt}: {result.code} {result.message}"
        assert result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED, story
        assert result.response.raw_output_contents[0] == question(2.0 * number, "slow").raw_input_contents[0]


async def test_a_job_that_kills_whoever_runs_it_ends_alone(running: Any) -> None:
    numbers = [float(n) for n in range(80)]
    numbers[17] = POISON
    ids = await submitted(running.gateway, *numbers)

    async def all_have_one() -> bool:
        return len(await results_of(running.gateway, ids)) == len(ids)

    await until(all_have_one, "every job has a result", within_s=180, every_s=0.5)
    results = await results_of(running.gateway, ids)
    failed = [n for n, job_id in enumerate(ids) if results[job_id].outcome != store_pb2.Result.OUTCOME_SUCCEEDED]
    assert failed == [17], {n: results[ids[n]].message for n in failed}
    assert "the instance that ran this request died" in results[ids[17]].message
