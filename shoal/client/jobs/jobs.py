"""The jobs of a node: submitted once, run at least once, with one result."""

from __future__ import annotations

import builtins
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta

from shoal.client.inference.arrays import ArrayLike
from shoal.client.inference.inference import InferResult, Parameter, of_inputs
from shoal.client.inference.requests import Asker, each
from shoal.client.jobs.dead_letters import AsyncDeadLetters
from shoal.client.jobs.job import Job, JobRequest, JobRetry, JobState, Ran, Submitted, of_job, to_state, to_submit
from shoal.client.jobs.job_retention import AsyncJobRetention
from shoal.client.jobs.job_watch import JobChange, JobFilter, to_watch
from shoal.client.jobs.outcome import of_result, without_result
from shoal.client.jobs.run_stream import WINDOW as RUN_WINDOW
from shoal.client.jobs.run_stream import Running
from shoal.client.jobs.schedules import AsyncSchedules
from shoal.client.jobs.submit_stream import WINDOW, Submission
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.oip.tensors import Array
from shoal.store.v1 import store_pb2 as store

SUBMIT_S = 30.0
"""A majority, journaled write: it outlasts an election of the database, and a backlog's retry-after."""

READ_S = 10.0
"""One indexed query."""

WATCH_S = 3_600.0
"""Jobs may wait long for their turn; an hour ends a watch that was forgotten."""

WATCH_ALL_S = 30 * 86_400.0
"""A watch of many is a service of somebody's own: a month, then it wants to be seen again."""

RESULT_S = 300.0
"""Waiting for a result is waiting for a queue: five minutes, then say how it stands."""

_SOON_S = 2.0
# How long the store is asked to wait for a result before the job is watched: most have ended by then.


class AsyncJobs:
    """`client.jobs`."""

    def __init__(self, caller: Caller, tenant: str = "") -> None:
        self._caller = caller
        self._tenant = tenant
        self.dead = AsyncDeadLetters(caller, tenant)
        self.schedules = AsyncSchedules(caller, tenant)
        self.retention = AsyncJobRetention(caller)

    async def submit(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        outputs: Sequence[str] | None = None,
        version: int | str = "",
        parameters: Mapping[str, Parameter] | None = None,
        datatypes: Mapping[str, str] | None = None,
        idempotency_key: str = "",
        tenant: str = "",
        deadline: float | timedelta | None = None,
        retry: JobRetry | None = None,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        keep_request: bool = False,
        not_before: datetime | None = None,
        delay: float | timedelta | None = None,
        depends_on: Sequence[str] = (),
        depends_on_keys: Sequence[str] = (),
        fails_with_dependencies: bool = False,
        timeout: float = SUBMIT_S,
    ) -> Job:
        """Hands in one job. When this returns it is durable: it will run, whatever is killed when.

        With an `idempotency_key` a second submit returns the first job; without, the client makes one, so that its own
        retries make no second job. The job expires after `deadline` seconds without an answer. `priority` (-9 to 9)
        orders the tenant's own jobs. With `keep_request` its inputs stay in the node when it is done. It is not run
        before `not_before`, nor before `delay` seconds have passed, nor before the jobs that it depends on (by id or
        key) have succeeded; when one of these does not, it is cancelled, or fails.

        Raises:
            InvalidArgument: names what is wrong.
            AlreadyExists: the key was used with another request.
            NotFound: it depends on a job that there is not.
            ResourceExhausted: the backlog is full, or the tenant's quota is; `retry_after_ms` says when to come back.
        """
        request = JobRequest(
            model,
            inputs,
            outputs=outputs,
            version=version,
            parameters=parameters,
            datatypes=datatypes or {},
            idempotency_key=idempotency_key,
            tenant=tenant,
            deadline=deadline,
            retry=retry,
            labels=labels or {},
            priority=priority,
            keep_request=keep_request,
            not_before=not_before,
            delay=delay,
            depends_on=depends_on,
            depends_on_keys=depends_on_keys,
            fails_with_dependencies=fails_with_dependencies,
        )
        message = await self._message(Asker(self._caller), request)
        answer = await self._caller.call(methods.SUBMIT, message, timeout_s=timeout, doing=f"submit to {model}")
        return of_job(answer.job)

    async def submit_many(
        self, requests: AsyncIterable[JobRequest] | Iterable[JobRequest], *, window: int = WINDOW
    ) -> AsyncGenerator[Submitted, None]:
        """Hands in a stream of jobs, the fast way; gives an acknowledgement for each once it is durable.

        At most `window` are on their way: when the node or the reader of the acknowledgements is slow, `requests` wait.
        A stream that breaks is opened again. A job that is refused has its error in its acknowledgement, and the stream
        goes on. `requests` may be endless.

        Raises:
            Unavailable: the stream could not be kept up.
            DeadlineExceeded: no acknowledgement came for a minute.
        """
        if window < 1:
            raise InvalidArgument(f"window {window}: at least one job must be on its way")
        submission = Submission(self._caller, self._messages(requests), window=window)
        async with aclosing(submission.run()) as acks:
            async for ack in acks:
                yield ack

    async def run_many(
        self, requests: AsyncIterable[JobRequest] | Iterable[JobRequest], *, window: int = RUN_WINDOW
    ) -> AsyncGenerator[Ran, None]:
        """Hands in a stream of jobs, and gives the result of each as it ends, on one stream.

        At most `window` have no result: when the node or the reader of the results is slow, `requests` wait. A stream
        that breaks is taken up again: nothing is lost, and nothing has two results. A job that fails, or is refused,
        has its error in its `Ran`, and the stream goes on. `requests` may be endless. Jobs go on when one leaves early.

        Raises:
            Unavailable: the stream could not be kept up.
        """
        if window < 1:
            raise InvalidArgument(f"window {window}: at least one job must be on its way")
        running = Running(self._caller, self._messages(requests), window=window)
        async with aclosing(running.run()) as results:
            async for ran in results:
                yield ran

    async def _messages(
        self, requests: AsyncIterable[JobRequest] | Iterable[JobRequest]
    ) -> AsyncGenerator[ingest.SubmitRequest | ShoalError, None]:
        asker = Asker(self._caller)
        async for request in each(requests):
            try:
                yield await self._message(asker, request)
            except ShoalError as err:
                yield err

    async def _message(self, asker: Asker, request: JobRequest) -> ingest.SubmitRequest:
        key = request.idempotency_key or uuid.uuid4().hex
        return to_submit(request, await asker.message(request), key=key, tenant=self._tenant)

    async def get(self, job_id: str, *, timeout: float = READ_S) -> Job:
        """How a job stands.

        Raises:
            NotFound: no such job.
        """
        request = ingest.GetJobRequest(id=job_id)
        return of_job((await self._caller.call(methods.GET_JOB, request, timeout_s=timeout)).job)

    async def inputs(self, job_id: str, *, timeout: float = READ_S) -> dict[str, Array]:
        """The inputs of a job by name, while the node keeps them: while it is under way, when it failed, and for ever
        when it was submitted with `keep_request`.

        Raises:
            NotFound: no such job.
            FailedPrecondition: they are not kept.
        """
        request = ingest.GetPayloadRequest(id=job_id)
        answer = await self._caller.call(methods.GET_PAYLOAD, request, timeout_s=timeout, doing=f"inputs of {job_id}")
        return of_inputs(answer.request)

    async def list(
        self,
        *,
        state: JobState | str | None = None,
        model: str = "",
        tenant: str = "",
        limit: int = 100,
        timeout: float = READ_S,
    ) -> builtins.list[Job]:
        """The newest `limit` jobs, of those in `state`, of `model` and of `tenant` when these are given."""
        jobs = self.each(state=state, model=model, tenant=tenant, most=limit, timeout=timeout)
        return [job async for job in jobs]

    async def each(
        self,
        *,
        state: JobState | str | None = None,
        model: str = "",
        tenant: str = "",
        most: int | None = None,
        timeout: float = READ_S,
    ) -> AsyncGenerator[Job, None]:
        """As `list`, one job after the other, however many there are: the next page is asked for when it is needed.

        `timeout` is each page's.
        """
        left, token = most if most is not None else sys.maxsize, ""
        while left > 0:
            request = ingest.ListJobsRequest(
                state=_state(state),
                model_name=model,
                tenant=tenant or self._tenant,
                page_size=min(left, 1_000),
                page_token=token,
            )
            answer = await self._caller.call(methods.LIST_JOBS, request, timeout_s=timeout, doing="list jobs")
            for job in answer.jobs[:left]:
                yield of_job(job)
            left, token = left - len(answer.jobs), answer.next_page_token
            if not token:
                return

    async def watch(self, job_id: str, *, timeout: float = WATCH_S) -> AsyncGenerator[Job, None]:
        """A job as it stands, and again after each transition, until it has ended. Goes on where a stream breaks.

        Raises:
            NotFound: no such job.
            DeadlineExceeded: it has not ended in time.
        """
        last: Job | None = None
        answers = self._caller.follow(
            methods.WATCH_JOB,
            lambda: ingest.WatchJobRequest(id=job_id),
            timeout_s=timeout,
            ended=lambda answer: of_job(answer.job).ended,
            doing=f"watch job {job_id}",
        )
        async for answer in answers:
            job = of_job(answer.job)
            if job != last:  # A stream that was opened again begins with what is known.
                last = job
                yield job

    async def watch_all(
        self,
        wanted: JobFilter | None = None,
        *,
        include_existing: bool = False,
        resume_token: str = "",
        timeout: float = WATCH_ALL_S,
    ) -> AsyncGenerator[JobChange, None]:
        """Every transition of every job that matches, once, from now on, for `timeout` seconds at most.

        Goes on where a stream breaks. With `include_existing` the jobs that are there are told first. To go on after
        the watcher itself was stopped, keep the `resume_token` of what was dealt with last.

        Raises:
            InvalidArgument: a filter that makes no sense, or a token of another one.
            OutOfRange: the token is older than the database's log: list the jobs, and watch anew.
            DeadlineExceeded: `timeout` has passed.
        """
        wanted = wanted or JobFilter()
        last = resume_token

        def request() -> ingest.WatchJobsRequest:
            return to_watch(wanted, tenant=self._tenant, include_existing=include_existing, resume_token=last)

        answers = self._caller.follow(
            methods.WATCH_JOBS, request, timeout_s=timeout, ended=lambda _: False, doing="watch jobs"
        )
        async for answer in answers:
            if answer.HasField("job"):
                yield JobChange(of_job(answer.job), answer.resume_token, answer.existing)
            last = answer.resume_token

    async def cancel(self, job_id: str, reason: str = "", *, timeout: float = READ_S) -> Job:
        """Asks that a job not run, or that its answer not be recorded. Returns how it stands: it may have ended before.

        Raises:
            NotFound: no such job.
        """
        request = ingest.CancelJobRequest(id=job_id, reason=reason)
        return of_job((await self._caller.call(methods.CANCEL_JOB, request, timeout_s=timeout)).job)

    async def result(self, job_id: str, *, wait: bool = True, timeout: float = RESULT_S) -> InferResult:
        """The answer to a job, from the store; waits until the job has ended, at most `timeout` seconds.

        Raises:
            NotFound: no such job, or its result is no longer kept.
            DataLoss: its answer is damaged in the store.
            FailedPrecondition: it has not ended, and `wait` is False.
            DeadlineExceeded: it has not ended in time, or it expired.
            Cancelled: it was cancelled.
            ShoalError: it failed: the class and the words of its last attempt, with the job's id.
        """
        found = await self._result(job_id, min(timeout, _SOON_S) if wait else 0.0)
        if found is not None and not await self._is_requeued(found):
            return of_result(found)
        if not wait:
            job = await self.get(job_id)
            if not job.ended:
                raise FailedPrecondition(f"job {job_id} is {job.state}: it has no result yet")
        else:
            job = await self._until_ended(job_id, timeout)
        found = await self._result(job_id)
        if found is None:
            raise without_result(job)
        return of_result(found)

    async def _is_requeued(self, found: store.Result) -> bool:
        """Whether a failure that stands is of an earlier generation of the job than the one that it lives now."""
        if found.outcome != store.Result.OUTCOME_FAILED:
            return False
        try:
            return (await self.get(found.job_id)).generation > max(1, found.generation)
        except ShoalError:
            return False  # The job is gone, or cannot be asked for now: what stands is what is known.

    async def _result(self, job_id: str, wait_s: float = 0.0) -> store.Result | None:
        request = store.GetResultRequest(job_id=job_id)
        if wait_s > 0:
            request.wait.FromNanoseconds(int(wait_s * 1e9))
        try:
            answer = await self._caller.call(
                methods.GET_RESULT, request, timeout_s=READ_S, doing=f"result of job {job_id}"
            )
        except NotFound:
            return None
        return answer.result

    async def _until_ended(self, job_id: str, timeout: float) -> Job:
        last: Job | None = None
        try:
            async for job in self.watch(job_id, timeout=timeout):
                last = job
        except DeadlineExceeded as err:
            state = f"is still {last.state}" if last is not None else "did not say how it stands"
            raise DeadlineExceeded(f"job {job_id} {state} after {timeout:g} s: ask again later") from err
        assert last is not None  # A watch ends with an ended job or raises.
        return last


def _state(state: JobState | str | None) -> str:
    try:
        return to_state(state)
    except ValueError:
        known = ", ".join(each for each in JobState if each is not JobState.UNKNOWN)
        raise InvalidArgument(f"state {state!r}: use one of {known}") from None
