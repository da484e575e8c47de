"""Inferences on one stream: they run side by side, and an error ends only its own.

                           ┌──> one answer each, in the order of asking ──┐
    requests ──read ahead──┤                                              ├──> answers
                           └──> decoupled: any number, as they come ──────┘

At most AHEAD requests are in work at a time. What is not read by the client is not produced either: a decoupled request
waits with its next response until there is room.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from services.infer.decoupled_responses import FINAL
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb

log = logging.getLogger(__name__)

AHEAD = 64
"""Requests of one stream that are in work at a time: enough to fill a batch. Beyond, the stream is not read, so a
client that sends faster than it reads is slowed down and not buffered."""

_UNREAD = 32
# Responses of decoupled requests that wait for the client: each request may add one more.

Infer = Callable[[pb.ModelInferRequest], Awaitable[pb.ModelInferResponse]]

Respond = Callable[[pb.ModelInferRequest], "AsyncGenerator[pb.ModelInferResponse | ShoalError, None] | None"]
"""The responses of a decoupled model's request, errors among them; None for a model that gives one."""


async def answers(
    requests: AsyncIterator[pb.ModelInferRequest], infer: Infer, respond: Respond = lambda request: None
) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
    """The answers to requests: in order, but for those of decoupled models. A failed one carries `error_message` and
    its request's id.

    Raises whatever reading `requests` raises, after the answers to those read before.
    """
    stream = _Stream(infer, respond)
    try:
        async for answer in stream.answers(requests):
            yield answer
    finally:
        await stream.close()


class _Stream:
    """One stream of one client."""

    def __init__(self, infer: Infer, respond: Respond) -> None:
        self._infer, self._respond = infer, respond
        self._room = asyncio.Semaphore(AHEAD)
        self._in_order: deque[asyncio.Task[pb.ModelStreamInferResponse]] = deque()
        self._tasks: set[asyncio.Task[object]] = set()
        self._out: deque[tuple[pb.ModelStreamInferResponse, bool]] = deque()  # Bounded by `_room` and `_may_add`.
        # An answer that is not read yet still takes its request's place: else a client that never reads fills memory.
        self._may_add = asyncio.Event()
        self._may_add.set()
        self._is_new = asyncio.Event()

    async def answers(
        self, requests: AsyncIterator[pb.ModelInferRequest]
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        reader = self._task(self._read(requests))
        while True:
            while self._out:
                answer, makes_room = self._out.popleft()
                if makes_room:
                    self._room.release()
                if len(self._out) < _UNREAD:
                    self._may_add.set()
                yield answer
            if not self._tasks:
                break
            self._is_new.clear()
            await self._is_new.wait()
        await reader

    def _task(self, work: Awaitable[object]) -> asyncio.Task[object]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        while self._in_order and self._in_order[0].done() and not self._in_order[0].cancelled():
            self._out.append((self._in_order.popleft().result(), True))
        self._is_new.set()

    async def _read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        await self._room.acquire()
        async for request in requests:
            responses = self._responses(request)
            if responses is None:
                task = asyncio.create_task(self._answer(request))
                self._in_order.append(task)
                self._tasks.add(task)
                task.add_done_callback(self._done)
            else:
                self._task(self._pass_on(request, responses))
            await self._room.acquire()

    def _responses(
        self, request: pb.ModelInferRequest
    ) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None] | None:
        try:
            return self._respond(request)
        except ShoalError:
            return None  # There is no such model: its one answer says so.

    async def _answer(self, request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
        try:
            answer = pb.ModelStreamInferResponse(infer_response=await self._infer(request))
        except Exception as err:
            return _refusal(request, err)
        # Clients of streams count on it whatever the model, as Triton says it of each.
        answer.infer_response.parameters[FINAL].bool_param = True
        return answer

    async def _pass_on(
        self, request: pb.ModelInferRequest, responses: AsyncGenerator[pb.ModelInferResponse | ShoalError, None]
    ) -> None:
        try:
            async with aclosing(responses):
                async for response in responses:
                    if isinstance(response, ShoalError):
                        await self._add(_refusal(request, response))
                    else:
                        await self._add(pb.ModelStreamInferResponse(infer_response=response))
        except Exception as err:
            await self._add(_refusal(request, err))
        finally:
            self._room.release()

    async def _add(self, answer: pb.ModelStreamInferResponse) -> None:
        self._out.append((answer, False))
        self._is_new.set()
        if len(self._out) >= _UNREAD:
            self._may_add.clear()
            await self._may_add.wait()

    async def close(self) -> None:
        """Ends what is still in work."""
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _refusal(request: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse:
    if isinstance(error, ShoalError):
        message = error.message
    else:
        log.error("unexpected error in a stream's inference", exc_info=error)
        message = "internal error: the log of the service has the cause"
    return pb.ModelStreamInferResponse(
        error_message=message,
        infer_response=pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        ),
    )
