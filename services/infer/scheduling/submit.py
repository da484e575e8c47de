"""A request that is awaited: what has `start` and `abandon` gets `submit` of this."""

from __future__ import annotations

import asyncio

from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.request_scheduler import RequestScheduler


class Waiter:
    """A receiver that can be awaited."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[InferenceResult]) -> None:
        self.future = future

    def answered(self, answer: InferenceResult) -> None:
        if not self.future.done():
            self.future.set_result(answer)

    def failed(self, error: BaseException) -> None:
        if not self.future.done():
            # A future does not take StopIteration, which would end whoever awaits it.
            self.future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)


async def submit_and_wait(
    to: RequestScheduler, request: InferenceRequest, deadline: float, tenant: str
) -> InferenceResult:
    """Starts `request` and waits for its answer; cancelled, abandons it. Raises what the request fails with."""
    future: asyncio.Future[InferenceResult] = asyncio.get_running_loop().create_future()
    ticket = to.start(request, deadline, tenant, Waiter(future))
    try:
        return await future
    except asyncio.CancelledError:
        to.abandon(ticket)
        raise
    finally:
        del future, ticket  # They hold an error whose trace holds this frame: a circle, and in it the whole request.
