"""Runs the calls of an ensemble: a `RunsCalls`, whose calls are those of its steps' models.

start ──> are the steps' versions still the ones that calls mean? ──> room? ──> Run ──> answers
                   └── no: the steps are looked up again; what does not fit any more is said by name
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType

from services.infer.ensembles.plan import EnsemblePlan
from services.infer.ensembles.run import Run
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.queue import QueueLimits, Receiver
from services.infer.scheduling.statistics import Statistics
from services.infer.scheduling.submit import submit_and_wait
from shoal.errors import DeadlineExceeded, ResourceExhausted, Unavailable

_RETRY_MIN_MS, _RETRY_MAX_MS = 5, 5_000
_WEIGHT = 0.1
# Of the newest answer in the mean time of answers, which says when a refused caller may come back.


class EnsembleScheduler:
    """Runs the calls of one version of an ensemble. Use as `async with`.

    Args:
        renew: the plan that holds now, when it is no more the one given. Raises Unavailable, with the step's name.
        limits: requests in work, and the bytes of their inputs. What waits for a model is bounded there.
    """

    def __init__(
        self,
        plan: EnsemblePlan,
        renew: Callable[[EnsemblePlan], EnsemblePlan],
        limits: QueueLimits,
        *,
        statistics: Statistics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = plan.graph.name
        self._plan = plan
        self._renew = renew
        self._most_calls = plan.graph.max_in_flight or limits.calls
        self._most_bytes = limits.size_bytes
        self._statistics = statistics
        self._clock = clock
        self._runs: dict[Run, None] = {}
        self._size_bytes = 0
        self._mean_s = 0.0
        self._is_closing = False

    async def __aenter__(self) -> EnsembleScheduler:
        self._is_drained = asyncio.Event()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        try:
            while self._runs:
                self._is_drained.clear()
                await self._is_drained.wait()
        finally:
            for run in list(self._runs):
                self.abandon(run)

    def refresh(self) -> None:
        """Looks its steps up again. Raises Unavailable, with a step's name."""
        self._plan = self._renew(self._plan)

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Runs one call. Raises what its steps do, with the name of the step; and as `RunsCalls.submit` does."""
        return await submit_and_wait(self, request, deadline, tenant)

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> Run:
        """As `RunsCalls.start`."""
        if self._is_closing:
            raise Unavailable(f"model '{self._name}' is being unloaded")
        self.refresh()
        now, timeout_us = self._clock(), request.parameters.timeout_us
        expires = min(deadline, now + timeout_us / 1e6) if timeout_us else deadline
        if expires <= now:
            self._statistics.expired += 1
            raise DeadlineExceeded(f"Request timeout expired before ensemble '{self._name}' began: it was not executed")
        self._admit(request)
        run = Run(self, self._plan, request, receiver, arrived=now, expires=expires, tenant=tenant)
        self._runs[run] = None
        self._size_bytes += request.size_bytes
        for version in run.plan.versions:
            version.__enter__()
        run.begin()
        return run

    def abandon(self, ticket: Run) -> None:
        """As `RunsCalls.abandon`."""
        if ticket.is_over:
            return
        self._statistics.cancelled += 1
        ticket.abandon()
        self.forget(ticket)

    def is_waiting(self, request: InferenceRequest) -> bool:
        """As `RunsCalls.is_waiting`."""
        return any(run.call is request and run.is_waiting for run in self._runs)

    def _admit(self, request: InferenceRequest) -> None:
        size = self._size_bytes + request.size_bytes
        if len(self._runs) < self._most_calls and (size <= self._most_bytes or not self._runs):
            return
        self._statistics.shed += 1
        after_ms = int(min(max(self._mean_s * 1000, _RETRY_MIN_MS), _RETRY_MAX_MS))
        raise ResourceExhausted(
            f"Exceeds maximum queue size of ensemble '{self._name}': {len(self._runs)} requests are in work, "
            f"{self._size_bytes} bytes in all; at most {self._most_calls} and {self._most_bytes} may; "
            f"retry after {after_ms} ms",
            retry_after_ms=after_ms,
        )

    # Called by runs

    def count(self, run: Run, answer: InferenceResult) -> None:
        """One request that was answered. As in Triton, its times are those of its steps, added up."""
        total_s = self._clock() - run.arrived
        self._mean_s += _WEIGHT * (total_s - self._mean_s)
        self._statistics.executed(answer.times, time.time_ns() // 1_000_000)
        self._statistics.answered(answer.times, queue_ns=answer.queue_ns, total_ns=int(total_s * 1e9))

    def forget(self, run: Run) -> None:
        """It is over: whatever it held is free."""
        if self._runs.pop(run, self) is self:
            return
        self._size_bytes -= run.call.size_bytes
        for version in run.plan.versions:
            version.__exit__(None, None, None)
        if self._is_closing and not self._runs:
            self._is_drained.set()
