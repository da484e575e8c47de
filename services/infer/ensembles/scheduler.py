"""Scheduler of an ensemble: a `RequestScheduler` whose work is the calls of its steps' models.

start ──> are the planned versions still current? ──> admission ──> EnsembleRun ──> result
              └── no: resolve the steps' versions again; a mismatch is an error that names the step
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType

from services.infer.ensembles.plan import EnsemblePlan
from services.infer.ensembles.run import EnsembleRun
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.delivery import OutcomeQueue, Receiver
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.senders import Senders
from services.infer.scheduling.statistics import Shed, Statistics
from services.infer.scheduling.submit import submit_and_wait
from shoal.errors import DeadlineExceeded, ResourceExhausted, Unavailable

_RETRY_MIN_MS, _RETRY_MAX_MS = 5, 5_000
# Weight of the newest request in the mean duration, from which a rejected caller's retry time is derived.
_WEIGHT = 0.1


class EnsembleScheduler:
    """Runs the requests of one version of an ensemble. Use as `async with`.

    Args:
        renew: returns the current plan for an older one. Raises Unavailable, with the step's name.
        limits: requests in progress, and the bytes of their inputs. The models bound their own queues.
        outcomes: delivers the outcomes; shared by the schedulers of a process.
    """

    def __init__(
        self,
        plan: EnsemblePlan,
        renew: Callable[[EnsemblePlan], EnsemblePlan],
        limits: QueueLimits,
        *,
        statistics: Statistics,
        outcomes: OutcomeQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = plan.graph.name
        self._plan = plan
        self._renew = renew
        self._max_requests = plan.graph.max_in_flight or limits.calls
        self._max_bytes = limits.size_bytes
        self._statistics = statistics
        self._outcomes = outcomes or OutcomeQueue()
        self._clock = clock
        self._runs: dict[EnsembleRun, None] = {}
        self._senders: Senders[EnsembleRun] = Senders({})
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
            self.end_all()

    def end_all(self) -> None:
        """End all runs, as `RequestScheduler.end_all`."""
        self._is_closing = True
        for run in list(self._runs):
            run.fail(self._unloading_error())

    def _unloading_error(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' is being unloaded")

    def refresh(self) -> None:
        """Resolve the steps' versions again. Raises Unavailable, with a step's name."""
        self._plan = self._renew(self._plan)

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Run one request.

        Raises:
            ShoalError: as `RequestScheduler.submit`; an error of a step names that step.
        """
        return await submit_and_wait(self, request, deadline, tenant)

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> EnsembleRun:
        """Start one request, as `RequestScheduler.start`."""
        if self._is_closing:
            raise self._unloading_error()
        self.refresh()
        now, timeout_us = self._clock(), request.parameters.timeout_us
        expires = min(deadline, now + timeout_us / 1e6) if timeout_us else deadline
        if expires <= now:
            self._statistics.expired += 1
            raise DeadlineExceeded(f"Request timeout expired before ensemble '{self._name}' began: it was not executed")
        self._admit(request, tenant)
        run = EnsembleRun(self, self._plan, request, receiver, arrived=now, expires=expires, tenant=tenant)
        self._runs[run] = None
        self._senders.add(run, tenant)
        self._size_bytes += request.size_bytes
        for version in run.plan.versions:
            version.__enter__()
        run.begin()
        return run

    def abandon(self, ticket: EnsembleRun) -> bool:
        """Cancel a run, as `RequestScheduler.abandon`."""
        if not ticket.abandon():
            return False
        # A run with an outcome is in the statistics already.
        if ticket.outcome is None:
            self._statistics.cancelled += 1
            ticket.cancel_steps()
            self._release(ticket)
        return True

    def age_ns(self, ticket: EnsembleRun) -> int:
        return int((self._clock() - ticket.arrived) * 1e9)

    def is_waiting(self, request: InferenceRequest) -> bool:
        """Return True while no step of `request` has begun its execution."""
        return any(run.request is request and run.is_waiting for run in self._runs)

    def _admit(self, request: InferenceRequest, tenant: str) -> None:
        """End runs of another sender when a limit is reached. Raises ResourceExhausted when none has more of them.

        A single request may exceed the limit of bytes.
        """
        count = len(self._runs)
        excess_bytes = self._size_bytes + request.size_bytes - self._max_bytes if count else 0
        if count < self._max_requests and excess_bytes <= 0:
            return
        error = self._full_error()
        victims = self._senders.victims(request, tenant, calls=count + 1 - self._max_requests, size_bytes=excess_bytes)
        self._statistics.shed_by[Shed.QUEUE_FULL] += len(victims) or 1
        if not victims:
            raise error
        for run in victims:
            run.fail(error)

    def _full_error(self) -> ResourceExhausted:
        after_ms = int(min(max(self._mean_s * 1000, _RETRY_MIN_MS), _RETRY_MAX_MS))
        return ResourceExhausted(
            f"Exceeds maximum queue size of ensemble '{self._name}': {len(self._runs)} requests are in progress with "
            f"{self._size_bytes} bytes, the limits are {self._max_requests} requests and {self._max_bytes} bytes; "
            f"retry after {after_ms} ms",
            retry_after_ms=after_ms,
        )

    # Called by runs

    def record(self, run: EnsembleRun, result: InferenceResult) -> None:
        """Record one successful request. As in Triton, its times are the sums of its steps' times."""
        total_s = self._clock() - run.arrived
        self._mean_s += _WEIGHT * (total_s - self._mean_s)
        self._statistics.executed(result.times, time.time_ns() // 1_000_000)
        self._statistics.succeeded(result.times, queue_ns=result.queue_ns, total_ns=int(total_s * 1e9))
        if (trace := run.request.trace) is not None:
            self._statistics.traced(trace, result.times, queue_s=result.queue_ns * 1e-9, total_s=total_s)

    def end(self, run: EnsembleRun) -> None:
        """Release what a concluded run holds, and deliver its outcome."""
        self._release(run)
        self._outcomes.extend((run,), self._statistics.writing(run.request.trace))

    def _release(self, run: EnsembleRun) -> None:
        """Release the bytes and the model versions of a run that is over."""
        del self._runs[run]
        self._senders.remove(run)
        self._size_bytes -= run.request.size_bytes
        for version in run.plan.versions:
            version.__exit__(None, None, None)
        if self._is_closing and not self._runs:
            self._is_drained.set()
