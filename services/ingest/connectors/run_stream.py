"""RunStream: a client's own stream as source and sink. Thousands may be open at once, so each costs little.

    reader ──(window)──> intake ──durable──> QUEUED ┐
                            └──> the job ends ──────┴──> outbox ──a few at a time: fetch answers──> client

A job under way is one small object and a callback: no task, and neither its request nor its answer. Answers are fetched
when their turn to be sent has come, so a client that reads slowly holds a handful of them, and its stream is read no
further once its window is full. All streams share a bound too (`Room`); a stream with nothing under way passes it.

A message carries one request, or several, whose answers come in messages of several as well.
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
from services.ingest.intake.budget import Budget
from services.ingest.intake.intake import Accepted
from services.ingest.intake.stream import MOST_A_MESSAGE, Window, in_turns
from services.ingest.job import State
from services.ingest.limits import KEY_CHARS
from services.ingest.reading.endings import Ended
from services.ingest.ulid import is_ulid
from shoal.errors import Code, Internal, InvalidArgument, ResourceExhausted, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

NAME_CHARS = 64
_FETCHED_AT_ONCE = 16
# Answers of one stream in memory: enough for its fetches to overlap.
_TOLD_AT_ONCE = 200
# Answers of both kinds; those that say that a job is durable are small.
_MESSAGE_BYTES = 1 << 20
# Of a message of several answers; a larger answer goes by itself.
_STORE_WAIT_S = 0.5
_STORE_PATIENCE_S = 30.0
# How long a stream outlives a store that is away; its client then opens another.
_TOO_MANY_MS = 1_000
_OURS = "internal error: the log of the service has the cause"


class Submits(Protocol):
    """The intake, as a stream needs it."""

    async def begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str = ""
    ) -> asyncio.Future[Accepted]: ...


class Ends(Protocol):
    """How jobs end, as a stream needs it."""

    def watch(self, job_id: str, ended: Callable[[], None], *, is_old: bool = False) -> None: ...

    def forget(self, job_id: str, ended: Callable[[], None]) -> None: ...

    async def result(self, job_id: str) -> Ended: ...


class RunStreams:
    """All open streams."""

    def __init__(self, intake: Submits, endings: Ends, *, most: int, items: int, all_items: int) -> None:
        self._intake = intake
        self._endings = endings
        self._most = most
        self._items = items
        self._room = Budget(all_items, "jobs of open streams")
        self._open = 0

    async def serve(self, requests: AsyncIterator[pb.RunStreamRequest]) -> AsyncGenerator[pb.RunStreamResponse, None]:
        """The answers of one stream.

        Raises:
            ResourceExhausted: too many are open.
        """
        if self._open >= self._most:
            raise ResourceExhausted(f"{self._open} streams are open, which is the limit", retry_after_ms=_TOO_MANY_MS)
        self._open += 1
        stream = RunStream(self._intake, self._endings, items=self._items, room=self._room)
        try:
            async for response in stream.answers(requests):
                yield response
        finally:
            self._open -= 1
            await stream.close()


@dataclass(eq=False, slots=True)
class StreamItem:
    """A job of a stream, from its request to its last answer."""

    sequence: int
    has_room: bool
    is_of_several: bool
    """It came in a message of several, and is answered so."""
    job_id: str = ""
    existed: bool = False
    beginning: asyncio.Future[Accepted] | None = None
    ended: Callable[[], None] | None = None


class RunStream:
    """One client's stream."""

    def __init__(self, intake: Submits, endings: Ends, *, items: int, room: Budget) -> None:
        self._intake = intake
        self._endings = endings
        self._room = room
        self._window = Window(items, 1 << 62)
        # Bounded by the window, as each item has at most two answers.
        self._outbox: deque[tuple[StreamItem, pb.RunStreamResponse | None]] = deque()
        self._under_way: set[StreamItem] = set()
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def answers(self, requests: AsyncIterator[pb.RunStreamRequest]) -> AsyncGenerator[pb.RunStreamResponse, None]:
        """Answers as they come, until the client has sent all it wants and has all its answers."""
        self._reader = asyncio.create_task(self._read(requests), name="run stream")
        self._reader.add_done_callback(lambda _: self._news.set())
        most_requests = MOST_A_MESSAGE  # Said once.
        while True:
            while self._outbox:
                some = self._next_to_tell()
                responses = await together(self._response(*each) for each in some)
                for message in _messages([item for item, _ in some], responses):
                    message.most_requests, most_requests = most_requests, 0
                    yield message
            if self._reader.done() and not self._under_way:
                self._reader.result()  # What ended the stream, if it was not its client.
                return
            self._news.clear()
            await self._news.wait()

    def _next_to_tell(self) -> list[tuple[StreamItem, pb.RunStreamResponse | None]]:
        some: list[tuple[StreamItem, pb.RunStreamResponse | None]] = []
        fetched = 0
        while self._outbox and len(some) < _TOLD_AT_ONCE and fetched < _FETCHED_AT_ONCE:
            some.append(self._outbox.popleft())
            fetched += some[-1][1] is None
        return some

    async def close(self) -> None:
        """Nobody reads any more: the jobs go on, and whoever wants their results asks anew."""
        try:
            if self._reader is not None:
                await end(self._reader)
        finally:  # After the reader, which may still have begun one.
            for item in list(self._under_way):
                if item.beginning is not None:
                    item.beginning.cancel()
                self._left(item)

    async def _read(self, requests: AsyncIterator[pb.RunStreamRequest]) -> None:
        async for message in requests:
            if not message.requests:
                await self._take(message, is_of_several=False)
                continue
            if message.stream or message.WhichOneof("what") is not None:  # Nobody would answer it, or give it its key.
                raise InvalidArgument("requests: not together with submit, job_id or stream: each has its own")
            async for request in in_turns("requests", message.requests):
                await self._take(request, is_of_several=True)

    async def _take(self, request: pb.RunStreamRequest, *, is_of_several: bool) -> None:
        await self._window.enter(0)
        has_room = bool(self._under_way)
        if has_room:
            await self._room.wait_for(1)
        item = StreamItem(request.sequence, has_room, is_of_several)
        self._under_way.add(item)
        await self._begin(item, request)

    async def _begin(self, item: StreamItem, request: pb.RunStreamRequest) -> None:
        try:
            if request.WhichOneof("what") == "job_id":
                self._resume(item, request.job_id)
                return
            future = await self._intake.begin_when_there_is_room(_submit_of(request))
        except ShoalError as err:
            self._refuse(item, err)
        except Exception:
            log.exception("unexpected error with an item of a stream")
            self._refuse(item, Internal(_OURS))
        else:
            item.beginning = future
            future.add_done_callback(partial(self._begun, item))

    def _resume(self, item: StreamItem, job_id: str) -> None:
        if not is_ulid(job_id):
            raise InvalidArgument(f"job_id: {job_id[:64]!r} is no job id: 26 characters, as the stream answered it")
        item.job_id, item.existed = job_id, True
        self._wait(item)

    def _begun(self, item: StreamItem, future: asyncio.Future[Accepted]) -> None:
        item.beginning = None
        if future.cancelled() or item not in self._under_way:
            return
        if (error := future.exception()) is not None:
            self._refuse(item, error if isinstance(error, ShoalError) else Internal(_OURS))
            return
        accepted = future.result()
        item.job_id, item.existed = accepted.job.id, accepted.existed
        self._put(item, _answer(item, state=State.QUEUED))
        self._wait(item)

    def _wait(self, item: StreamItem) -> None:
        item.ended = partial(self._put, item, None)
        self._endings.watch(item.job_id, item.ended, is_old=item.existed)

    def _refuse(self, item: StreamItem, error: ShoalError) -> None:
        self._put(item, _answer(item, error=error))

    def _put(self, item: StreamItem, response: pb.RunStreamResponse | None) -> None:
        """An answer for the outbox; None: the job's result, which is fetched when its turn has come."""
        self._outbox.append((item, response))
        self._news.set()

    async def _response(self, item: StreamItem, response: pb.RunStreamResponse | None) -> pb.RunStreamResponse:
        if response is None:
            item.ended = None
            response = await self._result(item)
        if response.state != pb.JOB_STATE_QUEUED:
            self._left(item)
        return response

    async def _result(self, item: StreamItem) -> pb.RunStreamResponse:
        give_up = asyncio.get_running_loop().time() + _STORE_PATIENCE_S
        while True:
            try:
                return _ended(item, await self._endings.result(item.job_id))
            except ShoalError as err:
                if err.code in (Code.NOT_FOUND, Code.DATA_LOSS):
                    return _answer(item, error=err)
                if asyncio.get_running_loop().time() > give_up:
                    raise
            await asyncio.sleep(_STORE_WAIT_S)

    def _left(self, item: StreamItem) -> None:
        if item not in self._under_way:
            return
        self._under_way.discard(item)
        if item.ended is not None:
            self._endings.forget(item.job_id, item.ended)
        if item.has_room:
            self._room.give_back(1)
        self._window.leave(0)


def _messages(items: list[StreamItem], answers: list[pb.RunStreamResponse]) -> Iterator[pb.RunStreamResponse]:
    """The answers in messages: those to what came in a message of several together, as long as that is small."""
    bundle, nbytes = list[pb.RunStreamResponse](), 0
    for item, answer in zip(items, answers, strict=True):
        size = answer.ByteSize()
        if bundle and (not item.is_of_several or nbytes + size > _MESSAGE_BYTES):
            yield pb.RunStreamResponse(answers=bundle)
            bundle, nbytes = [], 0
        if item.is_of_several:
            bundle.append(answer)
            nbytes += size
        else:
            yield answer
    if bundle:
        yield pb.RunStreamResponse(answers=bundle)


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


def _answer(item: StreamItem, *, state: State | None = None, error: ShoalError | None = None) -> pb.RunStreamResponse:
    named = "JOB_STATE_UNSPECIFIED" if state is None else f"JOB_STATE_{state.name}"
    answer = pb.RunStreamResponse(sequence=item.sequence, job_id=item.job_id, existed=item.existed, state=named)
    if error is not None:
        answer.code, answer.message, answer.retry_after_ms = error.code, error.message, error.retry_after_ms or 0
    return answer


def _ended(item: StreamItem, ended: Ended) -> pb.RunStreamResponse:
    answer, result = _answer(item, state=ended.state), ended.result
    if result.outcome == store_pb2.Result.OUTCOME_SUCCEEDED:
        answer.response.CopyFrom(result.response)
    else:
        answer.code, answer.message = result.code, result.message
    return answer
