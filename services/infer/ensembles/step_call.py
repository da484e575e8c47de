"""One call of a step's model, through its scheduler, or through its response cache when the model has one."""

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


class StepReceiver(Protocol):
    """Receiver of one step call's outcome.

    A call that has started invokes exactly one of these methods once, on the event loop, after `StepCall.start`.
    """

    def step_succeeded(self, call: StepCall, result: InferenceResult) -> None: ...

    def step_failed(self, call: StepCall, error: BaseException) -> None: ...


class StepCall:
    """One request to one version of a step's model. Implements `delivery.Receiver`."""

    __slots__ = ("_is_over", "_receiver", "_started_ns", "_task", "_ticket", "index", "request", "version")

    # An outcome may start and abandon other calls.
    is_direct = False
    writes = False

    def __init__(self, receiver: StepReceiver, index: int, version: StepVersion, request: InferenceRequest) -> None:
        """Store the call; `index` lets `receiver` identify it."""
        self._receiver = receiver
        self.index = index
        self.version = version
        self.request = request
        self._ticket: Ticket = None
        self._task: asyncio.Task[Any] | None = None
        self._is_over = False

    def start(self, expires: float, tenant: str, check: Check | None) -> None:
        """Start the call. The model does not begin its execution at or after `expires`, on the server's clock.

        Raises the errors that are known immediately: the call has ended then, and its receiver is not called.

        Args:
            check: for a retry: returns the request as it may be executed, or raises. Awaited before the execution.
        """
        self._started_ns = perf_counter_ns()
        if check is not None or self.version.response_cache is not None:
            self._task = asyncio.create_task(self._run(expires, tenant, check), name="step-call")
            return
        try:
            self._ticket = self.version.scheduler.start(self.request, expires, tenant, self)
        except Exception:
            self._is_over = True
            self._count_failed()
            raise

    async def _run(self, expires: float, tenant: str, check: Check | None) -> None:
        try:
            result = await self._result(expires, tenant, check)
        except asyncio.CancelledError:
            self._count_failed()
            raise
        except Exception as err:
            self.failed(err)
        else:
            self.succeeded(result)

    async def _result(self, expires: float, tenant: str, check: Check | None) -> InferenceResult:
        request, cache = self.request, self.version.response_cache
        if check is not None:
            request = replace(await check(self.version.name, request), check=check)
        if cache is None:
            return await self.version.scheduler.submit(request, expires, tenant)
        wire_parameters = request.source.parameters if request.source is not None else {}
        result, _ = await cache.result(request, wire_parameters, expires, tenant)
        return result

    def abandon(self) -> None:
        """Cancel the call; its receiver is not called any more. Does nothing after the call has ended."""
        if self._is_over:
            return
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
        # A result that was not delivered yet is counted as a success already.
        elif (
            self._ticket is not None
            and self.version.scheduler.abandon(self._ticket)
            and not isinstance(self._ticket.outcome, InferenceResult)
        ):
            self._count_failed()

    @property
    def is_waiting(self) -> bool:
        """True while the execution of the call has not begun."""
        return not self._is_over and self._task is None and self.version.scheduler.is_waiting(self.request)

    def succeeded(self, result: InferenceResult) -> None:
        if not self._is_over:
            self._is_over = True
            self._receiver.step_succeeded(self, result)

    def failed(self, error: BaseException) -> None:
        if not self._is_over:
            self._is_over = True
            self._count_failed()
            self._receiver.step_failed(self, error)

    def _count_failed(self) -> None:
        version, ticket = self.version, self._ticket
        ns = perf_counter_ns() - self._started_ns if ticket is None else version.scheduler.age_ns(ticket)
        version.statistics.failed(ns)


def located(error: BaseException, where: str) -> BaseException:
    """Return a step's error for the ensemble's caller: the same status, and `where` before the message."""
    # Unexpected errors keep their type: the log gets the details, the caller gets a fixed text.
    if not isinstance(error, ShoalError):
        return error
    return type(error)(f"{where}: {error.message}", retry_after_ms=error.retry_after_ms)
