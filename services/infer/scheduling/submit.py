"""Awaited submission of a request, on top of a scheduler's `start` and `abandon`."""

from __future__ import annotations

import asyncio

from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.request_scheduler import RequestScheduler


class Waiter:
    """A receiver with a future."""

    __slots__ = ("future",)

    # The awaiting task continues in a later iteration of the loop.
    is_direct = True

    def __init__(self, future: asyncio.Future[InferenceResult]) -> None:
        self.future = future

    def succeeded(self, result: InferenceResult) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def failed(self, error: BaseException) -> None:
        if not self.future.done():
            # A future rejects StopIteration, which would end the awaiting coroutine.
            self.future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)

    def drop(self) -> None:
        """Drop an outcome that nobody awaits: asyncio would log its error as never retrieved."""
        if self.future.done() and not self.future.cancelled():
            self.future.exception()


async def submit_and_wait(
    to: RequestScheduler, request: InferenceRequest, deadline: float, tenant: str
) -> InferenceResult:
    """Start `request` and return its result; when cancelled, abandon it. Raises the request's error."""
    waiter = Waiter(asyncio.get_running_loop().create_future())
    ticket = to.start(request, deadline, tenant, waiter)
    try:
        return await waiter.future
    except asyncio.CancelledError:
        to.abandon(ticket)
        waiter.drop()
        raise
    finally:
        # Their error's traceback refers to this frame: without `del`, a reference cycle keeps the request in memory.
        del waiter, ticket
