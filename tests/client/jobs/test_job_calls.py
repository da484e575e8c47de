"""Jobs against an ingest and a store that fail on purpose."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import grpc
import numpy as np
import pytest

import shoal
from shoal.client import AsyncClient, JobFilter, JobRequest, JobRetry, JobSelection, JobState
from shoal.client.inference.requests import AHEAD
from shoal.client.jobs.job import to_submit
from shoal.client.jobs.run_stream import RunStream
from shoal.client.jobs.submit_stream import SubmitStream
from shoal.client.transport import methods
from shoal.client.transport.retry import RetryPolicy
from shoal.errors import (
    Cancelled,
    Code,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ShoalError,
    Unavailable,
)
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store
from tests.client.served import Served

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001, longest_wait_s=0.01)
X = {"x": np.zeros(1)}


def client_of(served: Served, **options: Any) -> AsyncClient:
    return AsyncClient(served.address, retry=QUICK, **options)


class Intake:
    """Jobs by idempotency key. A stream breaks after each number of acknowledgements in `breaks`; a message may carry
    `most_submits` jobs, 0: of several it knows nothing."""

    def __init__(self, served: Served, most_submits: int = 0) -> None:
        self.most_submits = most_submits
        self.messages: list[int] = []
        """How many jobs each message had."""
        self.jobs: dict[str, ingest.SubmitRequest] = {}
        self.breaks: list[int] = []
        self.refused: dict[str, tuple[int, str]] = {}
        self.unacknowledged = 0
        self.most = 0
        served.on(methods.SUBMIT, self.submit)
        served.on(methods.SUBMIT_STREAM, self.stream, "stream_stream")

    def take(self, request: ingest.SubmitRequest) -> tuple[str, bool]:
        existed = request.idempotency_key in self.jobs
        self.jobs.setdefault(request.idempotency_key, request)
        return f"job-{[*self.jobs].index(request.idempotency_key)}", existed

    async def submit(self, request: Any, context: Any) -> Any:
        job_id, existed = self.take(request)
        state = ingest.JOB_STATE_QUEUED
        return ingest.SubmitResponse(job=ingest.Job(id=job_id, state=state, labels=request.labels), existed=existed)

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> Any:
        limit = self.breaks.pop(0) if self.breaks else None
        count = 0
        most_submits = self.most_submits
        async for item in requests:
            several = self.most_submits and len(item.submits)
            self.messages.append(several or 1)
            acks = []
            for at, submit in enumerate(item.submits if several else [item.submit]):
                acks.append(self.acknowledge(item.sequence + at, submit))
                if limit is not None and count >= limit:  # Written, and never acknowledged.
                    if acks[:-1]:
                        yield ingest.SubmitStreamResponse(acknowledgements=acks[:-1])
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                count += not acks[-1].code
            if several:
                answer = ingest.SubmitStreamResponse(acknowledgements=acks)
            else:
                answer = ingest.SubmitStreamResponse.FromString(acks[0].SerializeToString())  # The same fields.
            answer.most_submits, most_submits = most_submits, 0
            yield answer

    def acknowledge(self, sequence: int, submit: ingest.SubmitRequest) -> ingest.Acknowledgement:
        label = submit.labels.get("n", "")
        if label in self.refused:
            code, message = self.refused[label]
            return ingest.Acknowledgement(sequence=sequence, code=code, message=message)
        job_id, existed = self.take(submit)
        return ingest.Acknowledgement(sequence=sequence, job_id=job_id, existed=existed)


@pytest.fixture(params=[0, 50], ids=["one a message", "several a message"])
def intake(request: pytest.FixtureRequest, served: Served) -> Intake:
    return Intake(served, request.param)


async def test_submit_sends_every_field_and_makes_a_key(served: Served, intake: Intake) -> None:
    async with client_of(served, tenant="blue") as client:
        job = await client.jobs.submit(
            "m",
            X,
            version=2,
            deadline=timedelta(seconds=90),
            retry=JobRetry(
                max_attempts=3,
                initial_backoff_s=0.5,
                max_backoff_s=4,
                codes=["unavailable", Code.INTERNAL],
                attempt_timeout_s=600,
            ),
            delay=timedelta(seconds=7),
            labels={"a": "b"},
            parameters={"explain": True},
        )
    assert (job.id, job.state, job.ended, job.labels) == ("job-0", JobState.QUEUED, False, {"a": "b"})
    [(key, request)] = intake.jobs.items()
    assert len(key) == 32
    assert request.tenant == "blue"
    assert request.request.model_version == "2"
    assert request.request.parameters["explain"].bool_param
    assert request.deadline.ToSeconds() == 90
    assert (request.retry.max_attempts, request.retry.initial_backoff.ToMilliseconds()) == (3, 500)
    assert list(request.retry.retry_codes) == [14, 13]
    assert request.retry.attempt_timeout.ToSeconds() == 600
    assert request.delay.ToSeconds() == 7


async def test_submit_sends_start_times_and_retry_codes(served: Served, intake: Intake) -> None:
    at = datetime(2030, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=2)))
    async with client_of(served) as client:
        await client.jobs.submit(
            "m", X, not_before=at, depends_on=["a"], depends_on_keys=["k"], fails_with_dependencies=True
        )
        with pytest.raises(InvalidArgument, match="status code 'nope': use one of cancelled, unknown"):
            await client.jobs.submit("m", X, retry=JobRetry(codes=["nope"]))
    [request] = intake.jobs.values()
    assert request.not_before.ToJsonString() == "2030-01-02T01:04:00Z"
    assert list(request.depends_on) == [ingest.Dependency(job_id="a"), ingest.Dependency(idempotency_key="k")]
    assert request.on_dependency_failure == ingest.ON_DEPENDENCY_FAILURE_FAIL


async def test_a_submit_with_a_lost_answer_creates_one_job(served: Served, intake: Intake) -> None:
    lost = [True]

    async def losing(request: Any, context: Any) -> Any:
        answer = await intake.submit(request, context)
        if lost.pop() if lost else False:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
        return answer

    served.on(methods.SUBMIT, losing)
    async with client_of(served) as client:
        assert (await client.jobs.submit("m", X)).id == "job-0"
    assert len(intake.jobs) == 1


async def test_a_stream_of_jobs(served: Served, intake: Intake) -> None:
    async with client_of(served) as client:
        requests = [JobRequest("m", X, labels={"n": str(n)}) for n in range(1000)]
        acks = [ack async for ack in client.jobs.submit_many(requests, window=64)]
    assert [ack.index for ack in acks] == list(range(1000))
    assert len({ack.job_id for ack in acks}) == 1000
    assert not any(ack.existed or ack.error for ack in acks)
    assert sum(intake.messages) == 1000
    if intake.most_submits:
        assert 1 < max(intake.messages) <= intake.most_submits
        assert len(intake.messages) < 500
    else:
        assert max(intake.messages) == 1


async def test_large_jobs_share_no_message(served: Served) -> None:
    intake = Intake(served, 50)
    async with client_of(served) as client:
        requests = [JobRequest("m", {"x": np.zeros(size, np.uint8)}) for size in (1, 1, 900_000, 200_000, 2_000_000, 1)]
        acks = [ack async for ack in client.jobs.submit_many(requests * 20, window=30)]
    assert [ack.index for ack in acks] == list(range(120))
    assert max(intake.messages) == 4  # The last of one round, and the first three of the next.


async def test_a_stream_that_breaks_repeatedly_neither_loses_nor_doubles_jobs(served: Served, intake: Intake) -> None:
    intake.breaks = [3, 0, 10, 1, 50]
    # grpc may lose acknowledgements that are on their way as a stream breaks: to the client it then did nothing.
    patient = RetryPolicy(attempts=20, first_wait_s=0.001, longest_wait_s=0.01)
    async with AsyncClient(served.address, retry=patient) as client:
        requests = (JobRequest("m", X, labels={"n": str(n)}) for n in range(200))
        acks = [ack async for ack in client.jobs.submit_many(requests, window=16)]
    assert sorted(ack.index for ack in acks) == list(range(200))
    assert len(intake.jobs) == len({ack.job_id for ack in acks}) == 200
    assert served.count(methods.SUBMIT_STREAM) >= 6


async def test_a_stream_that_stays_broken_is_an_error(served: Served, intake: Intake) -> None:
    intake.breaks = [5] + [0] * 99
    async with client_of(served) as client:
        stream = client.jobs.submit_many(JobRequest("m", X) for _ in range(20))
        with pytest.raises(Unavailable, match=r"killed|the connection broke"):
            _ = [ack async for ack in stream]
    assert served.count(methods.SUBMIT_STREAM) >= 3


async def test_rejections_are_in_band_and_transient_ones_are_retried(served: Served, intake: Intake) -> None:
    intake.refused = {"1": (Code.INVALID_ARGUMENT, "labels: too many"), "2": (Code.RESOURCE_EXHAUSTED, "full")}
    requests = [
        JobRequest("m", X, labels={"n": "0"}),
        JobRequest("m", X, labels={"n": "1"}),
        JobRequest("m", X, labels={"n": "2"}),
        JobRequest("m", {"x": np.array([1j])}),
        JobRequest("m", X, labels={"n": "4"}),
    ]
    async with client_of(served) as client:
        acks = {ack.index: ack async for ack in client.jobs.submit_many(requests)}
    assert [index for index, ack in acks.items() if ack.error] == [1, 3] or set(acks) == set(range(5))
    assert isinstance(acks[1].error, InvalidArgument)
    assert acks[1].error.message == "labels: too many"
    assert isinstance(acks[3].error, InvalidArgument)
    assert acks[2].error is None
    assert served.count(methods.SUBMIT) == 1


async def test_a_slow_caller_slows_the_source(served: Served, intake: Intake) -> None:
    taken = 0

    def source() -> Iterator[JobRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield JobRequest("m", X)

    async with client_of(served) as client:
        acks = client.jobs.submit_many(source(), window=8)
        for read in range(1, 21):
            await anext(acks)
            assert taken <= read + 8 + 1 + AHEAD
        await acks.aclose()


async def test_an_error_of_the_source_is_raised_after_the_acknowledgements(served: Served, intake: Intake) -> None:
    async def source() -> AsyncIterator[JobRequest]:
        yield JobRequest("m", X)
        raise RuntimeError("out of files")

    async with client_of(served) as client:
        acks = client.jobs.submit_many(source())
        assert (await anext(acks)).job_id == "job-0"
        with pytest.raises(RuntimeError, match="out of files"):
            await anext(acks)


async def test_no_acknowledgement_in_time(served: Served) -> None:
    async def silent(requests: Any, context: Any) -> Any:
        async for _ in requests:
            pass
        await asyncio.Event().wait()
        yield

    served.on(methods.SUBMIT_STREAM, silent, "stream_stream")

    async def source() -> AsyncIterator[ingest.SubmitRequest | ShoalError]:
        yield ingest.SubmitRequest()

    async with client_of(served) as client:
        with pytest.raises(DeadlineExceeded, match="no acknowledgement within"):
            async for _ in SubmitStream(client._caller, source(), ack_s=0.1).run():
                pass


class Breaking:
    """A caller whose first stream breaks; `feeds` are what the streams send from."""

    def __init__(self, response: type[Any]) -> None:
        self.response = response
        self.feeds: list[AsyncIterator[Any]] = []
        self.sent: list[int] = []
        """By the second."""

    @contextmanager
    def bidi(self, method: Any, requests: AsyncIterator[Any], *, timeout_s: float | None) -> Iterator[Any]:
        self.feeds.append(requests)
        yield self

    async def read(self) -> Any:
        if len(self.feeds) == 1:
            await anext(self.feeds[0])
            raise Unavailable("killed")
        # grpc's writer of the stream that broke asks once more, before that of the new one does.
        async for _ in self.feeds[0]:
            pass
        request = await anext(self.feeds[1], None)
        if request is None:
            return None
        self.sent.append(request.sequence)
        return self.response(sequence=request.sequence, code=int(Code.INVALID_ARGUMENT), message="no")

    def stream_wait_s(self, error: ShoalError, *, attempt: int, begun: bool) -> float | None:
        return 0.0 if len(self.feeds) < 2 else None

    async def pause(self, seconds: float) -> None:
        pass


@pytest.mark.parametrize(
    ("stream", "response"),
    [(SubmitStream, ingest.SubmitStreamResponse), (RunStream, ingest.RunStreamResponse)],
    ids=["submit", "run"],
)
async def test_a_broken_stream_takes_no_jobs_of_the_next_stream(stream: Any, response: type[Any]) -> None:
    async def source() -> AsyncIterator[ingest.SubmitRequest | ShoalError]:
        for _ in range(3):
            yield ingest.SubmitRequest()

    caller = Breaking(response)
    assert [one.index async for one in stream(caller, source()).run()] == [0, 1, 2]
    assert (len(caller.feeds), caller.sent) == (2, [0, 1, 2])


async def test_submit_many_of_nothing(served: Served, intake: Intake) -> None:
    async with client_of(served) as client:
        assert [ack async for ack in client.jobs.submit_many([])] == []
        with pytest.raises(InvalidArgument, match="window 0"):
            await anext(client.jobs.submit_many([], window=0))


def job(state: str, **fields: Any) -> ingest.Job:
    return ingest.Job(id="a", state=ingest.JobState.Value(f"JOB_STATE_{state}"), **fields)


def standing(served: Served, *states: str, result: store.Result | None = None) -> None:
    """Job a goes through the states, one a stream; the store has `result` once it has ended."""
    left = list(states)

    async def watch(request: Any, context: Any) -> Any:
        yield ingest.WatchJobResponse(job=job(left[0]))
        if len(left) > 1:
            left.pop(0)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        await asyncio.sleep(0)

    async def get(request: Any, context: Any) -> Any:
        return ingest.GetJobResponse(job=job(left[0], last_code=13, last_message="no luck"))

    async def found(request: Any, context: Any) -> Any:
        if result is None or left[0] in ("QUEUED", "RUNNING"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "none yet")
        return store.GetResultResponse(result=result)

    served.on(methods.WATCH_JOB, watch, "unary_stream")
    served.on(methods.GET_JOB, get)
    served.on(methods.GET_RESULT, found)


def answer() -> oip.ModelInferResponse:
    response = oip.ModelInferResponse(model_name="m", model_version="1")
    response.outputs.add(name="y", datatype="INT8", shape=[1])
    response.raw_output_contents.append(b"\x07")
    return response


async def test_a_watch_survives_broken_streams_without_repeats(served: Served) -> None:
    standing(served, "QUEUED", "QUEUED", "RUNNING", "SUCCEEDED")
    async with client_of(served) as client:
        states = [job.state async for job in client.jobs.watch("a")]
    assert states == [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED]


async def test_result_waits_for_the_end(served: Served) -> None:
    result = store.Result(job_id="a", outcome=store.Result.OUTCOME_SUCCEEDED, response=answer())
    standing(served, "QUEUED", "RUNNING", "SUCCEEDED", result=result)
    async with client_of(served) as client:
        got = await client.jobs.result("a")
        assert got["y"].tolist() == [7]
        watched = served.count(methods.WATCH_JOB)
        await client.jobs.result("a")  # It is there: no need to watch.
        assert served.count(methods.WATCH_JOB) == watched


@pytest.mark.parametrize(
    ("outcome", "code", "error", "words"),
    [
        ("FAILED", 3, InvalidArgument, "job a failed in attempt 2: input 'x'"),
        ("FAILED", 8, ResourceExhausted, "job a failed in attempt 2: input 'x'"),
        ("CANCELLED", 1, Cancelled, "job a was cancelled: input 'x'"),
        ("EXPIRED", 4, DeadlineExceeded, "job a expired: its deadline passed"),
    ],
)
async def test_a_job_without_an_answer_raises_its_error(
    served: Served, outcome: str, code: int, error: type[ShoalError], words: str
) -> None:
    result = store.Result(job_id="a", code=code, message="input 'x'", attempt=2)
    result.outcome = store.Result.Outcome.Value(f"OUTCOME_{outcome}")
    standing(served, outcome, result=result)
    async with client_of(served) as client:
        with pytest.raises(error, match=words):
            await client.jobs.result("a")


async def test_an_answer_that_is_damaged_is_an_error(served: Served) -> None:
    result = store.Result(job_id="a", outcome=store.Result.OUTCOME_SUCCEEDED, answer_lost="blob x: it is damaged")
    standing(served, "SUCCEEDED", result=result)
    async with client_of(served) as client:
        with pytest.raises(DataLoss, match="job a succeeded, but its answer is damaged in the store: blob x"):
            await client.jobs.result("a")


async def test_a_job_that_has_not_ended(served: Served) -> None:
    standing(served, "RUNNING")
    async with client_of(served) as client:
        with pytest.raises(FailedPrecondition, match="job a is running: it has no result yet"):
            await client.jobs.result("a", wait=False)

    async def hang(request: Any, context: Any) -> Any:
        yield ingest.WatchJobResponse(job=job("RUNNING"))
        await asyncio.Event().wait()

    served.on(methods.WATCH_JOB, hang, "unary_stream")
    async with client_of(served) as client:
        with pytest.raises(DeadlineExceeded, match=r"job a is still running after 2 s: try again later"):
            await client.jobs.result("a", timeout=2)


async def test_an_ended_job_without_a_result(served: Served) -> None:
    async with client_of(served) as client:
        standing(served, "SUCCEEDED")
        with pytest.raises(NotFound, match="job a succeeded; its result is no longer in the store"):
            await client.jobs.result("a")
        standing(served, "DEAD")
        with pytest.raises(Internal, match="job a is dead: no luck"):
            await client.jobs.result("a", wait=False)
        standing(served, "EXPIRED")
        with pytest.raises(DeadlineExceeded, match="job a expired"):
            await client.jobs.result("a")


async def test_a_missing_job_is_not_found(served: Served) -> None:
    async def missing(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no job a")

    for method in (methods.GET_JOB, methods.GET_RESULT, methods.CANCEL_JOB):
        served.on(method, missing)

    async def missing_stream(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no job a")
        yield

    served.on(methods.WATCH_JOB, missing_stream, "unary_stream")
    async with client_of(served) as client:
        for call in (client.jobs.get("a"), client.jobs.result("a"), client.jobs.cancel("a")):
            with pytest.raises(NotFound, match="no job a"):
                await call
        with pytest.raises(NotFound, match="no job a"):
            await client.jobs.result("a", wait=False)


async def test_lists_read_all_pages(served: Served) -> None:
    asked: list[Any] = []

    async def pages(request: Any, context: Any) -> Any:
        asked.append(request)
        start = int(request.page_token or 0)
        jobs = [ingest.Job(id=str(n), state=1) for n in range(start, start + 2)]
        return ingest.ListJobsResponse(jobs=jobs, next_page_token=str(start + 2) if start < 4 else "")

    served.on(methods.LIST_JOBS, pages)
    async with client_of(served) as client:
        assert [job.id for job in await client.jobs.list(state="queued", model="m")] == list("012345")
        assert asked[0].state == ingest.JOB_STATE_QUEUED
        assert [job.id for job in await client.jobs.list(limit=3)] == list("012")
        with pytest.raises(InvalidArgument, match="state 'lost': use one of queued, running"):
            await client.jobs.list(state="lost")
        asked.clear()
        found = client.jobs.each(model="m")
        assert [(await anext(found)).id for _ in range(3)] == list("012")
        await found.aclose()
        assert len(asked) == 2, "pages are asked for as they are needed"
        assert [job.id async for job in client.jobs.each(most=5)] == list("01234")


def test_the_blocking_client(served: Served, intake: Intake) -> None:
    result = store.Result(job_id="a", outcome=store.Result.OUTCOME_SUCCEEDED, response=answer())
    standing(served, "RUNNING", "SUCCEEDED", result=result)
    with shoal.Client(served.address, retry=QUICK) as client:
        assert client.jobs.submit("m", X).id == "job-0"
        assert [ack.job_id for ack in client.jobs.submit_many([JobRequest("m", X)])] == ["job-1"]
        assert [job.state for job in client.jobs.watch("a")] == ["running", "succeeded"]
        assert client.jobs.result("a")["y"].tolist() == [7]


async def test_kept_inputs_are_returned(served: Served, intake: Intake) -> None:
    async with client_of(served) as client:
        await client.jobs.submit("m", {"x": np.arange(3.0), "t": ["a", "b"]}, keep_request=True)
        [request] = intake.jobs.values()
        assert request.keep_request

        async def payload(message: Any, context: Any) -> Any:
            if message.id != "job-0":
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "its request is not kept")
            return ingest.GetPayloadResponse(request=request.request)

        served.on(methods.GET_PAYLOAD, payload)
        inputs = await client.jobs.inputs("job-0")
        assert inputs["x"].tolist() == [0, 1, 2]
        assert inputs["t"].tolist() == [b"a", b"b"]
        with pytest.raises(FailedPrecondition, match="is not kept"):
            await client.jobs.inputs("job-1")


class Letters:
    """Dead letters, requeued or removed at most two at a time."""

    def __init__(self, served: Served, *ids: str) -> None:
        self.left = [*ids]
        self.asked: list[Any] = []
        served.on(methods.LIST_DEAD_LETTERS, self.list)
        served.on(methods.REQUEUE_DEAD_LETTERS, self.requeue)
        served.on(methods.PURGE_DEAD_LETTERS, self.purge)

    async def list(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return ingest.ListDeadLettersResponse(jobs=[ingest.Job(id=one, state=5, generation=2) for one in self.left])

    async def requeue(self, request: Any, context: Any) -> Any:
        return ingest.RequeueDeadLettersResponse(**self.take(request))

    async def purge(self, request: Any, context: Any) -> Any:
        return ingest.PurgeDeadLettersResponse(**self.take(request))

    def take(self, request: Any) -> dict[str, Any]:
        self.asked.append(request)
        if request.ids:
            refused = [one for one in request.ids if one not in self.left]
            done = [one for one in request.ids if one in self.left]
            why = [ingest.DeadLetterRefusal(id=one, code=5, message=f"no job {one}") for one in refused]
            return {"ids": done, "refused": why}
        done, self.left = self.left[:2], self.left[2:]
        return {"ids": done, "more": bool(self.left), "next_page_token": "".join(self.left)}


async def test_dead_letters(served: Served) -> None:
    letters = Letters(served, "a", "b", "c", "d", "e")
    async with client_of(served, tenant="blue") as client:
        dead = client.jobs.dead
        assert [(job.id, job.state, job.generation) for job in await dead.list(limit=2)] == [
            ("a", "dead", 2),
            ("b", "dead", 2),
        ]
        handled = await dead.requeue(["a", "x"], reason="mended")
        assert handled.ids == ("a",)
        assert isinstance(handled.refused["x"], NotFound)
        assert letters.asked[-1].reason == "mended"
        assert (await dead.purge(all=True, state="failed", code="internal")).ids == ("a", "b", "c", "d", "e")
        assert [asked.page_token for asked in letters.asked[-3:]] == ["", "cde", "e"]
        among = letters.asked[-1].filter
        assert (among.state, among.tenant, among.code) == (ingest.JOB_STATE_FAILED, "blue", 13)
        for wrong in (dead.requeue(), dead.purge(["a"], all=True), dead.list(state="running"), dead.list(code="no")):
            with pytest.raises(InvalidArgument):
                await wrong


async def test_a_requeue_of_all_goes_from_page_to_page_over_empty_ones(served: Served) -> None:
    pages = {"": (["a", "b"], "1"), "1": ([], "2"), "2": (["c"], "")}

    async def page(request: Any, context: Any) -> Any:
        ids, token = pages[request.page_token]
        return ingest.RequeueDeadLettersResponse(ids=ids, more=bool(token), next_page_token=token)

    served.on(methods.REQUEUE_DEAD_LETTERS, page)
    async with client_of(served) as client:
        assert (await client.jobs.dead.requeue(all=True)).ids == ("a", "b", "c")
    assert served.count(methods.REQUEUE_DEAD_LETTERS) == 3


async def test_an_operation_on_many_jobs_is_previewed_started_and_followed(served: Served) -> None:
    asked: list[ingest.StartJobOperationRequest] = []
    running = ingest.JobOperation(id="op", action=2, state=1, matched=7, matched_at_least=True, reason="mended")

    async def start(request: Any, context: Any) -> Any:
        asked.append(request)
        running.selection.CopyFrom(request.selection)
        return ingest.StartJobOperationResponse(operation=running)

    async def get(request: Any, context: Any) -> Any:
        return ingest.GetJobOperationResponse(
            operation=ingest.JobOperation(id=request.id, action=2, state=2, changed=6)
        )

    async def abort(request: Any, context: Any) -> Any:
        return ingest.AbortJobOperationResponse(operation=ingest.JobOperation(id=request.id, action=1, state=3))

    served.on(methods.START_JOB_OPERATION, start)
    served.on(methods.GET_JOB_OPERATION, get)
    served.on(methods.ABORT_JOB_OPERATION, abort)
    moment = datetime(2026, 11, 28, 12, tzinfo=timezone(timedelta(hours=1)))
    chosen = JobSelection(["dead"], "digits", "acme", {"run": "7"}, "internal", moment)
    async with client_of(served) as client:
        preview = await client.jobs.operations.preview("requeue", chosen)
        begun = await client.jobs.operations.start("requeue", chosen, reason="mended")
        assert (preview, begun) == (begun, begun)
        assert begun.selection == JobSelection(
            (JobState.DEAD,), "digits", "acme", {"run": "7"}, Code.INTERNAL, moment.astimezone(UTC)
        )
        assert (begun.matched, begun.matched_at_least, begun.state.ended) == (7, True, False)
        ended = await client.jobs.operations.get("op")
        assert (ended.state, ended.state.ended, ended.changed) == ("succeeded", True, 6)
        assert (await client.jobs.operations.abort("op")).state == "aborted"
        with pytest.raises(InvalidArgument, match="expected cancel, requeue, purge"):
            await client.jobs.operations.start("remove", chosen)
    assert [(each.dry_run, each.reason, each.action) for each in asked] == [(True, "", 2), (False, "mended", 2)]


async def test_result_waits_for_a_requeued_job(served: Served) -> None:
    first = store.Result(job_id="a", outcome=store.Result.OUTCOME_FAILED, code=13, message="boom", attempt=1)
    second = store.Result(job_id="a", outcome=store.Result.OUTCOME_SUCCEEDED, response=answer(), generation=2)
    standing = [first]

    async def get(request: Any, context: Any) -> Any:
        return ingest.GetJobResponse(job=job("QUEUED", generation=2))

    async def watch(request: Any, context: Any) -> Any:
        yield ingest.WatchJobResponse(job=job("QUEUED", generation=2))
        standing.append(second)
        yield ingest.WatchJobResponse(job=job("SUCCEEDED", generation=2))

    async def found(request: Any, context: Any) -> Any:
        return store.GetResultResponse(result=standing[-1])

    served.on(methods.GET_JOB, get)
    served.on(methods.WATCH_JOB, watch, "unary_stream")
    served.on(methods.GET_RESULT, found)
    async with client_of(served) as client:
        with pytest.raises(FailedPrecondition, match="job a is queued: it has no result yet"):
            await client.jobs.result("a", wait=False)
        assert (await client.jobs.result("a"))["y"].tolist() == [7]


async def test_a_watch_of_many_resumes_at_the_last_token(served: Served) -> None:
    asked: list[Any] = []

    async def watch(request: Any, context: Any) -> Any:
        asked.append(request)
        yield ingest.WatchJobsResponse(resume_token=request.resume_token or "0")
        for n in range(2):
            token = str(int(request.resume_token or 0) + n + 1)
            yield ingest.WatchJobsResponse(job=ingest.Job(id=token, state=1), resume_token=token, existing=token == "1")
        await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")

    served.on(methods.WATCH_JOBS, watch, "unary_stream")
    async with client_of(served, tenant="blue") as client:
        wanted = JobFilter(states=["dead", JobState.FAILED], model="m", labels={"a": "b"}, ids=["x"])
        told = []
        async for change in client.jobs.watch_all(wanted, include_existing=True):
            told.append((change.job.id, change.resume_token, change.existing))
            if len(told) == 5:
                break
        assert [change.job.id async for change in aslice(client.jobs.watch_all(resume_token="7"), 2)] == ["8", "9"]
        with pytest.raises(InvalidArgument, match=r"states: .* use some of queued, running"):
            await anext(client.jobs.watch_all(JobFilter(states=["lost"])))
    assert told == [("1", "1", True), *((str(n), str(n), False) for n in range(2, 6))]
    first = asked[0]
    assert (list(first.states), first.tenant, first.model_name, dict(first.labels)) == ([5, 4], "blue", "m", {"a": "b"})
    assert (first.include_existing, list(first.ids)) == (True, ["x"])
    assert [request.resume_token for request in asked] == ["", "2", "4", "7"]


async def aslice(items: AsyncIterator[Any], many: int) -> AsyncIterator[Any]:
    for _ in range(many):
        yield await anext(items)


async def test_schedules(served: Served) -> None:
    kept: dict[str, Any] = {}

    async def put(request: Any, context: Any) -> Any:
        kept[request.schedule.name] = request.schedule
        request.schedule.upcoming.add().FromJsonString("2030-01-02T03:00:00Z")
        return ingest.PutScheduleResponse(schedule=request.schedule)

    async def listed(request: Any, context: Any) -> Any:
        assert request.tenant == "blue"
        return ingest.ListSchedulesResponse(schedules=kept.values())

    async def pause(request: Any, context: Any) -> Any:
        kept[request.name].paused = not request.resume
        return ingest.PauseScheduleResponse(schedule=kept[request.name])

    async def remove(request: Any, context: Any) -> Any:
        return ingest.RemoveScheduleResponse(schedule=kept.pop(request.name))

    served.on(methods.PUT_SCHEDULE, put)
    served.on(methods.LIST_SCHEDULES, listed)
    served.on(methods.PAUSE_SCHEDULE, pause)
    served.on(methods.REMOVE_SCHEDULE, remove)
    async with client_of(served, tenant="blue") as client:
        schedules = client.jobs.schedules
        made = await schedules.put(
            "n", "0 3 * * *", JobRequest("m", X, labels={"a": "b"}), misfire="all", overlap="skip"
        )
        assert (made.name, made.tenant, made.model_name, made.misfire, made.overlap) == (
            "n",
            "blue",
            "m",
            "all",
            "skip",
        )
        assert made.upcoming == (datetime(2030, 1, 2, 3, tzinfo=UTC),)
        assert not kept["n"].job.idempotency_key
        assert [one.name for one in await schedules.list()] == ["n"]
        assert (await schedules.pause("n")).paused
        assert not (await schedules.resume("n")).paused
        assert (await schedules.remove("n")).name == "n"
        with pytest.raises(InvalidArgument, match="overlap 'maybe': use one of allow, skip, cancel"):
            await schedules.put("n", "* * * * *", JobRequest("m", X), overlap="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf"), 1e18])
async def test_invalid_seconds_are_named_and_not_sent(seconds: float) -> None:
    fields: list[tuple[str, dict[str, Any]]] = [
        ("deadline", {"deadline": seconds}),
        ("delay", {"delay": seconds}),
        ("initial_backoff_s", {"retry": JobRetry(initial_backoff_s=seconds)}),
        ("max_backoff_s", {"retry": JobRetry(max_backoff_s=seconds)}),
        ("attempt_timeout_s", {"retry": JobRetry(attempt_timeout_s=seconds)}),
    ]
    for name, given in fields:
        with pytest.raises(InvalidArgument, match=f"{name}: expected seconds, got"):
            to_submit(JobRequest("m", X, **given), oip.ModelInferRequest(), key="k", tenant="")


async def test_a_time_beyond_the_calendar_is_named() -> None:
    before = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))
    with pytest.raises(InvalidArgument, match="not_before: 0001-01-01"):
        to_submit(JobRequest("m", X, not_before=before), oip.ModelInferRequest(), key="k", tenant="")
