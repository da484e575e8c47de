"""Many clients, each with a stream of its own, on one node: through Envoy, to a real model, and back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal.inference.v2 import inference_pb2
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.ingest.v1 import ingest_pb2_grpc
from tests.long_form import by_form

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]
STREAMS = by_form(1_000, 2_000)
JOBS = 3
CHANNELS = 20
MOST_BYTES = STREAMS * (125 << 10)
"""Memory that these streams may cost ingest. Measured with 2,000: 59 MiB, and an allocator needs room."""


def request(stream: int, sequence: int) -> pb.RunStreamRequest:
    row = np.full((1, 4), stream * JOBS + sequence, np.float32)
    infer = inference_pb2.ModelInferRequest(model_name="double", raw_input_contents=[row.tobytes()])
    infer.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return pb.RunStreamRequest(sequence=sequence, submit=pb.SubmitRequest(request=infer))


class Crowd:
    """Counts who has come how far, so that all streams are open at once."""

    def __init__(self) -> None:
        self.durable = 0
        self.all_durable = asyncio.Event()

    def one_is_durable(self) -> None:
        self.durable += 1
        if self.durable == STREAMS:
            self.all_durable.set()


async def one_client(stub: Any, stream: int, crowd: Crowd) -> list[float]:
    """Sends a job, waits until everybody has one, sends the others; the first number of each answer."""
    call = stub.RunStream(timeout=200)
    await call.write(request(stream, 0))
    answers: dict[int, float] = {}
    while len(answers) < JOBS:
        answer = await call.read()
        assert answer is not grpc.aio.EOF, "the stream ended early"
        if answer.state == pb.JOB_STATE_QUEUED:
            if answer.sequence == 0:
                crowd.one_is_durable()
                await crowd.all_durable.wait()
                for sequence in range(1, JOBS):
                    await call.write(request(stream, sequence))
                await call.done_writing()
            continue
        assert answer.state == pb.JOB_STATE_SUCCEEDED, answer
        answers[answer.sequence] = float(np.frombuffer(answer.response.raw_output_contents[0], "<f4")[0])
    assert await call.read() is grpc.aio.EOF
    return [answers[sequence] for sequence in range(JOBS)]


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


async def test_many_streams_are_open_at_once_and_each_has_its_own_results(running: Any) -> None:
    pid = running.pids()["ingest-0"]
    before = resident_bytes(pid)
    channels = [
        grpc.aio.insecure_channel(running.gateway, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(CHANNELS)
    ]
    stubs = [ingest_pb2_grpc.IngestServiceStub(channel) for channel in channels]
    crowd, most = Crowd(), before

    async def watch_memory() -> None:
        nonlocal most
        while True:
            most = max(most, resident_bytes(pid))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch_memory())
    found = await asyncio.gather(*(one_client(stubs[n % CHANNELS], n, crowd) for n in range(STREAMS)))
    watching.cancel()
    assert found == [[2.0 * (stream * JOBS + n) for n in range(JOBS)] for stream in range(STREAMS)]
    assert running.pids()["ingest-0"] == pid, "it was restarted"
    print(f"{STREAMS} streams: {(most - before) >> 20} MiB more than {before >> 20}")
    assert most - before < MOST_BYTES
    for channel in channels:
        await channel.close()


def test_lines_are_run_as_jobs_and_their_results_are_lines(running: Any, tmp_path: Path) -> None:
    lines = [f'{{"x": [[{n}, 0, 0, 0]]}}' for n in range(50)]
    lines[7], lines[9] = "no JSON", '{"x": [[1, 2]]}'
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*lines, ""]))
    done = running.shoal("jobs", "run", "double", str(file), "--key", "rows", check=False)
    assert done.returncode == 1
    answers = {each["line"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert answers.keys() == set(range(1, 51))
    assert {line for line, each in answers.items() if "error" in each} == {8, 10}
    assert "line 8 is not JSON" in answers[8]["error"]["message"]
    assert answers[10]["error"]["code"] == "INVALID_ARGUMENT"
    assert all(answers[n + 1]["answer"]["outputs"][0]["data"][0][0] == 2 * n for n in range(50) if n not in (7, 9))
    again = running.shoal("jobs", "run", "double", str(file), "--key", "rows", check=False)
    jobs = {each["line"]: each.get("job") for each in map(json.loads, again.stdout.splitlines())}
    assert jobs == {line: each.get("job") for line, each in answers.items()}, "every line keeps its job"


def test_a_client_of_the_library_runs_many(running: Any) -> None:
    rows = [np.full((1, 4), n, np.float32) for n in range(300)]
    with shoal.Client(running.gateway) as client:
        requests = (shoal.JobRequest("double", {"x": row}) for row in rows)
        results = {ran.index: ran for ran in client.jobs.run_many(requests)}
    assert all(ran.error is None for ran in results.values())
    assert [float(results[n].result["y"][0, 0]) for n in range(300)] == [2.0 * n for n in range(300)]
