"""Scheduler of sequence steps: a `request_scheduler.RequestScheduler`. The table and the strategies decide.

    start ──> table ──heads of an instance──> direct | oldest ──> worker thread ──> results, new states

Each instance has a worker, which runs one batch at a time. This shell waits, dispatches and counts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import TracebackType

from mesh.h2.memory_account import TenantShares
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.batcher import Wait
from services.infer.scheduling.delivery import OutcomeQueue, Receiver
from services.infer.scheduling.delivery_order import DeliveryOrder
from services.infer.scheduling.execution import Executor
from services.infer.scheduling.output_sizes import UNBOUNDED, OutputSizes
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.statistics import Shed, Statistics
from services.infer.scheduling.submit import submit_and_wait
from services.infer.scheduling.worker import ThreadWorker, Worker
from services.infer.sequences import admission, direct, oldest, rejections
from services.infer.sequences.oldest import Chosen
from services.infer.sequences.sequence_table import SequenceTable, UnknownSequence
from services.infer.sequences.settings import CORRID, SequenceSettings
from services.infer.sequences.step import SequenceStep
from shoal.errors import DeadlineExceeded, ResourceExhausted, Unavailable

log = logging.getLogger(__name__)

# A rejected client returns when a few steps may have run.
_RETRY_MS = 100

# Longest timer: event loops differ in the range of their clocks.
_MAX_TIMER_S = 3600.0


class SequenceScheduler:
    """Runs the requests of one version of a stateful model. Use as `async with`: leaving runs the queued steps."""

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
        outputs: OutputSizes = UNBOUNDED,
        states: TenantShares | None = None,
        statistics: Statistics,
        outcomes: OutcomeQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
        worker: Callable[[Executor, asyncio.AbstractEventLoop, str], Worker] = ThreadWorker,
    ) -> None:
        """Prepare the schedule; workers start on entering.

        Args:
            execution: makes the executor of the instance with this number; called once for each.
            limits: bounds of queued steps.
            weights: shares of tenants whose sequences wait for a slot; 1 for tenants without an entry.
            first_shapes: shapes of the initial states.
            outputs: sizes of the model's outputs, which bound the batches of `oldest`.
            states: memory of the sequences' states, by tenant; shared by the schedulers of a process.
            outcomes: delivers the outcomes; shared by the schedulers of a process.
            clock: seconds; deadlines and the executions' expiry are on this clock.
        """
        self._name, self._execution, self._settings, self._limits = name, execution, settings, limits
        self._statistics, self._clock, self._make_worker = statistics, clock, worker
        # An instance of a direct model computes all slots, whichever have a step.
        self._outputs = UNBOUNDED if settings.is_direct else outputs
        self._outcomes = outcomes or OutcomeQueue()
        self.table = SequenceTable(instances, settings.slots, settings.idle_s, weights, first_shapes, states)
        self._instances = instances
        self._workers: list[Worker] = []
        self._idle: set[int] = set()
        # The steps on workers, by instance, which `end_all` ends.
        self._running: dict[int, Sequence[SequenceStep]] = {}
        self._id_datatype = next((c.datatype for c in settings.controls if c.kind == CORRID), None)
        self._undelivered: DeliveryOrder[SequenceStep] | None = DeliveryOrder() if settings.preserves_order else None
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
            # None are queued unless leaving was cancelled.
            self._end_queued()
            self._close_workers()
            self.table.drop_states()
            if self._timer is not None:
                self._timer.cancel()

    def end_all(self) -> None:
        """End all steps that are queued or running, as `RequestScheduler.end_all`."""
        self._is_closing = self._is_ended = True
        self._end_queued()
        running, self._running = self._running, {}
        for steps in running.values():
            for step in steps:
                self._settle(step, self._unloading_error())
                # The run may end early.
                step.is_abandoned = True
        self._is_drained.set()

    def _end_queued(self) -> None:
        for step in self.table.waiting_steps():
            self._settle(step, self._unloading_error())

    def _close_workers(self) -> None:
        self._idle, self._is_ended = set(), True
        for worker in self._workers:
            worker.close()

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Run one step, as `RequestScheduler.submit`. Raises InvalidArgument for a step of an unknown sequence."""
        return await submit_and_wait(self, request, deadline, tenant)

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> SequenceStep:
        if self._is_closing:
            raise self._unloading_error()
        admission.check(self._name, request, self._id_datatype)
        now = self._clock()
        step = SequenceStep(request, now, deadline, receiver)
        # First of all, because the step's sequence may be closed by it.
        self._expire(now)
        if step.expires <= now:
            self._statistics.expired += 1
            raise self._expired_error()
        self._make_room(request, tenant)
        try:
            self.table.add(step, tenant)
        except UnknownSequence:
            raise rejections.unknown(self._name, step.id, self._settings.idle_s) from None
        self._order([step])
        self._set_timer(step.expires, now)
        self._dispatch_soon()
        return step

    def is_waiting(self, request: InferenceRequest) -> bool:
        return self.table.holds(request)

    def abandon(self, step: SequenceStep) -> bool:
        if not step.abandon():
            return False
        # A step with an outcome is in the statistics already.
        if step.outcome is None:
            self._statistics.cancelled += 1
            self._drop(step)
        self._release(step.tenant)
        return True

    def age_ns(self, step: SequenceStep) -> int:
        return int((self._clock() - step.arrived) * 1e9)

    def _make_room(self, request: InferenceRequest, tenant: str) -> None:
        """Evict steps of another sender when the queue is full. Raises ResourceExhausted when none has more in it."""
        count, size, limits = self.table.waiting, self.table.waiting_bytes, self._limits
        # An empty queue accepts a step of any size.
        excess_bytes = size + request.size_bytes - limits.size_bytes if count else 0
        if count < limits.calls and excess_bytes <= 0:
            return
        error = ResourceExhausted(
            f"Exceeds maximum queue size of model '{self._name}': {count} requests with {size} bytes wait, at most "
            f"{limits.calls} and {limits.size_bytes} may; retry after {_RETRY_MS} ms",
            retry_after_ms=_RETRY_MS,
        )
        victims = self.table.senders.victims(request, tenant, calls=count + 1 - limits.calls, size_bytes=excess_bytes)
        self._statistics.shed_by[Shed.QUEUE_FULL] += len(victims) or 1
        if not victims:
            raise error
        for step in victims:
            self._drop(step)
            self._settle(step, error)

    # Batches

    def _dispatch_soon(self) -> None:
        # Not now: steps that arrive in this iteration of the loop should join the batch.
        if not self._will_dispatch:
            self._will_dispatch = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Start batches of steps that may run on idle workers."""
        self._will_dispatch = False
        if self._is_ended:
            return
        now = self._clock()
        self._expire(now)
        for instance in sorted(self._idle):
            chosen = self._decide(instance, now)
            if isinstance(chosen, Wait):
                if chosen.until is not None:
                    self._set_timer(chosen.until, now)
                continue
            self._idle.discard(instance)
            steps = chosen.steps
            self.table.take(steps)
            self._order(steps)
            if self._settings.is_direct:
                steps = sorted(steps, key=lambda step: step.slot)
            self._running[instance] = steps
            self._workers[instance].run(steps, partial(self._on_batch_done, instance, steps, chosen.fired, now))
        self._set_timer(self.table.next_expiry(), now)
        if self._is_closing and not self.table.waiting and len(self._idle) == len(self._workers):
            self._is_drained.set()

    def _decide(self, instance: int, now: float) -> Chosen | Wait:
        heads = self.table.heads(instance)
        if self._is_closing:
            return oldest.choose_now(heads, self._settings, self.table.key, self._outputs)
        if self._settings.is_direct:
            return direct.decide(heads, now, self._settings, self.table.key)
        return oldest.decide(heads, now, self._settings, self.table.key, self._outputs)

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
        if self._running.pop(instance, None) is None:
            # `end_all` has ended the steps.
            return
        if not self._is_ended:
            self._idle.add(instance)
        started_sequences = set()
        outcomes = list(outcomes)
        learns = self._outputs.is_learning
        for n, step in enumerate(steps):
            outcome = outcomes[n]
            if isinstance(outcome, InferenceResult) and not self.table.has_room(step):
                outcome = outcomes[n] = rejections.no_memory(self._name)
            is_success = isinstance(outcome, InferenceResult)
            if learns and isinstance(outcome, InferenceResult):
                # One of the batch is enough: texts take up to some 100 us.
                self._outputs.add(step.request.key, step.request.rows, outcome.outputs)
                learns = False
            self._reject_unknown(self.table.ran(step, now, is_success=is_success))
            if is_success and step.starts and not step.ends:
                started_sequences.add(step.sequence)
        if any(step.is_lost for step in steps):
            log.warning(
                "model %(model)s: the process of instance %(model_instance)d ended, and its sequences are lost",
                {"event": "model.sequences_lost", "model": self._name, "model_instance": instance},
            )
            self._reject_unknown(self.table.lose_instance(instance, started_sequences))
        self._count_succeeded(steps, outcomes, fired, started, now)
        tally = self._workers[instance].execution.tally
        if tally.bisections or tally.expired_rows:
            self._statistics.tally(tally)
        # The model runs the next steps while responses are written.
        self._dispatch()
        for step, outcome in zip(steps, outcomes, strict=True):
            self._settle(step, outcome)

    def _count_succeeded(
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
            # A step whose caller has left is counted as failed.
            if step.is_over:
                continue
            outcome.queue_ns, outcome.fired = int((started - step.arrived) * 1e9), fired
            total_ns = int((now - step.arrived) * 1e9)
            self._statistics.succeeded(times, queue_ns=outcome.queue_ns, total_ns=total_ns)
            if (trace := step.request.trace) is not None:
                self._statistics.traced(trace, times, queue_s=started - step.arrived, total_s=now - step.arrived)

    # Outcomes

    def _settle(self, step: SequenceStep, outcome: Outcome) -> None:
        if not step.conclude(outcome):
            return
        if isinstance(outcome, DeadlineExceeded):
            self._statistics.expired += 1
        if not step.is_ordered:
            self._outcomes.add(step)
        self._release(step.tenant)

    def _order(self, steps: Sequence[SequenceStep]) -> None:
        """Give steps without a place in the order of delivery the last ones, for a model that preserves order."""
        if self._undelivered is None:
            return
        for step in steps:
            if not step.is_ordered:
                step.is_ordered = True
                self._undelivered.add(step, step.tenant)

    def _release(self, tenant: str) -> None:
        """Pass on the outcomes of a tenant that are next in order of arrival, for a model that preserves order.

        A step that waits for a slot loses its place until it runs: the sequences that hold the slots may wait for the
        outcomes behind it.
        """
        if self._undelivered is None:
            return
        for step in self._undelivered.pop_ready(tenant, lambda step: step.is_over or step.waits_for_slot):
            step.is_ordered = False
            if step.is_over:
                self._outcomes.add(step)

    def _reject_unknown(self, steps: Sequence[SequenceStep]) -> None:
        for step in steps:
            self._settle(step, rejections.unknown(self._name, step.id, self._settings.idle_s))

    def _drop(self, step: SequenceStep) -> None:
        self._reject_unknown(self.table.drop(step, self._clock()))
        self._dispatch_soon()

    # Time

    def _expire(self, now: float) -> None:
        """Fail the steps that have expired, and close the sequences that were idle for too long."""
        expired, idle = list(self.table.expire(now)), self.table.close_idle(now, all_idle=self._is_closing)
        for step in expired:
            error = self._no_slot_error() if step.waits_for_slot else self._expired_error()
            self._reject_unknown(self.table.drop(step, now))
            self._settle(step, error)
        for sequence in idle:
            log.debug("model %s: sequence %r was idle for too long and is closed", self._name, sequence.id)
        if expired or idle:
            # Slots are free.
            self._dispatch_soon()

    def _unloading_error(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' is being unloaded")

    def _expired_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Request timeout expired in the queue of model '{self._name}': it was not executed")

    def _no_slot_error(self) -> DeadlineExceeded:
        slots = self._settings.slots * self._instances
        return DeadlineExceeded(
            f"Request timeout expired in the queue of model '{self._name}': it was not executed, "
            f"because other sequences held all slots ({slots}) until then"
        )

    def _set_timer(self, at: float, now: float) -> None:
        """Dispatch again at `at`, unless a timer is set for an earlier time."""
        if at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # A loop's timer may fire a little early: then nothing is due yet, and the timer is set again.
        self._timer = self._loop.call_later(min(max(at - now, 0.0005), _MAX_TIMER_S), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self._dispatch()
