"""Brings the steps of sequences to execution: a `runs_calls.RunsCalls`. The decisions are the table's and the policies'.

    start ──> table ──heads of an instance──> direct | oldest ──> worker thread ──> answers, new states

Each instance has a worker, which runs one batch at a time. This shell waits, hands over and counts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import TracebackType

from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.batcher import Wait
from services.infer.scheduling.execution import Executor
from services.infer.scheduling.queue import QueueLimits, Receiver
from services.infer.scheduling.statistics import Statistics
from services.infer.scheduling.submit import submit_and_wait
from services.infer.scheduling.worker import ThreadWorker, Worker
from services.infer.sequences import admission, direct, oldest, rejections
from services.infer.sequences.oldest import Chosen
from services.infer.sequences.sequence_table import SequenceTable, UnknownSequence
from services.infer.sequences.settings import CORRID, SequenceSettings
from services.infer.sequences.step import SequenceStep
from shoal.errors import DeadlineExceeded, ResourceExhausted, Unavailable

log = logging.getLogger(__name__)

_RETRY_MS = 100
# A refused caller comes back when a few steps may have been taken.

_MAX_TIMER_S = 3600.0
# No timer is set for longer: loops differ in how far they can count.


class SequenceScheduler:
    """Runs the requests of one version of a stateful model. Use as `async with`: leaving runs what still waits."""

    def __init__(
        self,
        name: str,
        execution: Callable[[int], Executor],
        settings: SequenceSettings,
        limits: QueueLimits,
        *,
        instances: int = 1,
        weights: Mapping[str, float] | None = None,
        first_shapes: Hashable = (),
        statistics: Statistics,
        clock: Callable[[], float] = time.monotonic,
        worker: Callable[[Executor, asyncio.AbstractEventLoop, str], Worker] = ThreadWorker,
    ) -> None:
        """
        Args:
            execution: makes what runs the batches of the instance with this number; called once for each.
            limits: of what waits.
            weights: shares of tenants whose sequences wait for a slot; 1 for those that are not named.
            first_shapes: of the states that a sequence begins with.
            clock: seconds; the one that deadlines and the executions' expiry are on.
        """
        self._name, self._execution, self._settings, self._limits = name, execution, settings, limits
        self._statistics, self._clock, self._make_worker = statistics, clock, worker
        self.table = SequenceTable(instances, settings.slots, settings.idle_s, weights, first_shapes)
        self._instances = instances
        self._workers: list[Worker] = []
        self._idle: set[int] = set()
        self._id_datatype = next((c.datatype for c in settings.controls if c.kind == CORRID), None)
        self._unanswered: deque[SequenceStep] | None = deque() if settings.preserves_order else None
        self._will_dispatch = self._is_closing = self._is_ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    async def __aenter__(self) -> SequenceScheduler:
        self._loop = asyncio.get_running_loop()
        self._is_drained = asyncio.Event()
        try:
            for n in range(self._instances):
                self._workers.append(self._make_worker(self._execution(n), self._loop, f"{self._name}-{n}"))
        except BaseException:
            self._close_workers()
            raise
        self._idle = set(range(self._instances))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._dispatch_soon()
        try:
            await self._is_drained.wait()
        finally:
            self._close_workers()
            if self._timer is not None:
                self._timer.cancel()
            # Nobody drained when leaving was cut short: what still waits is told so.
            for step in self.table.waiting_steps():
                self._settle(step, self._unloading_error())

    def _close_workers(self) -> None:
        self._idle, self._is_ended = set(), True
        for worker in self._workers:
            worker.close()

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """As `RunsCalls` has it. Raises InvalidArgument, too: the request is no step of a sequence that is known here."""
        return await submit_and_wait(self, request, deadline, tenant)

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> SequenceStep:
        if self._is_closing:
            raise self._unloading_error()
        admission.check(self._name, request, self._id_datatype)
        now = self._clock()
        step = SequenceStep(request, now, deadline, receiver)
        self._expire(now)  # First of all: what this step belongs to may be over.
        if step.expires <= now:
            self._statistics.expired += 1
            raise self._expired_error()
        self._check_capacity(request)
        try:
            self.table.add(step, tenant)
        except UnknownSequence:
            raise rejections.unknown(self._name, step.id, self._settings.idle_s) from None
        if self._unanswered is not None:
            self._unanswered.append(step)
        self._set_timer(step.expires, now)
        self._dispatch_soon()
        return step

    def is_waiting(self, request: InferenceRequest) -> bool:
        return self.table.holds(request)

    def abandon(self, step: SequenceStep) -> None:
        if step.is_abandoned:
            return
        step.is_abandoned = True
        self._statistics.cancelled += 1
        self._drop(step)
        self._release()

    def _check_capacity(self, request: InferenceRequest) -> None:
        count, size = self.table.waiting, self.table.waiting_bytes
        limits = self._limits
        if count >= limits.calls or (count and size + request.size_bytes > limits.size_bytes):
            self._statistics.shed += 1
            raise ResourceExhausted(
                f"Exceeds maximum queue size of model '{self._name}': {count} requests with {size} bytes wait, at most "
                f"{limits.calls} and {limits.size_bytes} may; retry after {_RETRY_MS} ms",
                retry_after_ms=_RETRY_MS,
            )

    # Batches

    def _dispatch_soon(self) -> None:
        # Not now: what comes in this round of the loop should join.
        if not self._will_dispatch:
            self._will_dispatch = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Gives what may run to the instances that are free."""
        self._will_dispatch = False
        now = self._clock()
        self._expire(now)
        for instance in sorted(self._idle):
            chosen = self._decide(instance, now)
            if isinstance(chosen, Wait):
                if chosen.until is not None:
                    self._set_timer(chosen.until, now)
                continue
            self._idle.discard(instance)
            self.table.take(chosen.steps)
            steps = sorted(chosen.steps, key=lambda step: step.slot) if self._settings.is_direct else chosen.steps
            self._workers[instance].run(steps, partial(self._on_batch_done, instance, steps, chosen.fired, now))
        self._set_timer(self.table.next_expiry(), now)
        if self._is_closing and not self.table.waiting and len(self._idle) == len(self._workers):
            self._is_drained.set()

    def _decide(self, instance: int, now: float) -> Chosen | Wait:
        heads = self.table.heads(instance)
        if self._is_closing:
            return oldest.choose_now(heads, self._settings, self.table.key)
        decide = direct.decide if self._settings.is_direct else oldest.decide
        return decide(heads, now, self._settings, self.table.key)

    def _on_batch_done(
        self,
        instance: int,
        steps: Sequence[SequenceStep],
        fired: str,
        started: float,
        outcomes: Sequence[Outcome],
        _: float,
    ) -> None:
        now = self._clock()
        if not self._is_ended:
            self._idle.add(instance)
        started_sequences = set()
        for step, outcome in zip(steps, outcomes, strict=True):
            is_success = isinstance(outcome, InferenceResult)
            self._reject_unknown(self.table.ran(step, now, is_success=is_success))
            if is_success and step.starts and not step.ends:
                started_sequences.add(step.sequence)
        if any(step.is_lost for step in steps):
            log.warning("model %s: the process of instance %d ended, and its sequences with it", self._name, instance)
            self._reject_unknown(self.table.lose_instance(instance, started_sequences))
        self._count_answered(steps, outcomes, fired, started, now)
        tally = self._workers[instance].execution.tally
        if tally.bisections or tally.expired_rows:
            self._statistics.tally(tally)
        # Before answers are given: whoever gets one may send its next step at once.
        self._dispatch()
        for step, outcome in zip(steps, outcomes, strict=True):
            self._settle(step, outcome)

    def _count_answered(
        self, steps: Sequence[SequenceStep], outcomes: Sequence[Outcome], fired: str, started: float, now: float
    ) -> None:
        executions: set[int] = set()
        for step, outcome in zip(steps, outcomes, strict=True):
            if not isinstance(outcome, InferenceResult):
                continue
            times: ExecutionTimes = outcome.times
            if id(times) not in executions:
                executions.add(id(times))
                self._statistics.executed(times, time.time_ns() // 1_000_000)
            outcome.queue_ns, outcome.fired = int((started - step.arrived) * 1e9), fired
            total_ns = int((now - step.arrived) * 1e9)
            self._statistics.answered(times, queue_ns=outcome.queue_ns, total_ns=total_ns)

    # Outcomes

    def _settle(self, step: SequenceStep, outcome: Outcome) -> None:
        step.outcome = outcome
        if self._unanswered is None:
            self._deliver(step)
        else:
            self._release()

    def _release(self) -> None:
        """Where order is preserved: gives what is next in the order of arrival, and ready."""
        unanswered = self._unanswered
        while unanswered and (unanswered[0].is_abandoned or unanswered[0].outcome is not None):
            self._deliver(unanswered.popleft())

    def _deliver(self, step: SequenceStep) -> None:
        if step.is_abandoned or step.outcome is None:
            return
        step.is_abandoned = True  # From here on, it is over.
        try:
            if isinstance(step.outcome, InferenceResult):
                step.receiver.answered(step.outcome)
            else:
                if isinstance(step.outcome, DeadlineExceeded):
                    self._statistics.expired += 1
                step.receiver.failed(step.outcome)
        except Exception:  # One caller's trouble is no other's.
            log.exception("model %s: an answer could not be given", self._name)

    def _reject_unknown(self, steps: Sequence[SequenceStep]) -> None:
        for step in steps:
            self._settle(step, rejections.unknown(self._name, step.id, self._settings.idle_s))

    def _drop(self, step: SequenceStep) -> None:
        self._reject_unknown(self.table.drop(step, self._clock()))
        self._dispatch_soon()

    # Time

    def _expire(self, now: float) -> None:
        """Sends away what is too late, and ends what was idle for too long."""
        expired, idle = list(self.table.expire(now)), self.table.close_idle(now, all_idle=self._is_closing)
        for step in expired:
            self._reject_unknown(self.table.drop(step, now))
            self._settle(step, self._expired_error())
        for sequence in idle:
            log.debug("model %s: sequence %r was idle for too long, and is over", self._name, sequence.id)
        if expired or idle:
            self._dispatch_soon()  # Places are free.

    def _unloading_error(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' is being unloaded")

    def _expired_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Request timeout expired in the queue of model '{self._name}': it was not executed")

    def _set_timer(self, at: float, now: float) -> None:
        """Looks again at `at`, if not earlier."""
        if at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # A loop's timer may be a little early; then nothing is due yet, and a moment later it is asked again.
        self._timer = self._loop.call_later(min(max(at - now, 0.0005), _MAX_TIMER_S), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self._dispatch()
