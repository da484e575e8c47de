"""A stream of jobs and of their results, taken up again when it breaks (see `job_stream`).

pending ──feed──> RunStream ──read──> results
   │ durable: only its job's id is kept
   └ refused for the moment: submitted by itself, at the node's pace
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
from shoal.client.transport.failures import of_answer
from shoal.client.transport.retry import is_retried
from shoal.errors import ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest

WINDOW = 256
"""Jobs without a result. The node runs 64 at once by default: some wait for it, and some for the caller."""

SUBMIT_S = 60.0
"""For one that was refused for the moment: the node says when to come back."""


@dataclass(slots=True)
class _Pending:
    """A job without a result. `submit` is dropped when it is durable."""

    submit: ingest.SubmitRequest | None
    job_id: str = ""
    is_aside: bool = False
    """It is being submitted by itself, and not sent meanwhile."""


class Running(JobStream[_Pending, ingest.RunStreamRequest, ingest.RunStreamResponse, Ran]):
    """One stream. `run()` gives the results as jobs end."""

    def __init__(
        self, caller: Caller, source: AsyncIterator[ingest.SubmitRequest | ShoalError], *, window: int = WINDOW
    ) -> None:
        super().__init__(caller, source, methods.RUN_STREAM, window=window)
        self._aside: set[asyncio.Task[None]] = set()

    async def run(self) -> AsyncGenerator[Ran, None]:
        """Raises what the source raised, or why the stream could not be kept up, after the results so far."""
        try:
            async with aclosing(super().run()) as results:
                async for ran in results:
                    yield ran
        finally:
            for task in self._aside:
                task.cancel()
            await asyncio.gather(*self._aside, return_exceptions=True)

    def _kept(self, submit: ingest.SubmitRequest) -> _Pending:
        return _Pending(submit)

    def _refusal(self, index: int, error: ShoalError) -> Ran:
        return Ran(index, error=error)

    def _next_request(self, outbox: deque[int]) -> ingest.RunStreamRequest | None:
        requests = self._filled(outbox, self._request)
        if self._most == 1 or not requests:
            return requests[0] if requests else None
        # Also one by itself: what comes as one of several is answered with others.
        return ingest.RunStreamRequest(requests=requests)

    def _request(self, index: int) -> ingest.RunStreamRequest | None:
        pending = self._pending.get(index)
        if pending is None or pending.is_aside:
            return None
        if pending.submit is None:
            return ingest.RunStreamRequest(sequence=index, job_id=pending.job_id)
        return ingest.RunStreamRequest(sequence=index, submit=pending.submit)

    def _is_all_sent(self) -> bool:
        return super()._is_all_sent() and not self._aside

    async def _take(self, answer: ingest.RunStreamResponse) -> None:
        self._learn(answer.most_requests)
        for one in answer.answers or (answer,):
            self._take_one(one)

    def _take_one(self, answer: ingest.RunStreamResponse) -> None:
        pending = self._answered(answer.sequence)
        if pending is None or pending.is_aside:
            return
        if answer.state == ingest.JOB_STATE_QUEUED:
            pending.job_id, pending.submit = answer.job_id, None
        elif answer.job_id:
            self._done(answer.sequence, _ran(answer))
        else:
            self._refused(answer.sequence, pending, of_answer(answer.code, answer.message))

    def _refused(self, index: int, pending: _Pending, error: ShoalError) -> None:
        if pending.submit is None or not is_retried(error):
            self._done(index, self._refusal(index, error))
            return
        pending.is_aside = True
        task = asyncio.create_task(self._submit(index, pending, pending.submit))
        self._aside.add(task)
        task.add_done_callback(self._submitted)

    async def _submit(self, index: int, pending: _Pending, submit: ingest.SubmitRequest) -> None:
        try:
            answer = await self._caller.call(methods.SUBMIT, submit, timeout_s=SUBMIT_S)
        except ShoalError as err:
            self._done(index, self._refusal(index, err))
            return
        pending.job_id, pending.submit, pending.is_aside = answer.job.id, None, False
        self._outbox.append(index)

    def _submitted(self, task: asyncio.Task[None]) -> None:
        self._aside.discard(task)
        self._changed.set()


def _ran(answer: ingest.RunStreamResponse) -> Ran:
    try:
        if answer.state == ingest.JOB_STATE_SUCCEEDED:
            return Ran(answer.sequence, answer.job_id, of_response(answer.response))
        raise of_ended(answer)
    except ShoalError as err:
        return Ran(answer.sequence, answer.job_id, error=err)
