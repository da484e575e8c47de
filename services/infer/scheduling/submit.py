"""Awaited submission of a request, on top of a scheduler's `start` and `abandon`."""

from __future__ import annotations

import asyncio

from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.request_scheduler import RequestScheduler, Ticket


class Waiter:
    """A receiver with a future."""

    __slots__ = ("future", "late_result")

    # The awaiting task continues in a later iteration of the loop.
    is_direct = True
    writes = False

    def __init__(self, future: asyncio.Future[InferenceResult]) -> None:
        self.future = future
        self.late_result: InferenceResult | None = None
        """Set when the future was cancelled before the result came."""

    def succeeded(self, result: InferenceResult) -> None:
        if self.future.done():
            self.late_result = result
        else:
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
    try:
        return await outcome_of(to, to.start(request, deadline, tenant, waiter), waiter)
    finally:
        # The error's traceback refers to this frame: without `del`, a reference cycle keeps the request in memory.
        del waiter


async def outcome_of(scheduler: RequestScheduler, ticket: Ticket, waiter: Waiter) -> InferenceResult:
    """Return the result of a started request; when cancelled, abandon it. Raises the request's error.

    A result that came before the cancellation is returned: the statistics have the request as a success already.
    """
    try:
        return await waiter.future
    except asyncio.CancelledError:
        result = ticket.outcome if scheduler.abandon(ticket) else waiter.late_result or waiter.future.result()
        if isinstance(result, InferenceResult):
            return result
        raise
    finally:
        # As above.
        del waiter, ticket
