"""A stream of jobs and of their results: a bounded window of jobs without a result, taken up again when it breaks.

    source ──pump──> pending (at most `window`) ──feed──> RunStream ──read──> results ──> the caller
                        │ durable: only its job's id is kept
                        └ refused for the moment: submitted by itself, at the node's pace

A result frees its place in the window when the caller has taken it: a caller that is slow slows the source. Every job
carries an idempotency key, so sending one again makes no second job.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.client import methods
from shoal.client.calls import Caller
from shoal.client.failures import of_answer
from shoal.client.inference import of_response
from shoal.client.job import Ran
from shoal.client.outcome import of_ended
from shoal.client.retry import is_retried
from shoal.errors import ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as ingest

if TYPE_CHECKING:
    from shoal.client.calls import Bidi

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


class Running:
    """One stream. `run()` gives the results as jobs end."""

    def __init__(
        self, caller: Caller, source: AsyncIterator[ingest.SubmitRequest | ShoalError], *, window: int = WINDOW
    ) -> None:
        self._caller = caller
        self._source = source
        self._places = asyncio.Semaphore(window)
        self._pending: dict[int, _Pending] = {}
        self._outbox: deque[int] = deque()
        self._results: asyncio.Queue[Ran | None] = asyncio.Queue()  # Bounded by the window.
        self._changed = asyncio.Event()
        self._aside: set[asyncio.Task[None]] = set()
        self._exhausted = False
        self._answers = 0

    async def run(self) -> AsyncGenerator[Ran, None]:
        """Raises what the source raised, or why the stream could not be kept up, after the results so far."""
        pump, delivery = asyncio.create_task(self._pump()), asyncio.create_task(self._deliver())
        try:
            while (ran := await self._results.get()) is not None:
                yield ran
                self._places.release()
            await delivery
            await pump
        finally:
            for task in (pump, delivery, *self._aside):
                task.cancel()
            await asyncio.gather(pump, delivery, *self._aside, return_exceptions=True)

    async def _pump(self) -> None:
        index = 0
        try:
            async for item in self._source:
                await self._places.acquire()
                if isinstance(item, ShoalError):
                    self._results.put_nowait(Ran(index, error=item))
                else:
                    self._pending[index] = _Pending(item)
                    self._outbox.append(index)
                index += 1
                self._changed.set()
        finally:
            self._exhausted = True
            self._changed.set()

    async def _deliver(self) -> None:
        attempt, begun = 0, False
        try:
            while await self._more():
                before = self._answers
                try:
                    await self._stream()
                    error: ShoalError = Unavailable("RunStream: the stream ended early")
                except ShoalError as err:
                    error = err
                if not self._pending:
                    continue
                moved = self._answers > before
                attempt, begun = (1, True) if moved else (attempt + 1, begun)
                wait = self._caller.stream_wait_s(error, attempt=attempt, begun=begun)
                if wait is None:
                    raise error
                await self._caller.pause(wait)
        finally:
            self._results.put_nowait(None)

    async def _more(self) -> bool:
        """Waits for something to send. False: there is nothing, and nothing more will come."""
        while not self._pending and not self._exhausted:
            self._changed.clear()
            await self._changed.wait()
        return bool(self._pending)

    async def _stream(self) -> None:
        """One stream, until it ends or breaks. What has no result yet goes first."""
        self._outbox = deque(self._pending)
        with self._caller.bidi(methods.RUN_STREAM, self._feed(self._outbox), timeout_s=None) as call:
            while (answer := await self._read(call)) is not None:
                self._take(answer)

    async def _feed(self, outbox: deque[int]) -> AsyncIterator[ingest.RunStreamRequest]:
        # grpc may ask a stream that has ended for one more: that must not come out of its successor's outbox.
        while outbox is self._outbox:
            while outbox:
                index = outbox.popleft()
                pending = self._pending.get(index)
                if pending is not None and not pending.is_aside:
                    yield _request(index, pending)
            if self._exhausted and not self._aside:
                return
            self._changed.clear()
            await self._changed.wait()

    async def _read(
        self, call: Bidi[ingest.RunStreamRequest, ingest.RunStreamResponse]
    ) -> ingest.RunStreamResponse | None:
        """The next answer; None at the end of the stream. A queue may be long: there is no deadline of its own."""
        answer = await call.read()
        return answer if isinstance(answer, ingest.RunStreamResponse) else None  # Else: the end.

    def _take(self, answer: ingest.RunStreamResponse) -> None:
        pending = self._pending.get(answer.sequence)
        if pending is None or pending.is_aside:
            return
        self._answers += 1
        if answer.state == ingest.JOB_STATE_QUEUED:
            pending.job_id, pending.submit = answer.job_id, None
        elif answer.job_id:
            self._done(answer.sequence, _ran(answer))
        else:
            self._refused(answer.sequence, pending, of_answer(answer.code, answer.message))

    def _refused(self, index: int, pending: _Pending, error: ShoalError) -> None:
        if pending.submit is None or not is_retried(error):
            self._done(index, Ran(index, error=error))
            return
        pending.is_aside = True
        task = asyncio.create_task(self._submit(index, pending, pending.submit))
        self._aside.add(task)
        task.add_done_callback(self._submitted)

    async def _submit(self, index: int, pending: _Pending, submit: ingest.SubmitRequest) -> None:
        try:
            answer = await self._caller.call(methods.SUBMIT, submit, timeout_s=SUBMIT_S)
        except ShoalError as err:
            self._done(index, Ran(index, error=err))
            return
        pending.job_id, pending.submit, pending.is_aside = answer.job.id, None, False
        self._outbox.append(index)

    def _submitted(self, task: asyncio.Task[None]) -> None:
        self._aside.discard(task)
        self._changed.set()

    def _done(self, index: int, ran: Ran) -> None:
        del self._pending[index]
        self._results.put_nowait(ran)


def _request(index: int, pending: _Pending) -> ingest.RunStreamRequest:
    if pending.submit is None:
        return ingest.RunStreamRequest(sequence=index, job_id=pending.job_id)
    return ingest.RunStreamRequest(sequence=index, submit=pending.submit)


def _ran(answer: ingest.RunStreamResponse) -> Ran:
    try:
        if answer.state == ingest.JOB_STATE_SUCCEEDED:
            return Ran(answer.sequence, answer.job_id, of_response(answer.response))
        raise of_ended(answer)
    except ShoalError as err:
        return Ran(answer.sequence, answer.job_id, error=err)
