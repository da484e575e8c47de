"""ModelStreamInfer: the inferences of one stream run concurrently, and an error fails only its own request.

                           ┌──> one response each, in request order ──────┐
    requests ──read ahead──┤                                              ├──> responses
                           └──> decoupled: any number, as they arrive ────┘

At most AHEAD requests run at a time. A client that does not read slows its stream down: a decoupled request pauses
while 32 responses, or 1 MiB, wait for the client. The call's memory counts requests, and the responses that wait.

Each response is serialised once, without large raw contents. As a field of another message, protobuf would copy it:
2 ms for 1 MiB. The first responses of 240 requests held the event loop for seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from mesh.rpc.call_context import CallMemory
from mesh.rpc.framing import MessageParts
from services.infer.decoupled_responses import FINAL
from services.infer.requests.request_memory import UNCOUNTED, RequestPart
from services.infer.requests.response import tag_and_length, with_raw
from shoal.errors import ERROR_CODE_PARAMETER, RETRY_AFTER_PARAMETER, Code, ResourceExhausted, ShoalError
from shoal.inference.v2 import inference_pb2 as pb

log = logging.getLogger(__name__)

AHEAD = 64
"""Requests of one stream that run at a time: enough to fill a batch. Beyond AHEAD the stream is not read, so that a
client that sends faster than it reads is slowed down and not buffered."""

# Responses of decoupled requests that wait for the client, and their bytes; each request may add one more.
_UNREAD, _UNREAD_BYTES = 32, 1 << 20

# Tag of `infer_response` in ModelStreamInferResponse: field 2, wire type 2 (length-delimited).
_INFER_RESPONSE = 0x12

Infer = Callable[[pb.ModelInferRequest, RequestPart, list[Any]], Awaitable[pb.ModelInferResponse]]
"""Returns the response to a request; the list may receive its raw contents."""

Respond = Callable[
    [pb.ModelInferRequest, RequestPart, list[Any]], "AsyncGenerator[pb.ModelInferResponse | ShoalError, None] | None"
]
"""Returns the responses and errors of a request to a decoupled model; None for any other model.

The list may receive the raw contents of each response before that is yielded."""


async def stream_responses(
    requests: AsyncIterator[pb.ModelInferRequest],
    infer: Infer,
    respond: Respond = lambda request, part, raw: None,
    memory: CallMemory = UNCOUNTED,
) -> AsyncGenerator[MessageParts, None]:
    """Yield the ModelStreamInferResponses to `requests`: in request order, except those of decoupled models.

    The response to a failed request carries `error_message`, the request's id, and the status code as a parameter.

    Raises what reading `requests` raises, after the responses to the requests read before.
    """
    stream = _Stream(infer, respond, memory)
    try:
        async for response in stream.responses(requests):
            yield response
            del response
    finally:
        await stream.close()


class _Stream:
    """State of one client's stream."""

    def __init__(self, infer: Infer, respond: Respond, memory: CallMemory) -> None:
        self._infer, self._respond, self._memory = infer, respond, memory
        self._capacity = asyncio.Semaphore(AHEAD)
        self._in_order: deque[tuple[asyncio.Task[MessageParts], RequestPart]] = deque()
        self._tasks: set[asyncio.Task[object]] = set()
        # Responses that the client has not read, each with its memory, and True when reading it ends its request.
        # Bounded by `_capacity` and `_may_add`: an unread response still counts as a running request.
        self._out: deque[tuple[MessageParts, RequestPart, bool]] = deque()
        self._unread_bytes = 0
        self._may_add = asyncio.Event()
        self._may_add.set()
        self._is_new = asyncio.Event()

    async def responses(self, requests: AsyncIterator[pb.ModelInferRequest]) -> AsyncIterator[MessageParts]:
        reader = self._task(self._read(requests))
        while True:
            while self._out:
                response, part, ends_request = self._out.popleft()
                if ends_request:
                    self._capacity.release()
                else:
                    self._unread_bytes -= part.held
                if not self._is_full:
                    self._may_add.set()
                # The call writes the response, which exists until the client has taken it.
                try:
                    yield response
                finally:
                    part.close()
                del response, part
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
        while self._in_order and self._in_order[0][0].done() and not self._in_order[0][0].cancelled():
            first, part = self._in_order.popleft()
            # It returns errors; a fault of its own must not keep the stream waiting for ever.
            error = first.exception()
            response = first.result() if error is None else _error_response(pb.ModelInferRequest(), error)
            self._out.append((response, part, True))
        self._is_new.set()

    async def _read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        await self._capacity.acquire()
        async for request in requests:
            part = RequestPart(self._memory, self._memory.message_bytes, waits=True)
            refusal = _held(part)
            raw: list[Any] = []
            responses = self._decoupled_responses(request, part, raw)
            if responses is None:
                task = asyncio.create_task(self._infer_one(request, part, raw, refusal))
                self._in_order.append((task, part))
                self._tasks.add(task)
                task.add_done_callback(self._done)
                del task
            else:
                self._task(self._forward(request, responses, part, raw, refusal))
            # Requests and responses are counted until they end: a stream that waits keeps none.
            del request, part, raw, responses
            await self._capacity.acquire()

    def _decoupled_responses(
        self, request: pb.ModelInferRequest, part: RequestPart, raw: list[Any]
    ) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None] | None:
        try:
            return self._respond(request, part, raw)
        except ShoalError:
            return None  # The model is not served: its inference reports the error.

    async def _infer_one(
        self, request: pb.ModelInferRequest, part: RequestPart, raw: list[Any], refusal: ShoalError | None
    ) -> MessageParts:
        try:
            if refusal is not None:
                raise refusal
            response = await self._infer(request, part, raw)
            # Stream clients rely on this parameter for every model, as Triton sets it.
            response.parameters[FINAL].bool_param = True
            return _serialised(response, raw)
        except Exception as err:
            return _error_response(request, err)

    async def _forward(
        self,
        request: pb.ModelInferRequest,
        responses: AsyncGenerator[pb.ModelInferResponse | ShoalError, None],
        part: RequestPart,
        raw: list[Any],
        refusal: ShoalError | None,
    ) -> None:
        try:
            if refusal is not None:
                raise refusal
            async with aclosing(responses):
                async for response in responses:
                    if isinstance(response, ShoalError):
                        await self._add(_error_response(request, response))
                    else:
                        message = _serialised(response, raw)
                        # The rest exists twice: the response, which waits here, and its serialised copy.
                        copied = message.size - sum(memoryview(contents).nbytes for contents in raw)
                        raw.clear()
                        await self._add(message, message.size + copied)
                        del message
                    del response
        except Exception as err:
            await self._add(_error_response(request, err))
        finally:
            part.close()
            self._capacity.release()

    async def _add(self, response: MessageParts, size: int = 0) -> None:
        """Add a response that takes `size` bytes of memory. Raises ResourceExhausted when there is no room for them."""
        unread = RequestPart(self._memory)
        # Nothing is held for an error: after the end of the call, no room is left for anything.
        if size:
            unread.hold(size)
        self._out.append((response, unread, False))
        self._unread_bytes += unread.held
        self._is_new.set()
        if self._is_full:
            self._may_add.clear()
            await self._may_add.wait()

    @property
    def _is_full(self) -> bool:
        return len(self._out) >= _UNREAD or self._unread_bytes >= _UNREAD_BYTES

    async def close(self) -> None:
        """Cancel the requests that still run."""
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _held(part: RequestPart) -> ShoalError | None:
    """Hold the memory of a request's message; return the error when there is no room."""
    try:
        part.hold(part.message_bytes)
    except ResourceExhausted as err:
        return err
    return None


def _serialised(response: pb.ModelInferResponse, raw: Sequence[Any]) -> MessageParts:
    """Return the ModelStreamInferResponse of a response whose raw contents may be in `raw`."""
    parts, size = with_raw(response.SerializeToString(), raw)
    opening = tag_and_length(_INFER_RESPONSE, size)
    return MessageParts((opening, *parts), len(opening) + size)


def _error_response(request: pb.ModelInferRequest, error: BaseException) -> MessageParts:
    if isinstance(error, ShoalError):
        code, message, retry_after_ms = error.code, error.message, error.retry_after_ms
    else:
        log.error("unexpected error in a stream's inference", {"event": "call.stream_inference_failed"}, exc_info=error)
        code, message, retry_after_ms = Code.INTERNAL, "internal error: the log of the service has the cause", None
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
    response.parameters[ERROR_CODE_PARAMETER].int64_param = code
    if retry_after_ms is not None:
        response.parameters[RETRY_AFTER_PARAMETER].int64_param = retry_after_ms
    # Without a text it would be a success.
    failed = pb.ModelStreamInferResponse(error_message=message or "no details", infer_response=response)
    serialised = failed.SerializeToString()
    return MessageParts((serialised,), len(serialised))
