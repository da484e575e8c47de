"""Stream of jobs and of their results, resumed when it breaks (see `job_stream`).

pending ──feed──> RunStream ──read──> results
   │ durable: only the job's id is kept
   └ rejected for now: submitted by a unary call, at the node's pace
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from shoal.client.inference.inference import of_response
from shoal.client.jobs.job import Ran
from shoal.client.jobs.job_stream import JobStream
from shoal.client.jobs.outcome import of_ended
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.failures import of_rejection
from shoal.client.transport.retry import is_retried
from shoal.errors import ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest

WINDOW = 256
"""Jobs without a result. The node runs 64 at once by default: the others are queued, or wait for the caller."""

SUBMIT_S = 60.0
"""Timeout of the unary submit of a job that the stream rejected for now; the node sets the waits between retries."""


@dataclass(slots=True)
class _Pending:
    """A job without a result. `submit` is dropped once the job is durable."""

    submit: ingest.SubmitRequest | None
    job_id: str = ""
    in_unary_submit: bool = False
    """True during the job's unary submit, when the stream must not send the job."""


class RunStream(JobStream[_Pending, ingest.RunStreamRequest, ingest.RunStreamResponse, Ran]):
    """One stream of jobs. `run()` yields the results in the order in which the jobs end."""

    def __init__(
        self, caller: Caller, source: AsyncIterator[ingest.SubmitRequest | ShoalError], *, window: int = WINDOW
    ) -> None:
        super().__init__(caller, source, methods.RUN_STREAM, window=window)
        self._unary_submits: set[asyncio.Task[None]] = set()

    async def run(self) -> AsyncGenerator[Ran, None]:
        """Yield the results; then raise the source's error, or the error that ended the stream for good."""
        try:
            async with aclosing(super().run()) as results:
                async for ran in results:
                    yield ran
        finally:
            for task in self._unary_submits:
                task.cancel()
            await asyncio.gather(*self._unary_submits, return_exceptions=True)

    def _pending_state(self, submit: ingest.SubmitRequest) -> _Pending:
        return _Pending(submit)

    def _rejection(self, index: int, error: ShoalError) -> Ran:
        return Ran(index, error=error)

    def _next_request(self, outbox: deque[int]) -> ingest.RunStreamRequest | None:
        requests = self._pop_message(outbox, self._request)
        if self._message_jobs == 1 or not requests:
            return requests[0] if requests else None
        # A list even for one job: the node responds to jobs of a list in batches.
        return ingest.RunStreamRequest(requests=requests)

    def _request(self, index: int) -> ingest.RunStreamRequest | None:
        pending = self._pending.get(index)
        if pending is None or pending.in_unary_submit:
            return None
        if pending.submit is None:
            return ingest.RunStreamRequest(sequence=index, job_id=pending.job_id)
        return ingest.RunStreamRequest(sequence=index, submit=pending.submit)

    def _is_all_sent(self) -> bool:
        return super()._is_all_sent() and not self._unary_submits

    async def _process(self, response: ingest.RunStreamResponse) -> None:
        self._set_message_jobs(response.most_requests)
        for one in response.answers or (response,):
            self._process_one(one)

    def _process_one(self, response: ingest.RunStreamResponse) -> None:
        pending = self._record_response(response.sequence)
        if pending is None or pending.in_unary_submit:
            return
        if response.state == ingest.JOB_STATE_QUEUED:
            pending.job_id, pending.submit = response.job_id, None
        elif response.job_id:
            self._finish(response.sequence, _ran(response))
        else:
            self._rejected(response.sequence, pending, of_rejection(response.code, response.message))

    def _rejected(self, index: int, pending: _Pending, error: ShoalError) -> None:
        if pending.submit is None or not is_retried(error):
            self._finish(index, self._rejection(index, error))
            return
        pending.in_unary_submit = True
        task = asyncio.create_task(self._submit_unary(index, pending, pending.submit))
        self._unary_submits.add(task)
        task.add_done_callback(self._unary_submit_ended)

    async def _submit_unary(self, index: int, pending: _Pending, submit: ingest.SubmitRequest) -> None:
        try:
            response = await self._caller.call(methods.SUBMIT, submit, timeout_s=SUBMIT_S)
        except ShoalError as err:
            self._finish(index, self._rejection(index, err))
            return
        pending.job_id, pending.submit, pending.in_unary_submit = response.job.id, None, False
        self._outbox.append(index)

    def _unary_submit_ended(self, task: asyncio.Task[None]) -> None:
        self._unary_submits.discard(task)
        self._changed.set()


def _ran(response: ingest.RunStreamResponse) -> Ran:
    try:
        if response.state == ingest.JOB_STATE_SUCCEEDED:
            return Ran(response.sequence, response.job_id, of_response(response.response))
        raise of_ended(response)
    except ShoalError as err:
        return Ran(response.sequence, response.job_id, error=err)
