"""InferBulk: many requests in one gRPC call, each run as usual; outcomes that are ready together share a message.

    entries ──> fast path, one by one ──scheduler──> outcomes collect ──each loop iteration──> one message

A bulk is not a batch: its entries are queued beside other requests. Entries of a bulk arrive together, so that they
are mostly stacked with each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Sequence
from typing import Any

from mesh.process.tasks import end, log_failure
from mesh.rpc.call_context import CallMemory
from mesh.rpc.fast_spans import FastSpan
from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.interceptors import sampled_span, status_of
from mesh.rpc.tail_spans import NO_ATTRIBUTES, Attributes
from services.infer.fast_path.infer_fast import FastInfer
from services.infer.requests.request_memory import UNCOUNTED, RequestPart
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.access.caller_header import CALLER_HEADER, JOB_CALLER_HEADER
from shoal.errors import DeadlineExceeded, InvalidArgument, LimitReached, ResourceExhausted, ShoalError
from shoal.inference.v2 import bulk_pb2 as pb
from shoal.tenant_header import TENANT_HEADER

MAX_ENTRIES = 4_096
# Entries that are started in one iteration of the event loop. On the slow path, 4,096 held it for 390 ms.
_STARTED_AT_ONCE = 128
# Size of the outcomes in one message; a larger outcome is sent alone, further outcomes in the next message.
_MESSAGE_BYTES = 4 << 20
_RETRY = {ATTEMPT.encode(): b"2"}
_TENANT = TENANT_HEADER.encode()
CALLER, _JOB_CALLER = CALLER_HEADER.encode(), JOB_CALLER_HEADER.encode()
_NO_PREFIX = bytes(PREFIX_BYTES)


class Bulk:
    """State of one InferBulk call."""

    def __init__(
        self,
        infer: FastInfer,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
        memory: CallMemory = UNCOUNTED,
        caller: bytes | None = None,
    ) -> None:
        """`caller` is the verified caller of the call, as x-shoal-caller has it; each entry is one of its requests."""
        self._infer = infer
        self._memory = memory
        self._caller = caller
        # Bytes of the outcomes that the client has not read, and those that the memory counts for them.
        self._unread_bytes = self._held_bytes = 0
        self._instance = instance
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._entries: dict[int, Entry] = {}
        self._ready: list[pb.InferBulkResponse.Answer] = []
        self._has_outcomes = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def responses(
        self, requests: AsyncIterator[pb.InferBulkRequest]
    ) -> AsyncGenerator[pb.InferBulkResponse, None]:
        """Yield messages with the outcomes of the first message's entries, until all entries have ended.

        Raises:
            InvalidArgument: no first message, or its entries are none, too many, or two with one number.
        """
        first = await anext(requests, None)
        self._check(first.entries if first is not None else ())
        assert first is not None
        # The message, and a copy of each request.
        self._memory.hold(2 * self._memory.message_bytes)
        reader = asyncio.create_task(self._read_cancellations(requests), name="bulk")
        try:
            await self._start(first.entries)
            instance = self._instance
            while self._entries or self._ready:
                if not self._ready:
                    self._has_outcomes.clear()
                    await self._has_outcomes.wait()
                    continue
                yield pb.InferBulkResponse(answers=self._next_outcomes(), instance=instance)
                instance = ""
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for entry in list(self._entries.values()):
                entry.cancel()
            await end(reader)
            log_failure(reader)

    def _check(self, entries: Sequence[pb.InferBulkRequest.Entry]) -> None:
        if not 1 <= len(entries) <= MAX_ENTRIES:
            raise InvalidArgument(f"entries: 1 to {MAX_ENTRIES} of them in the first message, got {len(entries)}")
        numbers: set[int] = set()
        for at, entry in enumerate(entries):
            if entry.number in numbers:
                raise InvalidArgument(f"entries[{at}].number: {entry.number} is another entry's already")
            numbers.add(entry.number)

    async def _start(self, entries: Sequence[pb.InferBulkRequest.Entry]) -> None:
        now, context = self._clock(), sampled_span()
        # The interceptor ends the span of the call, which is that of all its entries.
        span = None if context is None else FastSpan(context, None, 0)
        for message in entries:
            deadline = now + message.timeout_ms / 1000 if message.timeout_ms else math.inf
            entry = Entry(self._on_outcome, message, deadline, RequestPart(self._memory), span)
            if self._caller is not None:
                entry.headers = {**entry.headers, CALLER: self._caller}
                if message.caller:
                    entry.headers[_JOB_CALLER] = message.caller
            self._entries[message.number] = entry
        for at, (message, entry) in enumerate(zip(entries, list(self._entries.values()), strict=True), 1):
            if at % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
            # Cancelled meanwhile.
            if entry.is_over:
                continue
            try:
                self._infer(_NO_PREFIX + message.request, entry)
            except Exception as err:
                entry.refuse(err)
        self._expire_entries()

    def _on_outcome(self, outcome: pb.InferBulkResponse.Answer | None, number: int, size: int) -> None:
        """Add the outcome of an entry; `size` is that of its response."""
        self._entries.pop(number, None)
        if outcome is not None:
            if self._unread_bytes + size > self._held_bytes:
                try:
                    self._hold_outcomes(size)
                except ResourceExhausted as err:
                    outcome, size = _refusal(number, err), 0
            self._unread_bytes += size
            self._ready.append(outcome)
        self._has_outcomes.set()

    def _hold_outcomes(self, size: int) -> None:
        """Count `size` bytes more of outcomes; many small ones are counted together."""
        step = max(size, _MESSAGE_BYTES)
        self._memory.hold(step)
        self._held_bytes += step

    def _next_outcomes(self) -> list[pb.InferBulkResponse.Answer]:
        count, nbytes = 0, 0
        for outcome in self._ready:
            nbytes += len(outcome.response)
            if count and nbytes > _MESSAGE_BYTES:
                break
            count += 1
        sent, self._ready = self._ready[:count], self._ready[count:]
        if not self._ready:
            self._memory.release(self._held_bytes)
            self._unread_bytes = self._held_bytes = 0
        return sent

    def _expire_entries(self) -> None:
        """Fail the entries that are past their deadline, and set a timer for the next deadline."""
        now, late = self._clock(), DeadlineExceeded("the deadline of the entry has passed")
        for entry in [entry for entry in self._entries.values() if entry.deadline <= now]:
            entry.expire(late)
        nearest = min((entry.deadline for entry in self._entries.values()), default=math.inf)
        if nearest < math.inf:
            self._timer = self._loop.call_later(max(nearest - now, 0.001), self._expire_entries)

    async def _read_cancellations(self, requests: AsyncIterator[pb.InferBulkRequest]) -> None:
        # A malformed message cancels nothing.
        with contextlib.suppress(ShoalError):
            async for request in requests:
                for number in request.given_up:
                    if (entry := self._entries.get(number)) is not None:
                        entry.cancel()


class Entry:
    """One entry of a bulk; an `infer_fast.Exchange`."""

    __slots__ = ("_number", "_on_outcome", "_part", "deadline", "headers", "is_over", "is_task", "on_end", "span")

    def __init__(
        self,
        on_outcome: Callable[[pb.InferBulkResponse.Answer | None, int, int], None],
        message: pb.InferBulkRequest.Entry,
        deadline: float,
        part: RequestPart,
        span: FastSpan | None,
    ) -> None:
        self._on_outcome = on_outcome
        self._part = part
        self._number = message.number
        self.deadline = deadline
        self.headers: dict[bytes, bytes] = _RETRY if message.is_retry else {}
        if message.tenant:
            self.headers = {**self.headers, _TENANT: message.tenant.encode("latin-1", "replace")}
        self.on_end: Callable[[], None] | None = None
        self.is_over = self.is_task = False
        self.span = span

    def reply(self, parts: Sequence[Any], size: int) -> None:
        """End the entry with a response."""
        if not self.is_over:
            self._end(pb.InferBulkResponse.Answer(number=self._number, response=b"".join(parts)), size)

    def reply_slow(self, parts: Sequence[Any], size: int, seconds: float, about: Attributes) -> None:
        """End the entry as `reply` does: ingest keeps the span of the attempt."""
        self.reply(parts, size)

    def refuse(self, error: BaseException, seconds: float = 0.0, about: Attributes = NO_ATTRIBUTES) -> None:
        """End the entry with an error."""
        if self.is_over:
            return
        self._end(_refusal(self._number, error))

    def _end(self, outcome: pb.InferBulkResponse.Answer | None, size: int = 0) -> None:
        self.is_over = True
        # It refers to the request, which refers to this entry.
        self.on_end = None
        if self._part.held:
            self._part.close()
        self._on_outcome(outcome, self._number, size)

    @property
    def sender(self) -> Hashable:
        """The sender of the call."""
        return self._part.sender

    @property
    def room(self) -> int:
        """Bytes that `hold_response` may count now."""
        return self._part.room

    def hold(self, size: int) -> None:
        """Count `size` bytes more of memory until the entry ends. Raises ResourceExhausted when there is no room."""
        if not self.is_over:
            self._part.hold(size)

    def hold_response(self, size: int) -> None:
        """Count `size` bytes of a response that is being written, as `hold`. It may take all that is free."""
        if not self.is_over:
            self._part.hold_response(size)

    def release(self, size: int) -> None:
        """Release bytes that were held, before the entry ends."""
        self._part.release(size)

    def expire(self, error: ShoalError) -> None:
        """End the entry because its deadline has passed. Does nothing after the end."""
        if self.is_over:
            return
        on_end = self.on_end
        self.refuse(error)
        if on_end is not None:
            on_end()

    def cancel(self) -> None:
        """End the entry without an outcome: the client has cancelled it."""
        if not self.is_over:
            on_end = self.on_end
            self._end(None)
            if on_end is not None:
                on_end()


def _refusal(number: int, error: BaseException) -> pb.InferBulkResponse.Answer:
    """Return the outcome of an entry that has failed."""
    code, message, _ = status_of(error)
    outcome = pb.InferBulkResponse.Answer(number=number, code=code.value[0], message=message)
    if isinstance(error, ShoalError) and error.retry_after_ms is not None:
        outcome.retry_after_ms = error.retry_after_ms
        outcome.is_limited = isinstance(error, LimitReached)
    return outcome
