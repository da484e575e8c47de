"""Inferences on one stream: they run side by side, are answered in the order of asking, and an error ends only its own.

requests ──read ahead──> tasks, at most AHEAD ──in order──> answers
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb

log = logging.getLogger(__name__)

AHEAD = 64
"""Requests of one stream that are in work at a time: enough to fill a batch. Beyond, the stream is not read, so a
client that sends faster than it reads is slowed down and not buffered."""

Infer = Callable[[pb.ModelInferRequest], Awaitable[pb.ModelInferResponse]]


async def answers(
    requests: AsyncIterator[pb.ModelInferRequest], infer: Infer
) -> AsyncIterator[pb.ModelStreamInferResponse]:
    """One answer for each request, in order; a failed one carries `error_message` and its request's id.

    Raises whatever reading `requests` raises, after the answers to those read before.
    """
    running: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None] = asyncio.Queue()
    room = asyncio.Semaphore(AHEAD)
    tasks: set[asyncio.Task[pb.ModelStreamInferResponse]] = set()

    async def read() -> None:
        try:
            await room.acquire()
            async for request in requests:
                task = asyncio.create_task(_answer(request, infer))
                tasks.add(task)
                running.put_nowait(task)  # `room` is what bounds it.
                await room.acquire()
        finally:
            running.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await running.get()) is not None:
            answer = await task
            tasks.discard(task)
            room.release()
            yield answer
        await reader
    finally:
        left = [reader, *tasks]
        for task_left in left:
            task_left.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _answer(request: pb.ModelInferRequest, infer: Infer) -> pb.ModelStreamInferResponse:
    try:
        return pb.ModelStreamInferResponse(infer_response=await infer(request))
    except ShoalError as err:
        message = err.message
    except Exception:
        log.exception("unexpected error in a stream's inference")
        message = "internal error: the log of the service has the cause"
    return pb.ModelStreamInferResponse(
        error_message=message,
        infer_response=pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        ),
    )
