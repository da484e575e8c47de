"""Resumed stream of jobs: a bounded window of pending jobs, sent again on a new stream when the stream breaks.

    source ──pump──> pending (at most `window`) ──feed──> the stream ──read──> outcomes ──> the caller

An outcome frees its slot in the window when the caller takes it, so a slow caller slows the source. Every job carries
an idempotency key, so sending a job again creates no second job.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from google.protobuf.message import Message

from shoal.client.transport.calls import Caller
from shoal.client.transport.methods import Method
from shoal.errors import ShoalError, Unavailable
from shoal.ingest.v1 import ingest_pb2 as ingest

if TYPE_CHECKING:
    from shoal.client.transport.transport import Bidi

MESSAGE_JOBS = 100
MESSAGE_BYTES = 1 << 20
"""Size limit of one message of several jobs, which divides the cost of a message. A larger job has its own message."""

P = TypeVar("P")
"""State kept for a pending job."""
Q = TypeVar("Q", ingest.SubmitStreamRequest, ingest.RunStreamRequest)
R = TypeVar("R", ingest.SubmitStreamResponse, ingest.RunStreamResponse)
M = TypeVar("M", bound=Message)
O = TypeVar("O")  # noqa: E741 - an outcome
"""Outcome of a job, as the caller gets it."""


class JobStream(ABC, Generic[P, Q, R, O]):
    """One logical stream of `method`. `run()` yields the outcomes in the order of arrival."""

    def __init__(
        self,
        caller: Caller,
        source: AsyncIterator[ingest.SubmitRequest | ShoalError],
        method: Method[Q, R],
        *,
        window: int,
    ) -> None:
        self._caller = caller
        self._source = source
        self._method: Method[Q, R] = method
        self._slots = asyncio.Semaphore(window)
        self._pending: dict[int, P] = {}
        self._outbox: deque[int] = deque()
        # Bounded by the window.
        self._outcomes: asyncio.Queue[O | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._exhausted = False
        # Jobs that the node accepts in one message. The first response of a stream says so, and the other jobs wait for
        # it: jobs sent one a message get single responses, each response frees one slot, and batches never form.
        self._message_jobs, self._has_message_jobs = 1, False
        self._responses = 0

    @abstractmethod
    def _pending_state(self, submit: ingest.SubmitRequest) -> P:
        """Return the state to keep for a job of the source."""

    @abstractmethod
    def _rejection(self, index: int, error: ShoalError) -> O:
        """Return the outcome of a job that is not sent, or rejected."""

    @abstractmethod
    def _next_request(self, outbox: deque[int]) -> Q | None:
        """Pop jobs from the left of `outbox`, which is not empty, and return their message, or None for no message."""

    @abstractmethod
    async def _process(self, response: R) -> None:
        """Process a response for those of its jobs that are still pending (`_pending`)."""

    def _is_all_sent(self) -> bool:
        return self._exhausted

    async def run(self) -> AsyncGenerator[O, None]:
        """Yield the outcomes; then raise the source's error, or the error that ended the stream for good."""
        pump, delivery = asyncio.create_task(self._pump()), asyncio.create_task(self._deliver())
        try:
            while (outcome := await self._outcomes.get()) is not None:
                yield outcome
                self._slots.release()
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
                await self._slots.acquire()
                if isinstance(item, ShoalError):
                    self._outcomes.put_nowait(self._rejection(index, item))
                else:
                    self._pending[index] = self._pending_state(item)
                    self._outbox.append(index)
                index += 1
                self._changed.set()
        finally:
            self._exhausted = True
            self._changed.set()

    async def _deliver(self) -> None:
        attempt, begun = 0, False
        try:
            while await self._wait_for_jobs():
                before = self._responses
                try:
                    await self._stream()
                    error: ShoalError = Unavailable(f"{self._method.name}: the stream ended early")
                except ShoalError as err:
                    error = err
                if not self._pending:
                    continue
                progressed = self._responses > before
                attempt, begun = (1, True) if progressed else (attempt + 1, begun)
                wait = self._caller.stream_wait_s(error, attempt=attempt, begun=begun)
                if wait is None:
                    raise error
                await self._caller.pause(wait)
        finally:
            self._outcomes.put_nowait(None)

    async def _wait_for_jobs(self) -> bool:
        """Wait until there are jobs to send. Return False when there are none and the source has ended."""
        while not self._pending and not self._exhausted:
            self._changed.clear()
            await self._changed.wait()
        return bool(self._pending)

    async def _stream(self) -> None:
        """Run one stream until it ends or breaks. Pending jobs are sent first."""
        self._outbox = deque(self._pending)
        self._message_jobs, self._has_message_jobs = 1, False
        with self._caller.bidi(self._method, self._feed(self._outbox), timeout_s=None) as call:
            while (response := await self._read(call)) is not None:
                await self._process(response)

    async def _feed(self, outbox: deque[int]) -> AsyncIterator[Q]:
        has_begun = False
        # grpc may poll the feed of an ended stream once more, which must not take jobs of the next stream's outbox.
        while outbox is self._outbox:
            if outbox and (self._has_message_jobs or not has_begun):
                if (request := self._next_request(outbox)) is not None:
                    has_begun = True
                    yield request
            elif not outbox and self._is_all_sent():
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _read(self, call: Bidi[R]) -> R | None:
        """Return the next response; None at the end of the stream. No time limit: the queue may be long."""
        return await call.read()

    def _pop_message(self, outbox: deque[int], make: Callable[[int], M | None], *, in_a_row: bool = False) -> list[M]:
        """Pop from the left of `outbox` the jobs of one message. Return what `make` returns for each, without None.

        With `in_a_row`, stop where the job numbers are not consecutive.
        """
        found, nbytes, next_index = list[M](), 0, outbox[0]
        while outbox and len(found) < self._message_jobs and not (in_a_row and found and outbox[0] != next_index):
            one = make(outbox[0])
            nbytes += 0 if one is None else one.ByteSize()
            if found and nbytes > MESSAGE_BYTES:
                break
            next_index = outbox.popleft() + 1
            if one is not None:
                found.append(one)
            elif in_a_row:
                break
        return found

    def _set_message_jobs(self, most: int) -> None:
        """Store the number of jobs that the node accepts in one message; 0: the response has no number."""
        if most:
            self._message_jobs = min(most, MESSAGE_JOBS)
        if not self._has_message_jobs:
            self._has_message_jobs = True
            self._changed.set()

    def _record_response(self, index: int) -> P | None:
        """Record a response to a job. Return the job's state when it is still pending."""
        pending = self._pending.get(index)
        if pending is not None:
            self._responses += 1
        return pending

    def _finish(self, index: int, outcome: O) -> None:
        del self._pending[index]
        self._outcomes.put_nowait(outcome)
