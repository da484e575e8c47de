"""A stream of jobs on its way in: a bounded window of unacknowledged ones, sent again when the stream breaks.

    source ──pump──> pending (at most `window`) ──feed──> SubmitStream ──read──> acks ──> the caller

An acknowledgement frees its place in the window when the caller has taken it: a caller that is slow slows the source.
Every job carries an idempotency key, so sending one again makes no second job.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

from shoal.client import methods
from shoal.client.calls import Caller
from shoal.client.failures import of_answer
from shoal.client.job import Submitted
from shoal.client.retry import is_retried
from shoal.errors import DeadlineExceeded, ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as ingest

if TYPE_CHECKING:
    from shoal.client.calls import Bidi

WINDOW = 256
"""Jobs without acknowledgement. The node writes them in groups of about a hundred: two groups keep it busy."""

ACK_S = 60.0
"""An acknowledgement waits for the database: a minute outlasts an election and a full backlog's retry."""


class Submission:
    """One stream of jobs. `run()` gives the acknowledgements, in the order of the stream but for those tried again."""

    def __init__(
        self,
        caller: Caller,
        source: AsyncIterator[ingest.SubmitRequest | ShoalError],
        *,
        window: int = WINDOW,
        ack_s: float = ACK_S,
    ) -> None:
        self._caller = caller
        self._source = source
        self._ack_s = ack_s
        self._places = asyncio.Semaphore(window)
        self._pending: dict[int, ingest.SubmitRequest] = {}
        self._outbox: deque[int] = deque()
        self._acks: asyncio.Queue[Submitted | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._exhausted = False
        self._acknowledged = 0

    async def run(self) -> AsyncGenerator[Submitted, None]:
        """Raises what the source raised, or why the stream could not be kept up, after what was acknowledged."""
        pump, delivery = asyncio.create_task(self._pump()), asyncio.create_task(self._deliver())
        try:
            while (ack := await self._acks.get()) is not None:
                yield ack
                self._places.release()
            await delivery
            await pump
        finally:
            pump.cancel()
            delivery.cancel()
            await asyncio.gather(pump, delivery, return_exceptions=True)

    async def _pump(self) -> None:
        index = 0
        try:
            async for item in self._source:
                await self._places.acquire()
                if isinstance(item, ShoalError):
                    self._acks.put_nowait(Submitted(index, error=item))
                else:
                    self._pending[index] = item
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
                before = self._acknowledged
                try:
                    await self._stream()
                    error: ShoalError = Unavailable("SubmitStream: the stream ended early")
                except ShoalError as err:
                    error = err
                if not self._pending:
                    continue
                moved = self._acknowledged > before
                attempt, begun = (1, True) if moved else (attempt + 1, begun)
                wait = self._caller.stream_wait_s(error, attempt=attempt, begun=begun)
                if wait is None:
                    raise error
                await self._caller.pause(wait)
        finally:
            self._acks.put_nowait(None)

    async def _more(self) -> bool:
        """Waits for something to send. False: there is nothing, and nothing more will come."""
        while not self._pending and not self._exhausted:
            self._changed.clear()
            await self._changed.wait()
        return bool(self._pending)

    async def _stream(self) -> None:
        """One stream, until it ends or breaks. What is pending goes first."""
        self._outbox = deque(self._pending)
        with self._caller.bidi(methods.SUBMIT_STREAM, self._feed(self._outbox), timeout_s=None) as call:
            while (answer := await self._read(call)) is not None:
                await self._acknowledge(answer)

    async def _feed(self, outbox: deque[int]) -> AsyncIterator[ingest.SubmitStreamRequest]:
        # grpc may ask a stream that has ended for one more: that must not come out of its successor's outbox.
        while outbox is self._outbox:
            while outbox:
                index = outbox.popleft()
                if (submit := self._pending.get(index)) is not None:
                    yield ingest.SubmitStreamRequest(sequence=index, submit=submit)
            if self._exhausted:
                return
            self._changed.clear()
            await self._changed.wait()

    async def _read(
        self, call: Bidi[ingest.SubmitStreamRequest, ingest.SubmitStreamResponse]
    ) -> ingest.SubmitStreamResponse | None:
        """The next answer; None at the end of the stream. The clock runs only while an answer is due."""
        reading = asyncio.ensure_future(call.read())
        try:
            while True:
                due = bool(self._pending)
                await asyncio.wait([reading], timeout=self._ack_s)
                if reading.done():
                    answer = reading.result()
                    return answer if isinstance(answer, ingest.SubmitStreamResponse) else None  # Else: the end.
                if due and self._pending:
                    raise DeadlineExceeded(f"SubmitStream: no acknowledgement within {self._ack_s:g} s")
        finally:
            reading.cancel()

    async def _acknowledge(self, answer: ingest.SubmitStreamResponse) -> None:
        submit = self._pending.get(answer.sequence)
        if submit is None:
            return
        ack = Submitted(answer.sequence, answer.job_id, answer.existed)
        if answer.code:
            error = of_answer(answer.code, answer.message)
            ack = await self._again(answer.sequence, submit) if is_retried(error) else Submitted(ack.index, error=error)
        del self._pending[answer.sequence]
        self._acknowledged += 1
        self._acks.put_nowait(ack)

    async def _again(self, index: int, submit: ingest.SubmitRequest) -> Submitted:
        """Submits one that was refused for the moment by itself, at the pace that the node asks for."""
        try:
            answer = await self._caller.call(methods.SUBMIT, submit, timeout_s=self._ack_s)
        except ShoalError as err:
            return Submitted(index, error=err)
        return Submitted(index, answer.job.id, answer.existed)
