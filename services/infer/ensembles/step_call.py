"""One call of a step's model: to its scheduler, or to its response cache when it has one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import perf_counter_ns
from typing import Any, Protocol, TypeAlias

from services.infer.ensembles.other_models import StepVersion
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.request_scheduler import Ticket
from shoal.errors import ShoalError

Check: TypeAlias = Callable[[str, InferenceRequest], Awaitable[InferenceRequest]]


class StepDelivery(Protocol):
    """Who waits for a step's call. Exactly one of these is called, on the loop, once, maybe before `start` returns."""

    def came(self, call: StepCall, answer: InferenceResult) -> None: ...

    def failed(self, call: StepCall, error: BaseException) -> None: ...


class StepCall:
    """A `queue.Receiver`."""

    __slots__ = ("_began", "_is_over", "_task", "_ticket", "call", "index", "told", "version")

    def __init__(self, told: StepDelivery, index: int, version: StepVersion, call: InferenceRequest) -> None:
        """`index` is for `told` to know it by."""
        self.told = told
        self.index = index
        self.version = version
        self.call = call
        self._ticket: Ticket = None
        self._task: asyncio.Task[Any] | None = None
        self._is_over = False

    def start(self, expires: float, tenant: str, check: Check | None) -> None:
        """Begins. It does not begin at or after `expires`, on the server's clock.

        Args:
            check: asked first, of a retry. Gives the call as it may be run, or raises.
        """
        self._began = perf_counter_ns()
        if check is not None or self.version.response_cache is not None:
            self._task = asyncio.create_task(self._long(expires, tenant, check), name="step-call")
            return
        try:
            self._ticket = self.version.scheduler.start(self.call, expires, tenant, self)
        except Exception as err:
            self.failed(err)

    async def _long(self, expires: float, tenant: str, check: Check | None) -> None:
        try:
            answer = await self._answer(expires, tenant, check)
        except Exception as err:
            self.failed(err)
        else:
            self.answered(answer)

    async def _answer(self, expires: float, tenant: str, check: Check | None) -> InferenceResult:
        call, cache = self.call, self.version.response_cache
        if check is not None:
            call = replace(await check(self.version.name, call), check=check)
        if cache is None:
            return await self.version.scheduler.submit(call, expires, tenant)
        answer, _ = await cache.answer(call, call.source.parameters if call.source is not None else {}, expires, tenant)
        return answer

    def abandon(self) -> None:
        """Nobody waits any more. Nothing happens when it is over."""
        if self._is_over:
            return
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
        elif self._ticket is not None:
            self.version.scheduler.abandon(self._ticket)

    @property
    def is_waiting(self) -> bool:
        """Whether its execution has not begun."""
        return not self._is_over and self._task is None and self.version.scheduler.is_waiting(self.call)

    def answered(self, answer: InferenceResult) -> None:
        if not self._is_over:
            self._is_over = True
            self.told.came(self, answer)

    def failed(self, error: BaseException) -> None:
        if not self._is_over:
            self._is_over = True
            self.version.statistics.failed(perf_counter_ns() - self._began)
            self.told.failed(self, error)


def named(error: BaseException, where: str) -> BaseException:
    """An error of a step as the ensemble's caller sees it: the same status, and `where` it was."""
    if not isinstance(error, ShoalError):
        return error  # Unexpected: the log is told everything, the caller little.
    return type(error)(f"{where}: {error.message}", retry_after_ms=error.retry_after_ms)
