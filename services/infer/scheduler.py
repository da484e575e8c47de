"""Brings calls to execution: a queue, and one worker for each instance of the model.

    submit ──> queue ──decide──> batch ──one hop──> worker thread: Execution.run ──one hop──> answers

The decisions are the queue's and the batcher's; this shell only waits, hands over and counts. Its event loop is never
blocked: a batch crosses to a thread once, and back once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from services.infer.batcher import BatchPolicy, Wait
from services.infer.execution import Execution, Outcome, Times
from services.infer.queue import Pending, Queue, QueueLimits
from services.infer.request import Call
from services.infer.statistics import Statistics
from services.infer.tensors import Tensor
from shoal.errors import DeadlineExceeded, Unavailable

log = logging.getLogger(__name__)

_RETRY_MIN_MS, _RETRY_MAX_MS = 5, 5_000
# A refused caller comes back soon enough to use what was freed, and not so soon that it only asks again.

_SMOOTHING = 0.2
# Weight of the newest execution in the running mean of seconds a row.


_TIMER_S = 0.001
# The event loop's timers count milliseconds: a shorter wait would be none at all, and the worker would spin.


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one call."""

    outputs: Sequence[Tensor]
    """In the order that the call asks for them."""
    times: Times
    queue_ns: int
    """How long it waited before its execution."""
    fired: str = ""
    """Why its batch was run when it was."""


class Scheduler:
    """Runs the calls of one model version. Use as `async with`: leaving runs what still waits, then stops.

    Args:
        execution: makes the Execution of one worker; called once for each.
        instances: how many executions may run at the same time.
        default_timeout_s: how long a call may wait, unless it says less; infinite for no bound.
        clock: seconds; the one that deadlines and the executions' expiry are on.
    """

    def __init__(
        self,
        name: str,
        execution: Callable[[], Execution],
        policy: BatchPolicy,
        limits: QueueLimits,
        *,
        instances: int = 1,
        default_timeout_s: float = math.inf,
        statistics: Statistics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._queue = Queue(name, limits, policy)
        self._execution = execution
        self._instances = instances
        self._default_timeout_s = default_timeout_s
        self._statistics = statistics
        self._clock = clock
        self._arrived = asyncio.Event()
        self._is_closing = False
        self._row_s = 0.0
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Scheduler:
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(self._instances, thread_name_prefix=self._name)
        self._workers = [
            asyncio.create_task(self._work(self._execution()), name=f"{self._name}-{n}") for n in range(self._instances)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._arrived.set()
        await asyncio.gather(*self._workers)
        self._threads.shutdown(wait=False)

    def is_waiting(self, call: Call) -> bool:
        """Whether `call` is in the queue: its execution has not begun."""
        return self._queue.holds(call)

    async def submit(self, call: Call, deadline: float = math.inf, tenant: str = "") -> Answer:
        """Runs one call with whatever it can share an execution with.

        Args:
            deadline: on this scheduler's clock; the call is not started at or after it, nor after its own `timeout`.

        Raises:
            ResourceExhausted: the queue is full.
            DeadlineExceeded: it could not be started in time, and was not.
            Internal: the model cannot process this call.
            Unavailable: the model is being unloaded.
        """
        if self._is_closing:
            raise Unavailable(f"model '{self._name}' is being unloaded")
        now = self._clock()
        timeout_us = call.parameters.timeout_us
        expires = min(deadline, now + self._default_timeout_s, now + timeout_us / 1e6 if timeout_us else math.inf)
        if expires <= now:
            raise self._too_late()
        pending = Pending(call, now, expires, self._loop.create_future())
        self._queue.add(pending, self._retry_after_ms)
        self._arrived.set()
        timer = self._loop.call_later(expires - now, self._expire, pending) if expires != math.inf else None
        try:
            outcome = await pending.answer
        finally:
            if timer is not None:
                timer.cancel()
            pending.is_abandoned = True
            self._queue.discard(pending)
        if outcome.error is not None:
            raise outcome.error
        queue_ns, total_ns = int((pending.started - now) * 1e9), int((self._clock() - now) * 1e9)
        self._statistics.answered(outcome.times, queue_ns=queue_ns, total_ns=total_ns)
        return Answer(outcome.outputs, outcome.times, queue_ns)

    def _expire(self, pending: Pending) -> None:
        if self._queue.discard(pending) and not pending.answer.done():
            pending.answer.set_exception(self._too_late())

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Request timeout expired in the queue of model '{self._name}': it was not executed")

    def _retry_after_ms(self) -> int:
        backlog_s = self._queue.rows * self._row_s / self._instances
        return int(min(max(backlog_s * 1000, _RETRY_MIN_MS), _RETRY_MAX_MS))

    async def _work(self, execution: Execution) -> None:
        while batch := await self._next():
            try:
                outcomes = await self._loop.run_in_executor(self._threads, execution.run, batch)
            except Exception as err:  # The thread could not be had: the calls must hear of it, the worker lives on.
                log.exception("model %s: a batch was not run", self._name)
                outcomes = [Outcome(error=err)] * len(batch)
            self._hand_out(batch, outcomes)

    async def _next(self) -> Sequence[Pending] | None:
        """The next batch; None when there will be no more."""
        while True:
            self._arrived.clear()
            found = self._queue.take(self._clock(), is_late=self._is_closing)
            if not isinstance(found, Wait):
                if len(self._queue):
                    self._arrived.set()  # What is left may be for another worker.
                return found
            if found.until is None and self._is_closing:
                return None
            await self._wait(found.until)

    async def _wait(self, until: float | None) -> None:
        if until is None:
            await self._arrived.wait()
            return
        timer = self._loop.call_later(max(until - self._clock(), _TIMER_S), self._arrived.set)
        try:
            await self._arrived.wait()
        finally:
            timer.cancel()

    def _hand_out(self, batch: Sequence[Pending], outcomes: Sequence[Outcome]) -> None:
        counted = None
        for pending, outcome in zip(batch, outcomes, strict=True):
            if outcome.error is None and outcome.times is not counted:
                counted = outcome.times
                self._statistics.executed(counted, time.time_ns() // 1_000_000)
                row_s = counted.compute_ns / 1e9 / max(counted.rows, 1)
                self._row_s += (row_s - self._row_s) * (_SMOOTHING if self._row_s else 1.0)
            if not pending.answer.done():
                pending.answer.set_result(outcome)
