"""A stream of jobs that is kept up: a bounded window of those that wait for an answer, sent again when it breaks.

    source ──pump──> pending (at most `window`) ──feed──> the stream ──read──> outcomes ──> the caller

An outcome frees its place in the window when the caller has taken it: a caller that is slow slows the source. Every job
carries an idempotency key, so sending one again makes no second job.
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
"""Of one message, which then costs its jobs next to nothing. A larger job goes by itself."""

P = TypeVar("P")
"""What is kept of a job that waits."""
Q = TypeVar("Q", ingest.SubmitStreamRequest, ingest.RunStreamRequest)
R = TypeVar("R", ingest.SubmitStreamResponse, ingest.RunStreamResponse)
M = TypeVar("M", bound=Message)
O = TypeVar("O")  # noqa: E741 - an outcome
"""What the caller gets of each job."""


class JobStream(ABC, Generic[P, Q, R, O]):
    """One stream of `method`. `run()` gives the outcomes as they come."""

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
        self._places = asyncio.Semaphore(window)
        self._pending: dict[int, P] = {}
        self._outbox: deque[int] = deque()
        self._outcomes: asyncio.Queue[O | None] = asyncio.Queue()  # Bounded by the window.
        self._changed = asyncio.Event()
        self._exhausted = False
        # Jobs that the node takes in one message: the first answer of a stream says so, and the others wait for it.
        # Sent one a message they would be answered so, each would make room for one, and so it would go on.
        self._most, self._is_known = 1, False
        self._answers = 0

    @abstractmethod
    def _kept(self, submit: ingest.SubmitRequest) -> P:
        """What is kept of a job of the source."""

    @abstractmethod
    def _refusal(self, index: int, error: ShoalError) -> O:
        """The outcome of a job that is not sent, or not taken."""

    @abstractmethod
    def _next_request(self, outbox: deque[int]) -> Q | None:
        """Takes from the left of `outbox`, which is not empty, what the next message carries; None: nothing of it."""

    @abstractmethod
    async def _take(self, answer: R) -> None:
        """Deals with an answer, for the jobs in it that still wait (`_pending`)."""

    def _is_all_sent(self) -> bool:
        return self._exhausted

    async def run(self) -> AsyncGenerator[O, None]:
        """Raises what the source raised, or why the stream could not be kept up, after the outcomes so far."""
        pump, delivery = asyncio.create_task(self._pump()), asyncio.create_task(self._deliver())
        try:
            while (outcome := await self._outcomes.get()) is not None:
                yield outcome
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
                    self._outcomes.put_nowait(self._refusal(index, item))
                else:
                    self._pending[index] = self._kept(item)
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
                    error: ShoalError = Unavailable(f"{self._method.name}: the stream ended early")
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
            self._outcomes.put_nowait(None)

    async def _more(self) -> bool:
        """Waits for something to send. False: there is nothing, and nothing more will come."""
        while not self._pending and not self._exhausted:
            self._changed.clear()
            await self._changed.wait()
        return bool(self._pending)

    async def _stream(self) -> None:
        """One stream, until it ends or breaks. What waits for an answer goes first."""
        self._outbox = deque(self._pending)
        self._most, self._is_known = 1, False
        with self._caller.bidi(self._method, self._feed(self._outbox), timeout_s=None) as call:
            while (answer := await self._read(call)) is not None:
                await self._take(answer)

    async def _feed(self, outbox: deque[int]) -> AsyncIterator[Q]:
        has_begun = False
        # grpc may ask a stream that has ended for one more: that must not come out of its successor's outbox.
        while outbox is self._outbox:
            if outbox and (self._is_known or not has_begun):
                if (request := self._next_request(outbox)) is not None:
                    has_begun = True
                    yield request
            elif not outbox and self._is_all_sent():
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _read(self, call: Bidi[R]) -> R | None:
        """The next answer; None at the end of the stream. A queue may be long: there is no deadline of its own."""
        return await call.read()

    def _filled(self, outbox: deque[int], made: Callable[[int], M | None], *, in_a_row: bool = False) -> list[M]:
        """Takes from the left of `outbox` what goes into one message: what `made` makes of each, but for None.

        With `in_a_row` only such whose numbers follow each other.
        """
        found, nbytes, following = list[M](), 0, outbox[0]
        while outbox and len(found) < self._most and not (in_a_row and found and outbox[0] != following):
            one = made(outbox[0])
            nbytes += 0 if one is None else one.ByteSize()
            if found and nbytes > MESSAGE_BYTES:
                break
            following = outbox.popleft() + 1
            if one is not None:
                found.append(one)
            elif in_a_row:
                break
        return found

    def _learn(self, most: int) -> None:
        """So many jobs the node takes in one message; 0: the answer does not say."""
        if most:
            self._most = min(most, MESSAGE_JOBS)
        if not self._is_known:
            self._is_known = True
            self._changed.set()

    def _answered(self, index: int) -> P | None:
        """An answer to a job has come: what is kept of it, if it still waits."""
        pending = self._pending.get(index)
        if pending is not None:
            self._answers += 1
        return pending

    def _done(self, index: int, outcome: O) -> None:
        del self._pending[index]
        self._outcomes.put_nowait(outcome)
