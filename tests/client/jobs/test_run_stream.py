"""Streams of jobs and of their results, against an ingest that breaks them on purpose."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.client import AsyncClient, JobRequest
from shoal.client.transport import methods
from shoal.client.transport.retry import RetryPolicy
from shoal.errors import Code, InvalidArgument, Unavailable
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2 as ingest
from tests.client.served import Served

# grpc may lose answers that are on their way as a stream breaks: to the client it then did nothing.
PATIENT = RetryPolicy(attempts=20, first_wait_s=0.001, longest_wait_s=0.01)


class Runs:
    """Jobs by key; each ends at once, with its label `n` as the answer. A message may carry `most_requests`, 0: of
    several it knows nothing. A stream breaks after each number of answers in `breaks`."""

    def __init__(self, served: Served, most_requests: int) -> None:
        self.most_requests = most_requests
        self.breaks: list[int] = []
        self.refused: dict[str, tuple[int, str]] = {}
        self.jobs: dict[str, ingest.SubmitRequest] = {}
        self.messages: list[int] = []
        """How many requests each message had."""
        self.resumed = 0
        served.on(methods.RUN_STREAM, self.stream, "stream_stream")
        served.on(methods.SUBMIT, self.submit)

    def take(self, submit: ingest.SubmitRequest) -> str:
        self.jobs.setdefault(submit.idempotency_key, submit)
        return f"job-{[*self.jobs].index(submit.idempotency_key)}"

    async def submit(self, request: Any, context: Any) -> Any:
        return ingest.SubmitResponse(job=ingest.Job(id=self.take(request), state=ingest.JOB_STATE_QUEUED))

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> Any:
        left = self.breaks.pop(0) if self.breaks else 1 << 30
        most_requests = self.most_requests
        async for message in requests:
            several = bool(self.most_requests and message.requests)
            self.messages.append(len(message.requests) if several else 1)
            answers = [answer for one in (message.requests if several else [message]) for answer in self.answers(one)]
            broken, answers = len(answers) > left, answers[:left]
            left -= len(answers)
            for answer in [ingest.RunStreamResponse(answers=answers)] if several and answers else answers:
                answer.most_requests, most_requests = most_requests, 0
                yield answer
            if broken:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")

    def answers(self, request: ingest.RunStreamRequest) -> list[ingest.RunStreamResponse]:
        if request.WhichOneof("what") == "job_id":
            self.resumed += 1
            submit = [*self.jobs.values()][int(request.job_id.removeprefix("job-"))]
            return [self.ended(request.sequence, request.job_id, submit)]
        if (label := request.submit.labels["n"]) in self.refused:
            code, words = self.refused.pop(label)
            return [ingest.RunStreamResponse(sequence=request.sequence, code=code, message=words)]
        job_id = self.take(request.submit)
        durable = ingest.RunStreamResponse(sequence=request.sequence, job_id=job_id, state=ingest.JOB_STATE_QUEUED)
        return [durable, self.ended(request.sequence, job_id, request.submit)]

    def ended(self, sequence: int, job_id: str, submit: ingest.SubmitRequest) -> ingest.RunStreamResponse:
        response = oip.ModelInferResponse(model_name="m")
        response.outputs.add(name="y", datatype="INT64", shape=[1])
        response.raw_output_contents.append(np.array([int(submit.labels["n"])]).tobytes())
        state = ingest.JOB_STATE_SUCCEEDED
        return ingest.RunStreamResponse(sequence=sequence, job_id=job_id, state=state, response=response)


@pytest.fixture(params=[0, 50], ids=["one a message", "several a message"])
def runs(request: pytest.FixtureRequest, served: Served) -> Runs:
    return Runs(served, request.param)


def requests(count: int) -> list[JobRequest]:
    return [JobRequest("m", {"x": np.zeros(1)}, labels={"n": str(n)}) for n in range(count)]


async def run(served: Served, count: int, **options: Any) -> dict[int, Any]:
    """What came of each, by index; every one comes once."""
    async with AsyncClient(served.address, retry=PATIENT) as client:
        found = [ran async for ran in client.jobs.run_many(requests(count), **options)]
    assert sorted(ran.index for ran in found) == list(range(count))
    return {ran.index: ran for ran in found}


async def test_each_job_has_its_own_result(served: Served, runs: Runs) -> None:
    found = await run(served, 500)
    assert [int(found[n].result["y"][0]) for n in range(500)] == list(range(500))
    assert sum(runs.messages) == len(runs.jobs) == 500
    if runs.most_requests:
        assert 1 < max(runs.messages) <= runs.most_requests
    else:
        assert max(runs.messages) == 1


async def test_a_stream_that_breaks_again_and_again_is_taken_up(served: Served, runs: Runs) -> None:
    runs.breaks = [3, 0, 11, 1, 50, 2]
    found = await run(served, 200, window=16)
    assert [int(found[n].result["y"][0]) for n in range(200)] == list(range(200))
    assert len(runs.jobs) == 200
    assert not runs.breaks
    assert runs.resumed >= 1  # Of the odd breaks, one came between a job's two answers.


async def test_refusals_are_in_band_and_those_for_the_moment_are_tried_again(served: Served, runs: Runs) -> None:
    runs.refused = {"1": (Code.INVALID_ARGUMENT, "labels: too many"), "2": (Code.RESOURCE_EXHAUSTED, "full")}
    found = await run(served, 5)
    assert isinstance(found[1].error, InvalidArgument)
    assert [int(found[n].result["y"][0]) for n in (0, 2, 3, 4)] == [0, 2, 3, 4]
    assert served.count(methods.SUBMIT) == 1


async def test_a_stream_that_stays_broken_is_given_up(served: Served, runs: Runs) -> None:
    runs.breaks = [0] * 99
    with pytest.raises(Unavailable):
        await run(served, 3)
