"""Who waits for one call in a coroutine."""

from __future__ import annotations

import asyncio

from services.infer.scheduling.execution import Answer


class Waiter:
    """A receiver that can be awaited."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[Answer]) -> None:
        self.future = future

    def answered(self, answer: Answer) -> None:
        if not self.future.done():
            self.future.set_result(answer)

    def failed(self, error: BaseException) -> None:
        if not self.future.done():
            # A future does not take StopIteration, which would end whoever awaits it.
            self.future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
