"""Client of a node's jobs: each is submitted once, runs at least once, and has one result."""

from __future__ import annotations

import builtins
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta

from shoal.client.inference.arrays import ArrayLike
from shoal.client.inference.inference import InferResult, Parameter, of_inputs
from shoal.client.inference.requests import RequestEncoder, as_async
from shoal.client.jobs.dead_letters import AsyncDeadLetters
from shoal.client.jobs.job import Job, JobRequest, JobRetry, JobState, Ran, Submitted, of_job, to_state, to_submit
from shoal.client.jobs.job_operations import AsyncJobOperations
from shoal.client.jobs.job_retention import AsyncJobRetention
from shoal.client.jobs.job_watch import JobChange, JobFilter, to_watch
from shoal.client.jobs.outcome import missing_result, of_result
from shoal.client.jobs.run_stream import WINDOW as RUN_WINDOW
from shoal.client.jobs.run_stream import RunStream
from shoal.client.jobs.schedules import AsyncSchedules
from shoal.client.jobs.submit_stream import WINDOW, SubmitStream
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Deadline, Timeout
from shoal.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.oip.tensors import Array
from shoal.store.v1 import store_pb2 as store

SUBMIT_S = 30.0
"""Timeout of a submit, a majority write with journal: longer than an election of the database and a retry-after."""

READ_S = 10.0
"""Timeout of a read, one indexed query."""

WATCH_S = 3_600.0
"""Timeout of a watch of one job, which may be queued for long; an hour ends a forgotten watch."""

WATCH_ALL_S = 30 * 86_400.0
"""Timeout of a watch of many jobs, which may belong to a long-running service; a month ends a forgotten watch."""

RESULT_S = 300.0
"""Timeout of a wait for a result, most of which is time in the queue."""

# Time for which the store waits for a result before the client watches the job: most jobs have ended by then.
_SOON_S = 2.0


class AsyncJobs:
    """`client.jobs`: submit, run, read, watch and cancel jobs."""

    def __init__(self, caller: Caller, tenant: str = "") -> None:
        self._caller = caller
        self._tenant = tenant
        self.dead = AsyncDeadLetters(caller, tenant)
        self.operations = AsyncJobOperations(caller, tenant)
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
        timeout: float | None = SUBMIT_S,
    ) -> Job:
        """Submit one job and return it. The job is durable when this returns, and runs even after crashes.

        A second submit with the same `idempotency_key` returns the first job; without a key the client makes one, so
        that its own retries create no second job. Without an answer, the job expires after `deadline` seconds.
        `priority` (-9 to 9) orders the tenant's own jobs. With `keep_request` the node keeps the inputs after the end.
        The job runs not before `not_before`, `delay` seconds, and the success of the jobs that it depends on (by id or
        key). When a dependency does not succeed, the job is cancelled, or with `fails_with_dependencies` fails.

        Raises:
            InvalidArgument: the message names the field.
            AlreadyExists: the key belongs to a job with another request.
            NotFound: a dependency does not exist.
            ResourceExhausted: the backlog or the tenant's quota is full; `retry_after_ms` is the time to wait.
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
        limit = self._caller.deadline(timeout)
        message = await self._message(RequestEncoder(self._caller), request, limit)
        response = await self._caller.call(methods.SUBMIT, message, timeout_s=limit, doing=f"submit to {model}")
        return of_job(response.job)

    async def submit_many(
        self, requests: AsyncIterable[JobRequest] | Iterable[JobRequest], *, window: int = WINDOW
    ) -> AsyncGenerator[Submitted, None]:
        """Submit a stream of jobs and yield an acknowledgement for each durable job; the fastest way to submit.

        At most `window` jobs are unacknowledged: when the node or the caller is slow, `requests` is read slowly. A
        broken stream is reopened. A rejected job has the error in its acknowledgement, and the stream continues.
        `requests` may be endless.

        Raises:
            Unavailable: the stream could not be reopened.
            DeadlineExceeded: no acknowledgement arrived for a minute.
        """
        if window < 1:
            raise InvalidArgument(f"window {window}: expected 1 or more")
        submission = SubmitStream(self._caller, self._messages(requests), window=window)
        async with aclosing(submission.run()) as acks:
            async for ack in acks:
                yield ack

    async def run_many(
        self, requests: AsyncIterable[JobRequest] | Iterable[JobRequest], *, window: int = RUN_WINDOW
    ) -> AsyncGenerator[Ran, None]:
        """Submit a stream of jobs and yield the result of each as it ends, on one stream.

        At most `window` jobs are without result: when the node or the caller is slow, `requests` is read slowly. A
        broken stream is resumed without lost or doubled results. A failed or rejected job has the error in its `Ran`,
        and the stream continues. `requests` may be endless. Jobs continue when the caller stops iterating.

        Raises:
            Unavailable: the stream could not be reopened.
        """
        if window < 1:
            raise InvalidArgument(f"window {window}: expected 1 or more")
        running = RunStream(self._caller, self._messages(requests), window=window)
        async with aclosing(running.run()) as results:
            async for ran in results:
                yield ran

    async def _messages(
        self, requests: AsyncIterable[JobRequest] | Iterable[JobRequest]
    ) -> AsyncGenerator[ingest.SubmitRequest | ShoalError, None]:
        encoder = RequestEncoder(self._caller)
        async for request in as_async(requests):
            try:
                yield await self._message(encoder, request)
            except ShoalError as err:
                yield err

    async def _message(
        self, encoder: RequestEncoder, request: JobRequest, limit: Deadline | None = None
    ) -> ingest.SubmitRequest:
        key = request.idempotency_key or uuid.uuid4().hex
        return to_submit(request, await encoder.encode(request, limit), key=key, tenant=self._tenant)

    async def get(self, job_id: str, *, timeout: float | None = READ_S) -> Job:
        """Return a job.

        Raises:
            NotFound: no such job.
        """
        return await self._get(job_id, timeout)

    async def _get(self, job_id: str, timeout: Timeout) -> Job:
        request = ingest.GetJobRequest(id=job_id)
        return of_job((await self._caller.call(methods.GET_JOB, request, timeout_s=timeout)).job)

    async def inputs(self, job_id: str, *, timeout: float | None = READ_S) -> dict[str, Array]:
        """Return the inputs of a job by name.

        The node keeps them until the job has succeeded, expired or been cancelled; for good with `keep_request`.

        Raises:
            NotFound: no such job.
            FailedPrecondition: the inputs are not kept.
        """
        request = ingest.GetPayloadRequest(id=job_id)
        response = await self._caller.call(methods.GET_PAYLOAD, request, timeout_s=timeout, doing=f"inputs of {job_id}")
        return of_inputs(response.request)

    async def list(
        self,
        *,
        state: JobState | str | None = None,
        model: str = "",
        tenant: str = "",
        limit: int = 100,
        timeout: float | None = READ_S,
    ) -> builtins.list[Job]:
        """Return the newest `limit` jobs; `state`, `model` and `tenant` are filters."""
        jobs = self._each(state, model, tenant, limit, self._caller.deadline(timeout))
        return [job async for job in jobs]

    def each(
        self,
        *,
        state: JobState | str | None = None,
        model: str = "",
        tenant: str = "",
        most: int | None = None,
        timeout: float | None = READ_S,
    ) -> AsyncGenerator[Job, None]:
        """Yield jobs, newest first, at most `most`; a page is read when its first job is needed. Filters as in `list`.

        `timeout` applies to each page.
        """
        return self._each(state, model, tenant, most, timeout)

    async def _each(
        self, state: JobState | str | None, model: str, tenant: str, most: int | None, timeout: Timeout
    ) -> AsyncGenerator[Job, None]:
        left, token = most if most is not None else sys.maxsize, ""
        while left > 0:
            request = ingest.ListJobsRequest(
                state=_state(state),
                model_name=model,
                tenant=tenant or self._tenant,
                page_size=min(left, 1_000),
                page_token=token,
            )
            response = await self._caller.call(methods.LIST_JOBS, request, timeout_s=timeout, doing="list jobs")
            for job in response.jobs[:left]:
                yield of_job(job)
            left, token = left - len(response.jobs), response.next_page_token
            if not token:
                return

    def watch(self, job_id: str, *, timeout: float | None = WATCH_S) -> AsyncGenerator[Job, None]:
        """Yield the job now and after each transition, until it has ended. A broken stream is reopened.

        Raises:
            NotFound: no such job.
            DeadlineExceeded: the job has not ended in time.
        """
        return self._watch(job_id, timeout)

    async def _watch(self, job_id: str, timeout: Timeout) -> AsyncGenerator[Job, None]:
        last: Job | None = None
        responses = self._caller.follow(
            methods.WATCH_JOB,
            lambda: ingest.WatchJobRequest(id=job_id),
            timeout_s=timeout,
            ended=lambda response: of_job(response.job).ended,
            doing=f"watch job {job_id}",
        )
        async for response in responses:
            job = of_job(response.job)
            # A reopened stream begins with the present state, which may be known.
            if job != last:
                last = job
                yield job

    async def watch_all(
        self,
        wanted: JobFilter | None = None,
        *,
        include_existing: bool = False,
        resume_token: str = "",
        timeout: float | None = WATCH_ALL_S,
    ) -> AsyncGenerator[JobChange, None]:
        """Yield every later transition of every job that matches, each once, for `timeout` seconds at most.

        A broken stream is reopened. With `include_existing` the existing jobs come first. To resume after a restart of
        the watching process, keep the `resume_token` of the last processed change.

        Raises:
            InvalidArgument: an invalid filter, or a token of a watch with another filter.
            OutOfRange: the token is older than the database's log: list the jobs, then start a new watch.
            DeadlineExceeded: `timeout` has passed.
        """
        wanted = wanted or JobFilter()
        last = resume_token

        def request() -> ingest.WatchJobsRequest:
            return to_watch(wanted, tenant=self._tenant, include_existing=include_existing, resume_token=last)

        responses = self._caller.follow(
            methods.WATCH_JOBS, request, timeout_s=timeout, ended=lambda _: False, doing="watch jobs"
        )
        async for response in responses:
            if response.HasField("job"):
                yield JobChange(of_job(response.job), response.resume_token, response.existing)
            last = response.resume_token

    async def cancel(self, job_id: str, reason: str = "", *, timeout: float | None = READ_S) -> Job:
        """Cancel a job: prevent its run, or the recording of its answer. Return the job, which may have ended before.

        Raises:
            NotFound: no such job.
        """
        request = ingest.CancelJobRequest(id=job_id, reason=reason)
        return of_job((await self._caller.call(methods.CANCEL_JOB, request, timeout_s=timeout)).job)

    async def result(self, job_id: str, *, wait: bool = True, timeout: float | None = RESULT_S) -> InferResult:
        """Return the answer of a job from the store; wait for the job's end at most `timeout` seconds.

        Raises:
            NotFound: no such job, or its result is no longer kept.
            DataLoss: the answer is damaged in the store.
            FailedPrecondition: the job has not ended, and `wait` is False.
            DeadlineExceeded: the job has not ended in time, or it expired.
            Cancelled: the job was cancelled.
            ShoalError: the job failed; class and message are those of its last attempt, with the job's id.
        """
        deadline = self._caller.deadline(timeout)
        left_s = deadline.left_s(self._caller.clock())
        # Half of the time at most, so that the store responds before the deadline.
        soon_s = _SOON_S if left_s is None else min(left_s / 2, _SOON_S)
        found = await self._result(job_id, deadline, soon_s if wait else 0.0)
        if found is not None and not await self._is_requeued(found, deadline):
            return of_result(found)
        if not wait:
            job = await self._get(job_id, self._soon(deadline))
            if not job.ended:
                raise FailedPrecondition(f"job {job_id} is {job.state}: it has no result yet")
        else:
            job = await self._until_ended(job_id, deadline)
        found = await self._result(job_id, deadline)
        if found is None:
            raise missing_result(job)
        return of_result(found)

    def _soon(self, deadline: Deadline) -> Deadline:
        """Return the deadline of a read within a longer wait."""
        return deadline.capped(READ_S, self._caller.clock())

    async def _is_requeued(self, found: store.Result, deadline: Deadline) -> bool:
        """Return True when a recorded failure belongs to a generation of the job before the present one."""
        if found.outcome != store.Result.OUTCOME_FAILED:
            return False
        try:
            return (await self._get(found.job_id, self._soon(deadline))).generation > max(1, found.generation)
        except ShoalError:
            # The job is deleted, ingest is unavailable, or time is up: the recorded failure is the best response.
            return False

    async def _result(self, job_id: str, deadline: Deadline, wait_s: float = 0.0) -> store.Result | None:
        request = store.GetResultRequest(job_id=job_id)
        if wait_s > 0:
            request.wait.FromNanoseconds(int(wait_s * 1e9))
        try:
            response = await self._caller.call(
                methods.GET_RESULT, request, timeout_s=self._soon(deadline), doing=f"result of job {job_id}"
            )
        except NotFound:
            return None
        return response.result

    async def _until_ended(self, job_id: str, deadline: Deadline) -> Job:
        last: Job | None = None
        try:
            async for job in self._watch(job_id, deadline):
                last = job
        except DeadlineExceeded as err:
            state = f"is still {last.state}" if last is not None else "is in an unknown state"
            after = "" if deadline.timeout_s is None else f" after {deadline.timeout_s:g} s"
            raise DeadlineExceeded(f"job {job_id} {state}{after}: try again later") from err
        # A watch ends with an ended job or raises.
        assert last is not None
        return last


def _state(state: JobState | str | None) -> str:
    try:
        return to_state(state)
    except ValueError:
        known = ", ".join(each for each in JobState if each is not JobState.UNKNOWN)
        raise InvalidArgument(f"state {state!r}: use one of {known}") from None
