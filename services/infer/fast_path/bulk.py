"""Many requests in one call: each goes its ordinary way, and its answer leaves with those that are done just then.

    entries ──> fast path, one by one ──scheduler──> answers gather ──once a turn of the loop──> one message

A bulk is no batch: its entries stand in the queue beside everybody's. They arrive together, so what they are stacked
with is mostly each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from mesh.process.tasks import end, log_failure
from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.interceptors import status_of
from services.infer.fast_path.infer_fast import TENANT, FastInfer
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.errors import DeadlineExceeded, InvalidArgument, ShoalError
from shoal.inference.v2 import bulk_pb2 as pb

MOST_ENTRIES = 4_096
_MESSAGE_BYTES = 4 << 20
# Answers of one message; a larger one goes alone. What is ready beyond it goes in the next.
_RETRY = {ATTEMPT.encode(): b"2"}
_TENANT = TENANT.encode()
_NO_PREFIX = bytes(PREFIX_BYTES)


class Bulk:
    """One call."""

    def __init__(self, infer: FastInfer, instance: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._infer = infer
        self._instance = instance
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._entries: dict[int, Entry] = {}
        self._ready: list[pb.InferBulkResponse.Answer] = []
        self._came = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def answers(self, requests: AsyncIterator[pb.InferBulkRequest]) -> AsyncGenerator[pb.InferBulkResponse, None]:
        """What becomes of each entry of the first message, until all are answered.

        Raises:
            InvalidArgument: the first message is none, or has no entries, too many, or two of one number.
        """
        first = await anext(requests, None)
        self._check(first.entries if first is not None else ())
        assert first is not None
        reader = asyncio.create_task(self._give_up(requests), name="bulk")
        try:
            self._start(first.entries)
            instance = self._instance
            while self._entries or self._ready:
                if not self._ready:
                    self._came.clear()
                    await self._came.wait()
                    continue
                yield pb.InferBulkResponse(answers=self._taken(), instance=instance)
                instance = ""
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for entry in list(self._entries.values()):
                entry.give_up()
            await end(reader)
            log_failure(reader)

    def _check(self, entries: Sequence[pb.InferBulkRequest.Entry]) -> None:
        if not 1 <= len(entries) <= MOST_ENTRIES:
            raise InvalidArgument(f"entries: 1 to {MOST_ENTRIES} of them in the first message, got {len(entries)}")
        numbers: set[int] = set()
        for at, entry in enumerate(entries):
            if entry.number in numbers:
                raise InvalidArgument(f"entries[{at}].number: {entry.number} is another entry's already")
            numbers.add(entry.number)

    def _start(self, entries: Sequence[pb.InferBulkRequest.Entry]) -> None:
        now = self._clock()
        for asked in entries:
            deadline = now + asked.timeout_ms / 1000 if asked.timeout_ms else math.inf
            self._entries[asked.number] = Entry(self._ended, asked, now, deadline, self._clock)
        for asked, entry in zip(entries, list(self._entries.values()), strict=True):
            try:
                self._infer(_NO_PREFIX + asked.request, entry)
            except Exception as err:
                entry.refuse(err)
        self._watch()

    def _ended(self, answer: pb.InferBulkResponse.Answer | None, number: int) -> None:
        self._entries.pop(number, None)
        if answer is not None:
            self._ready.append(answer)
        self._came.set()

    def _taken(self) -> list[pb.InferBulkResponse.Answer]:
        count, nbytes = 0, 0
        for answer in self._ready:
            nbytes += len(answer.response)
            if count and nbytes > _MESSAGE_BYTES:
                break
            count += 1
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def _watch(self) -> None:
        """Ends what is past its deadline, and sees to it that it is called again at the next."""
        now, late = self._clock(), DeadlineExceeded("the deadline of the entry has passed")
        for entry in [entry for entry in self._entries.values() if entry.deadline <= now]:
            entry.expire(late)
        nearest = min((entry.deadline for entry in self._entries.values()), default=math.inf)
        if nearest < math.inf:
            self._timer = self._loop.call_later(max(nearest - now, 0.001), self._watch)

    async def _give_up(self, requests: AsyncIterator[pb.InferBulkRequest]) -> None:
        with contextlib.suppress(ShoalError):  # What is no message gives nothing up.
            async for request in requests:
                for number in request.given_up:
                    if (entry := self._entries.get(number)) is not None:
                        entry.give_up()


class Entry:
    """One entry: to the core, it is the exchange of a call (short.Caller)."""

    __slots__ = ("_arrived", "_clock", "_ended", "_number", "deadline", "headers", "is_over", "on_end")

    def __init__(
        self,
        ended: Callable[[pb.InferBulkResponse.Answer | None, int], None],
        asked: pb.InferBulkRequest.Entry,
        now: float,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self._ended = ended
        self._number = asked.number
        self._arrived = now
        self._clock = clock
        self.deadline = deadline
        self.headers: dict[bytes, bytes] = _RETRY if asked.is_retry else {}
        if asked.tenant:
            self.headers = {**self.headers, _TENANT: asked.tenant.encode("latin-1", "replace")}
        self.on_end: Callable[[], None] | None = None
        self.is_over = False

    def reply(self, parts: Sequence[Any], size: int) -> None:
        """Ends it with an answer."""
        if not self.is_over:
            self.is_over = True
            self._ended(pb.InferBulkResponse.Answer(number=self._number, response=b"".join(parts)), self._number)

    def refuse(self, error: BaseException) -> None:
        """Ends it with an error."""
        if self.is_over:
            return
        self.is_over = True
        code, message, _ = status_of(error)
        answer = pb.InferBulkResponse.Answer(number=self._number, code=code.value[0], message=message)
        if isinstance(error, ShoalError) and error.retry_after_ms is not None:
            answer.retry_after_ms = error.retry_after_ms
        self._ended(answer, self._number)

    def age_ns(self) -> int:
        """How long ago it came."""
        return int((self._clock() - self._arrived) * 1e9)

    def expire(self, error: ShoalError) -> None:
        """Its deadline has passed."""
        self.refuse(error)
        if self.on_end is not None:
            self.on_end()

    def give_up(self) -> None:
        """Nobody wants its answer any more."""
        if not self.is_over:
            self.is_over = True
            self._ended(None, self._number)
            if self.on_end is not None:
                self.on_end()
