"""RunStream: a client's stream as source and sink. Thousands may be open at once, so each must be cheap.

    reader ──(window)──> intake ──durable──> QUEUED ┐
                            └──> the job ends ──────┴──> outbox ──a few at a time: fetch results──> client

A job in flight is one small object and a callback, without a task, request or response. A result is fetched just before
it is sent. So a slow client holds only a few results in memory, and its stream is not read while its window is full.
All streams share a budget (`Budget`) too; the first job of each stream does not count against it.

A message carries one request, or several, whose responses are sent in bundles as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mesh.process.tasks import end, together
from mesh.rpc.call_context import CallMemory
from mesh.rpc.places import Places
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.ingest.intake.budget import Budget
from services.ingest.intake.intake import Accepted
from services.ingest.intake.stream import MOST_A_MESSAGE, Window, in_turns
from services.ingest.job import State
from services.ingest.limits import KEY_CHARS
from services.ingest.queries.completions import Ended
from services.ingest.ulid import is_ulid
from shoal.errors import Code, Internal, InvalidArgument, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

NAME_CHARS = 64
# Results of one stream that are fetched concurrently and held in memory.
_FETCHED_AT_ONCE = 16
# Responses of both kinds that are sent at once; a response with state QUEUED is small.
_SENT_AT_ONCE = 200
# Limit on a bundle of responses; a larger response is sent alone.
_MESSAGE_BYTES = 1 << 20
_STORE_WAIT_S = 0.5
# Time that a stream survives an unavailable store; after it, the client opens another stream.
_STORE_OUTAGE_S = 30.0
_TOO_MANY_MS = 1_000
_OURS = "internal error: the log of the service has the cause"


class StreamIntake(Protocol):
    """Interface to the intake."""

    async def begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str = "", scope: TenantScope = EVERY_TENANT
    ) -> asyncio.Future[Accepted]: ...


class StreamCompletions(Protocol):
    """Interface to the completions of jobs."""

    def watch(
        self, job_id: str, ended: Callable[[], None], *, is_old: bool = False, tenant: str | None = None
    ) -> None: ...

    def forget(self, job_id: str, ended: Callable[[], None]) -> None: ...

    async def result(self, job_id: str, tenant: str | None = None) -> Ended: ...


class RunStreams:
    """All open streams."""

    def __init__(
        self, intake: StreamIntake, endings: StreamCompletions, *, most: int, items: int, all_items: int
    ) -> None:
        self._intake = intake
        self._endings = endings
        self._places = Places(most, "streams", retry_after_ms=_TOO_MANY_MS)
        self._items = items
        self._budget = Budget(all_items)

    async def serve(
        self,
        requests: AsyncIterator[pb.RunStreamRequest],
        memory: CallMemory | None = None,
        scope: TenantScope = EVERY_TENANT,
    ) -> AsyncGenerator[pb.RunStreamResponse, None]:
        """Yield the responses of one stream of `scope`; `memory` counts those that wait for the client.

        Raises:
            ResourceExhausted: too many streams are open, or responses find no room: jobs go on, request them again.
        """
        with self._places.take(scope.tenant):
            stream = RunStream(
                self._intake, self._endings, items=self._items, budget=self._budget, memory=memory, scope=scope
            )
            try:
                async for response in stream.responses(requests):
                    yield response
                    del response
            finally:
                await stream.close()


@dataclass(eq=False, slots=True)
class StreamItem:
    """Job of a stream, from its request to its last response."""

    sequence: int
    is_in_budget: bool
    """True when the job counts against the shared budget."""
    is_bundled: bool
    """True when the request arrived in a bundle, so that its responses are bundled too."""
    job_id: str = ""
    existed: bool = False
    submission: asyncio.Future[Accepted] | None = None
    ended: Callable[[], None] | None = None


class RunStream:
    """Stream of one client."""

    def __init__(
        self,
        intake: StreamIntake,
        endings: StreamCompletions,
        *,
        items: int,
        budget: Budget,
        memory: CallMemory | None,
        scope: TenantScope,
    ) -> None:
        self._memory = memory
        self._scope = scope
        self._intake = intake
        self._endings = endings
        self._budget = budget
        self._window = Window(items, 1 << 62)
        # Bounded by the window, as each item has at most two responses.
        self._outbox: deque[tuple[StreamItem, pb.RunStreamResponse | None]] = deque()
        self._in_flight: set[StreamItem] = set()
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def responses(
        self, requests: AsyncIterator[pb.RunStreamRequest]
    ) -> AsyncGenerator[pb.RunStreamResponse, None]:
        """Yield responses until the client has ended its requests and has all responses."""
        self._reader = asyncio.create_task(self._read(requests), name="run stream")
        self._reader.add_done_callback(lambda _: self._changed.set())
        # The first message has the limit; later ones have 0.
        most_requests = MOST_A_MESSAGE
        while True:
            while self._outbox:
                group = self._next_group()
                responses = await together(self._response(*each) for each in group)
                sizes = [response.ByteSize() for response in responses]
                # Released by the end of the call, if it ends here.
                if self._memory is not None:
                    self._memory.hold(sum(sizes))
                for message in _messages([item for item, _ in group], responses, sizes):
                    message.most_requests, most_requests = most_requests, 0
                    yield message
                # Results may have 120 MiB.
                del group, responses, message
                if self._memory is not None:
                    self._memory.release(sum(sizes))
            if self._reader.done() and not self._in_flight:
                # Raises the error that ended the stream, if there was one.
                self._reader.result()
                return
            self._changed.clear()
            await self._changed.wait()

    def _next_group(self) -> list[tuple[StreamItem, pb.RunStreamResponse | None]]:
        group: list[tuple[StreamItem, pb.RunStreamResponse | None]] = []
        fetched = 0
        while self._outbox and len(group) < _SENT_AT_ONCE and fetched < _FETCHED_AT_ONCE:
            group.append(self._outbox.popleft())
            fetched += group[-1][1] is None
        return group

    async def close(self) -> None:
        """Release all items; their jobs go on, and a client can request their results again."""
        try:
            if self._reader is not None:
                await end(self._reader)
        finally:
            # After the end of the reader, which may still have started an item.
            for item in list(self._in_flight):
                if item.submission is not None:
                    item.submission.cancel()
                self._release(item)

    async def _read(self, requests: AsyncIterator[pb.RunStreamRequest]) -> None:
        async for message in requests:
            await self._take(message)
            # An idle stream keeps no request.
            del message

    async def _take(self, message: pb.RunStreamRequest) -> None:
        if not message.requests:
            await self._accept(message, is_bundled=False)
            return
        # A bundle's own submit, job_id or stream would be ignored.
        if message.stream or message.WhichOneof("what") is not None:
            raise InvalidArgument("requests: not together with submit, job_id or stream: each has its own")
        async for request in in_turns("requests", message.requests):
            await self._accept(request, is_bundled=True)

    async def _accept(self, request: pb.RunStreamRequest, *, is_bundled: bool) -> None:
        await self._window.enter(0)
        is_in_budget = bool(self._in_flight)
        if is_in_budget:
            await self._budget.wait_for(1)
        item = StreamItem(request.sequence, is_in_budget, is_bundled)
        self._in_flight.add(item)
        await self._start(item, request)

    async def _start(self, item: StreamItem, request: pb.RunStreamRequest) -> None:
        try:
            if request.WhichOneof("what") == "job_id":
                self._resume(item, request.job_id)
                return
            future = await self._intake.begin_when_there_is_room(_submit_of(request), scope=self._scope)
        except ShoalError as err:
            self._reject(item, err)
        except Exception:
            log.exception("an item of a stream failed with an unexpected error", {"event": "connector.item_failed"})
            self._reject(item, Internal(_OURS))
        else:
            item.submission = future
            future.add_done_callback(partial(self._accepted, item))

    def _resume(self, item: StreamItem, job_id: str) -> None:
        if not is_ulid(job_id):
            raise InvalidArgument(f"job_id: {job_id[:64]!r} is no job id: expected the 26 characters of a response")
        item.job_id, item.existed = job_id, True
        self._wait(item)

    def _accepted(self, item: StreamItem, future: asyncio.Future[Accepted]) -> None:
        item.submission = None
        if future.cancelled() or item not in self._in_flight:
            return
        if (error := future.exception()) is not None:
            self._reject(item, error if isinstance(error, ShoalError) else Internal(_OURS))
            return
        accepted = future.result()
        item.job_id, item.existed = accepted.job.id, accepted.existed
        self._put(item, _response_of(item, state=State.QUEUED))
        self._wait(item)

    def _wait(self, item: StreamItem) -> None:
        item.ended = partial(self._put, item, None)
        self._endings.watch(item.job_id, item.ended, is_old=item.existed, tenant=self._scope.tenant)

    def _reject(self, item: StreamItem, error: ShoalError) -> None:
        self._put(item, _response_of(item, error=error))

    def _put(self, item: StreamItem, response: pb.RunStreamResponse | None) -> None:
        """Add a response to the outbox. None: the job's result, which is fetched just before it is sent."""
        self._outbox.append((item, response))
        self._changed.set()

    async def _response(self, item: StreamItem, response: pb.RunStreamResponse | None) -> pb.RunStreamResponse:
        if response is None:
            item.ended = None
            response = await self._result(item)
        if response.state != pb.JOB_STATE_QUEUED:
            self._release(item)
        return response

    async def _result(self, item: StreamItem) -> pb.RunStreamResponse:
        give_up_at = asyncio.get_running_loop().time() + _STORE_OUTAGE_S
        while True:
            try:
                return _ended(item, await self._endings.result(item.job_id, self._scope.tenant))
            except ShoalError as err:
                if err.code in (Code.NOT_FOUND, Code.DATA_LOSS):
                    return _response_of(item, error=err)
                if asyncio.get_running_loop().time() > give_up_at:
                    raise
            await asyncio.sleep(_STORE_WAIT_S)

    def _release(self, item: StreamItem) -> None:
        if item not in self._in_flight:
            return
        self._in_flight.discard(item)
        if item.ended is not None:
            self._endings.forget(item.job_id, item.ended)
        if item.is_in_budget:
            self._budget.give_back(1)
        self._window.leave(0)


def _messages(
    items: list[StreamItem], responses: list[pb.RunStreamResponse], sizes: list[int]
) -> Iterator[pb.RunStreamResponse]:
    """Yield messages of the responses, in which responses to bundled requests are bundled up to _MESSAGE_BYTES."""
    bundle, nbytes = pb.RunStreamResponse(), 0
    for item, response, size in zip(items, responses, sizes, strict=True):
        if bundle.answers and (not item.is_bundled or nbytes + size > _MESSAGE_BYTES):
            yield bundle
            bundle, nbytes = pb.RunStreamResponse(), 0
        if item.is_bundled:
            bundle.answers.add().CopyFrom(response)
            nbytes += size
        else:
            yield response
    if bundle.answers:
        yield bundle


def _submit_of(request: pb.RunStreamRequest) -> pb.SubmitRequest:
    if request.requests:
        raise InvalidArgument("requests: not within requests")
    if request.WhichOneof("what") is None:
        raise InvalidArgument("submit or job_id: one is required, and neither is set")
    if len(request.stream) > NAME_CHARS:
        raise InvalidArgument(f"stream: at most {NAME_CHARS} characters, got {len(request.stream)}")
    if request.stream and not request.submit.idempotency_key:
        key = f"run/{request.stream}/{request.sequence}"
        assert len(key) <= KEY_CHARS
        request.submit.idempotency_key = key
    return request.submit


def _response_of(
    item: StreamItem, *, state: State | None = None, error: ShoalError | None = None
) -> pb.RunStreamResponse:
    named = "JOB_STATE_UNSPECIFIED" if state is None else f"JOB_STATE_{state.name}"
    response = pb.RunStreamResponse(sequence=item.sequence, job_id=item.job_id, existed=item.existed, state=named)
    if error is not None:
        response.code, response.message, response.retry_after_ms = error.code, error.message, error.retry_after_ms or 0
    return response


def _ended(item: StreamItem, ended: Ended) -> pb.RunStreamResponse:
    response, result = _response_of(item, state=ended.state), ended.result
    if result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
        response.response.CopyFrom(result.response)
    else:
        response.code, response.message = result.code, result.message
    return response
