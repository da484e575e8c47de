"""Scheduler of one model version: a queue, and one worker for each instance of the model.

    start ──> queue ──take──> batch ──> on the loop, when shorter than a thread handoff     ──> results
                                   └──> worker thread: a handoff there, and one back ─┘

The queue and the policies decide; this shell waits, dispatches and counts. The cost per request is small: no task, no
timer, no lock; one pass over the batch when it is taken, run, and delivered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from types import TracebackType

from mesh.metrics.histogram import SECONDS
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.batcher import BatchPolicy, Wait
from services.infer.scheduling.cost import Backlog, CostCurve, LoopCost
from services.infer.scheduling.delivery import OutcomeQueue, Receiver
from services.infer.scheduling.delivery_order import DeliveryOrder
from services.infer.scheduling.execution import Executor
from services.infer.scheduling.long_batches import LongBatches
from services.infer.scheduling.output_sizes import UNBOUNDED, UNRESERVED_BYTES, OutputSizes
from services.infer.scheduling.overload import USABLE_SHARE, Pressure, usable_share
from services.infer.scheduling.queue import Batch, Queue, QueuedRequest, QueueLimits
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.statistics import Shed, Statistics
from services.infer.scheduling.submit import submit_and_wait
from services.infer.scheduling.worker import ThreadWorker, Worker
from shoal.errors import DeadlineExceeded, ResourceExhausted, Unavailable

__all__ = ["InferenceResult", "Receiver", "Scheduler"]

log = logging.getLogger(__name__)

# A rejected client should return soon enough to use freed capacity, and not so soon that it is rejected again.
_RETRY_MIN_MS, _RETRY_MAX_MS = 5, 5_000

# A batch's handoff to a thread and back takes about this long, twice that when both want the interpreter's lock.
# A shorter batch runs on the loop.
_THREAD_HANDOFF_S = 150e-6

# The same for a lone request: both threads sleep by then, and waking them takes 0.3 to 1.1 ms on an idle machine.
# Running on the loop then delays only the few requests of other models.
_LONE_HANDOFF_S = 500e-6

# A run that may never end is looked at as often, for whether a caller still waits for it.
_LOOK_S = 1.0

# A run on the loop that takes longer has misled the forecast by 2 ms and more: see LoopCost.
_STALL_S = 2.5e-3

# Python work of an execution per request. It holds the interpreter's lock, so that a thread would not spare the loop.
_REQUEST_S = 2e-6

# After this many such gaps between an outcome and the next request, requests arrive one at a time.
# A client that sends its next request on an outcome leaves a shorter gap.
_IDLE_GAP_S, _IDLE_GAPS = 100e-6, 8

# Executions until a goal that cannot be met is logged.
_GOAL_CHECK_AFTER = 50

# The event loop's timers count milliseconds: an idle worker waits for the last part of a wait.
_FINE_TIMER_S = 0.005

# Longest timer: event loops differ in the range of their clocks.
_MAX_TIMER_S = 3600.0

_IS_OVER = attrgetter("is_over")


class Scheduler:
    """Runs the requests of one model version. Use as `async with`: leaving runs the queued requests, then stops.

    Args:
        execution: makes the executor of one worker; called once for each instance.
        instances: number of executions that may run at the same time.
        cost: execution costs known from warm-up.
        outputs: sizes of the model's outputs.
        outcomes: delivers the outcomes; shared by the schedulers of a process.
        clock: seconds; deadlines and the executions' expiry are on this clock.
        worker: makes the worker of one instance.
    """

    def __init__(
        self,
        name: str,
        execution: Callable[[], Executor],
        policy: BatchPolicy,
        limits: QueueLimits,
        rules: Rules | None = None,
        *,
        instances: int = 1,
        statistics: Statistics,
        cost: CostCurve | None = None,
        outputs: OutputSizes = UNBOUNDED,
        outcomes: OutcomeQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
        worker: Callable[[Executor, asyncio.AbstractEventLoop, str], Worker] = ThreadWorker,
    ) -> None:
        self._name = name
        self._policy = policy
        self._rules = rules or Rules()
        self.cost = cost if cost is not None else CostCurve()
        # Processor time of the model alone: the cost of a run on the loop.
        self._loop_cost = LoopCost()
        self._outputs = outputs
        self._long_batches = LongBatches()
        self._queue = Queue(name, limits, policy, self._rules, self.cost, outputs, self._long_batches)
        self._execution = execution
        self._instances = instances
        self._statistics = statistics
        self._outcomes = outcomes or OutcomeQueue()
        self._clock = clock
        self._make_worker = worker
        self._goal_s = policy.slo_s if policy.has_goal else math.inf
        if policy.slo_s != math.inf and policy.is_static:
            log.warning(
                "model %(model)s: slo_ms has no effect: a queue delay or preferred sizes are set, and take precedence",
                {"event": "model.slo_has_no_effect", "model": name},
            )
        self._waits = policy.is_static or policy.has_goal
        self._has_rules = self._rules != Rules(weights=self._rules.weights) or self._goal_s != math.inf
        self._backlog = Backlog()
        self._pressure = Pressure()
        self._idle: list[Worker] = []
        # When the first of the idle workers became idle, while there is one.
        self._free_since = -math.inf
        self._workers: list[Worker] = []
        self._may_run_on_loop = False
        self._free_at: dict[Worker, float] = {}
        # The batches on workers, which `end_all` ends.
        self._running: dict[Worker, Batch] = {}
        self._was_busy = False
        is_ordered = self._rules.preserves_order
        self._undelivered: DeliveryOrder[QueuedRequest] | None = DeliveryOrder() if is_ordered else None
        self._is_closing = self._is_ended = False
        self._will_dispatch = False
        self._delivered_at = -math.inf
        self._idle_gaps = 0
        self._wake_timer: asyncio.TimerHandle | None = None
        self._wake_timer_at = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    async def __aenter__(self) -> Scheduler:
        self._loop = asyncio.get_running_loop()
        self._is_drained = asyncio.Event()
        try:
            for n in range(self._instances):
                self._workers.append(self._make_worker(self._execution(), self._loop, f"{self._name}-{n}"))
        except BaseException:
            self._close_workers()
            raise
        self._idle = self._workers[::-1]
        self._may_run_on_loop = all(worker.execution.may_run_on_loop for worker in self._workers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._dispatch_soon()
        try:
            await self._is_drained.wait()
        finally:
            # Not empty only when leaving was cancelled.
            self._end_queued()
            self._close_workers()
            for timer in (self._timer, self._wake_timer):
                if timer is not None:
                    timer.cancel()

    def end_all(self) -> None:
        """End all requests that are queued or running, with UNAVAILABLE; leaving then does not wait for the workers."""
        self._is_closing = self._is_ended = True
        self._end_queued()
        running, self._running = self._running, {}
        for worker, batch in running.items():
            if worker.execution.may_not_end:
                worker.execution.give_up()
            if batch.reserved:
                _release_outputs(batch)
            for queued in batch.requests:
                self._settle(queued, self._unloading_error())
                # The run may end early.
                queued.is_abandoned = True
        self._is_drained.set()

    def _end_queued(self) -> None:
        while not isinstance(batch := self._queue.take(math.inf, is_late=True), Wait):
            for queued in batch.requests:
                self._settle(queued, self._unloading_error())

    def _close_workers(self) -> None:
        self._idle, self._is_ended = [], True
        for worker in self._workers:
            worker.close()

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Run one request, batched with others where possible, and return its result.

        Args:
            deadline: on this scheduler's clock; the request never starts at or after it, nor after its own `timeout`.
            tenant: the request's tenant, for a fair share of the model.

        Raises:
            ResourceExhausted: the queue is full, or too long for the request's deadline.
            DeadlineExceeded: the request could not be started in time, and was not.
            Internal: the model cannot process this request.
            Unavailable: the model is being unloaded.
        """
        return await submit_and_wait(self, request, deadline, tenant)

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> QueuedRequest:
        """Enqueue a request without waiting; `receiver` is called with its outcome. Raises errors known immediately.

        Only a receiver with `is_direct` may be called before `start` returns.
        """
        if self._is_closing:
            raise self._unloading_error()
        now = self._clock()
        queued = QueuedRequest(request, now, deadline, receiver)
        if self._has_rules or request.parameters.timeout_us:
            self._apply_rules(queued)
        if queued.expires <= now:
            self._statistics.expired += 1
            raise self._expired_error()
        if not self._idle:
            self._pressure.add(queued.rows, queued.expires - now)
            if self._has_estimates:
                self._admit(queued, tenant, now)
        try:
            evicted = self._queue.add(queued, tenant, self._retry_after_ms)
        except ResourceExhausted:
            self._statistics.shed_by[Shed.QUEUE_FULL] += 1
            raise
        if evicted:
            self._evict(evicted)
        if self._undelivered is not None:
            self._undelivered.add(queued, queued.tenant)
        if queued.expires < self._timer_at or queued.yields_at < self._timer_at:
            self._set_timer(min(queued.expires, queued.yields_at), now)
        if self._will_dispatch or not self._idle:
            self._idle_gaps = 0
        elif self._is_lone(now):
            self._dispatch()
        else:
            self._dispatch_soon()
        return queued

    def _is_lone(self, now: float) -> bool:
        """Return True while requests arrive one at a time: dispatching now costs no batch-mates."""
        self._idle_gaps = self._idle_gaps + 1 if now - self._delivered_at > _IDLE_GAP_S else 0
        return self._idle_gaps > _IDLE_GAPS

    def is_waiting(self, request: InferenceRequest) -> bool:
        """Return True while `request` is queued: its execution has not begun."""
        return self._queue.holds(request)

    def abandon(self, queued: QueuedRequest) -> bool:
        """Drop a request whose caller has left: its receiver is not called.

        Return False, without an effect, once the outcome is delivered or the request was abandoned.
        """
        if not queued.abandon():
            return False
        # A request with an outcome is in the statistics already.
        if queued.outcome is None:
            self._statistics.cancelled += 1
            self._queue.discard(queued)
            if queued.on_abandoned is not None:
                queued.on_abandoned()
        if self._undelivered is not None:
            self._release(queued.tenant)
        return True

    def age_ns(self, queued: QueuedRequest) -> int:
        """Return the nanoseconds since the request arrived."""
        return int((self._clock() - queued.arrived) * 1e9)

    def _apply_rules(self, queued: QueuedRequest) -> None:
        parameters = queued.request.parameters
        queued.level = self._rules.level(parameters.priority)
        level = self._rules.levels[queued.level]
        timeout_s = level.timeout_s
        if parameters.timeout_us and level.allows_override:
            timeout_s = min(timeout_s, parameters.timeout_us / 1e6)
        if level.delays:
            queued.yields_at = queued.arrived + timeout_s
        else:
            queued.expires = min(queued.deadline, queued.arrived + timeout_s)
        queued.due = min(queued.deadline, queued.arrived + self._goal_s) if self._goal_s != math.inf else math.inf

    # Forecasts

    def _admit(self, queued: QueuedRequest, tenant: str, now: float) -> None:
        """Raise ResourceExhausted when the backlog is too long for `queued` to be done in time."""
        bound = min(queued.expires, queued.due)
        if bound == math.inf:
            return
        most = self._max_rows(now)
        if self._queue.rows <= most and not self._pressure.is_overloaded:
            return
        free_s = max(min(self._free_at.values(), default=now) - now, 0.0)
        row_s, batch_s = self._row_and_batch_s(most)
        row_s /= self._instances
        ahead_s = free_s + self._queue.rows * row_s
        share = usable_share(ahead_s, batch_s / self._instances)
        if ahead_s + batch_s < share * (bound - now):
            return
        # Whole batches run before this request.
        start_s = free_s + self._queue.rows_ahead(queued, tenant) // most * most * row_s
        end = now + (start_s + batch_s) / share
        meets_goal = end < queued.due or not self._can_reach_goal()
        if meets_goal and now + start_s < queued.expires and end < queued.deadline:
            return
        self._statistics.shed_by[Shed.TOO_LATE] += 1
        after_ms = self._retry_after_ms()
        raise ResourceExhausted(
            f"model '{self._name}' is overloaded: about {start_s * 1000:.0f} ms of work wait before this request, "
            f"which should be done in {(bound - now) * 1000:.0f} ms; retry after {after_ms} ms",
            retry_after_ms=after_ms,
        )

    def _max_rows(self, now: float) -> int:
        """Return the rows of the next batch: fewer than the policy allows if more requests then complete in time."""
        if self._waits:
            return self._policy.max_rows
        return self._pressure.max_rows(now, self.cost, self._policy.max_rows, self._instances)

    @property
    def _has_estimates(self) -> bool:
        return self._backlog.is_known or self.cost.is_known

    def _row_and_batch_s(self, rows: int) -> tuple[float, float]:
        """Return the seconds of a row and of a batch of `rows`, while the backlog is longer than a batch."""
        if self._waits or not self.cost.is_known:
            return self._backlog.row_s, self._backlog.batch_s
        batch_s = self.cost.expected(rows)
        return batch_s / rows, batch_s

    def _can_reach_goal(self) -> bool:
        return self._backlog.batch_s < self._goal_s

    def _retry_after_ms(self) -> int:
        """Return the time until the present backlog is done, an estimate."""
        row_s = self._backlog.row_s or self.cost.expected(1)
        backlog_s = self._queue.rows * row_s / self._instances
        return int(min(max(backlog_s * 1000, _RETRY_MIN_MS), _RETRY_MAX_MS))

    # Batches

    def _dispatch_soon(self) -> None:
        if not self._will_dispatch:
            self._will_dispatch = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self, *, is_direct: bool = True) -> None:
        """Start batches of queued requests on idle workers.

        Args:
            is_direct: the outcome of a lone request that runs on the loop may be delivered before this method returns.
        """
        self._will_dispatch = False
        now = self._clock()
        if self._queue.next_expiry() <= now:
            self._expire(now)
        while self._idle:
            most = self._max_rows(now)
            if (self._queue.rows > most or self._pressure.is_overloaded) and self._has_estimates:
                self._shed(now, min(most, self._queue.rows))
            batch = self._queue.take(
                now,
                max_rows=most,
                instances=self._instances,
                is_idle=not self._was_busy,
                is_late=self._is_closing,
                room_comes=bool(self._running) and any(batch.reserved for batch in self._running.values()),
            )
            if isinstance(batch, Wait):
                if batch.until is not None:
                    self._wake_at(batch.until, now)
                break
            row_bytes = self._outputs.row_bytes(batch.requests[0].request.key)
            if row_bytes * batch.rows > UNRESERVED_BYTES and not self._reserve(batch):
                continue
            worker = self._idle.pop()
            self._wake_timer_at = math.inf
            first = batch.requests[0]
            self._statistics.formed(now - max(first.arrived, self._free_since), first.request.trace)
            if self._may_run_on_loop and self._is_short(batch, now):
                self._run_on_loop(worker, batch, now, is_direct=is_direct)
                break
            self._run_on_worker(worker, batch, now)
        if not self._queue:
            self._was_busy = False
        if self._is_closing:
            self._check_drained()

    def _reserve(self, batch: Batch) -> bool:
        """Count the expected outputs in the memory of their requests, and reject those that find no room.

        Return False when none is left.
        """
        kept: list[QueuedRequest] = []
        reserved: list[int] = []
        for queued in batch.requests:
            size = self._outputs.reservation(queued.request.key, queued.rows)
            try:
                queued.request.memory.hold_response(size)
                kept.append(queued)
                reserved.append(size)
            except ResourceExhausted as err:
                self._statistics.shed_by[Shed.MEMORY] += 1
                self._settle(queued, err)
        if len(kept) < len(batch.requests):
            batch.requests = kept
            batch.rows = sum(queued.rows for queued in kept)
            batch.size_bytes = sum(queued.size_bytes for queued in kept)
        batch.reserved = reserved
        return bool(kept)

    def _is_short(self, batch: Batch, now: float) -> bool:
        is_lone = self._idle_gaps > _IDLE_GAPS and len(batch.requests) == 1
        limit_s = (_LONE_HANDOFF_S if is_lone else _THREAD_HANDOFF_S) + len(batch.requests) * _REQUEST_S
        return self._loop_cost.is_below(limit_s, batch.rows, batch.size_bytes, now)

    def _run_on_loop(self, worker: Worker, batch: Batch, now: float, *, is_direct: bool) -> None:
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        outcomes = worker.execution.run(batch.requests)
        # As in ThreadWorker: waiting for a core is not a cost of the model.
        seconds = min(time.perf_counter_ns() - start, time.thread_time_ns() - cpu) / 1e9
        if seconds > _STALL_S:
            self._loop_cost.add_stall(seconds, now)
        self._free(worker)
        self._outputs_exist(batch, outcomes)
        if self._queue:
            self._was_busy = True
            # Not now: requests that arrived during the run should join the batch.
            self._dispatch_soon()
        concluded = self._conclude(worker, batch, outcomes, now, seconds)
        written = self._statistics.writing(batch.requests[0].request.trace)
        if is_direct and len(concluded) == 1:
            self._outcomes.add_direct(concluded[0], written)
        else:
            self._outcomes.extend(concluded, written)

    def _free(self, worker: Worker) -> None:
        if not self._idle:
            self._free_since = self._clock()
        self._idle.append(worker)

    def _run_on_worker(self, worker: Worker, batch: Batch, now: float) -> None:
        self._free_at[worker] = now + (self.cost.mean_of(batch.rows) or 0.0)
        self._running[worker] = batch
        if worker.execution.may_not_end:
            self._loop.call_later(_LOOK_S, self._give_up, worker, batch)
        worker.run(batch.requests, partial(self._on_batch_done, worker, batch, now))

    def _give_up(self, worker: Worker, batch: Batch) -> None:
        """Give up a run in progress for which no caller waits any more, else look again later."""
        if self._running.get(worker) is not batch:
            return
        if all(queued.is_abandoned for queued in batch.requests):
            worker.execution.give_up()
        else:
            self._loop.call_later(_LOOK_S, self._give_up, worker, batch)

    def _on_batch_done(
        self, worker: Worker, batch: Batch, started: float, outcomes: Sequence[Outcome], seconds: float
    ) -> None:
        del self._free_at[worker]
        if self._running.pop(worker, None) is None:
            # `end_all` has ended the requests.
            return
        if not self._is_ended:
            self._free(worker)
        self._outputs_exist(batch, outcomes)
        if InferenceResult in map(type, outcomes):
            now = self._clock()
            self._long_batches.add(len(batch.requests), batch.size_bytes, now - started, now)
        if self._queue:
            # The model runs the next batch while responses are written.
            self._was_busy = True
            self._dispatch(is_direct=False)
        concluded = self._conclude(worker, batch, outcomes, started, seconds)
        self._outcomes.extend(concluded, self._statistics.writing(batch.requests[0].request.trace))
        if self._is_closing:
            self._check_drained()

    def _check_drained(self) -> None:
        if not self._queue and len(self._idle) == len(self._workers):
            self._is_drained.set()

    def _wake_at(self, until: float, now: float) -> None:
        """Dispatch again at `until`, unless another event dispatches earlier."""
        if until == self._wake_timer_at:
            return
        self._wake_timer_at = until
        left = min(until - now, _MAX_TIMER_S)
        if self._wake_timer is not None:
            self._wake_timer.cancel()
            self._wake_timer = None
        if left > _FINE_TIMER_S:
            self._wake_timer = self._loop.call_later(left - _FINE_TIMER_S / 2, self._wake)
        else:
            self._idle[-1].wake_in(left, self._wake)

    def _wake(self) -> None:
        self._wake_timer_at = math.inf
        self._dispatch()

    def waiting(self) -> tuple[int, float]:
        """Return the number of queued requests, and the age of the oldest in seconds."""
        oldest = self._queue.oldest()
        return len(self._queue), 0.0 if oldest == math.inf else max(0.0, self._clock() - oldest)

    # Outcomes

    def _conclude(
        self, worker: Worker, batch: Batch, outcomes: Sequence[Outcome], started: float, seconds: float
    ) -> list[QueuedRequest]:
        """Record and count the outcomes of a batch. Return the requests that are to be delivered now, in order."""
        concluded: list[QueuedRequest] = []
        self._delivered_at = now = self._clock()
        fired = batch.fired
        arrived = 0.0
        count = 0
        times: ExecutionTimes | None = None
        is_whole = True
        durations, queue_durations = self._statistics.durations, self._statistics.queue_durations
        slo_s, within_slo = self._statistics.slo_s, 0
        for queued, outcome in zip(batch.requests, outcomes, strict=True):
            if type(outcome) is InferenceResult:
                if outcome.times is not times:
                    if times is not None:
                        is_whole = False
                        self._count_succeeded(times, count, arrived, started, now)
                    times, count, arrived = outcome.times, 0, 0.0
                # A request whose caller has left is counted as failed.
                if queued.receiver is not None:
                    count += 1
                    arrived += queued.arrived
                    total_s, queue_s = now - queued.arrived, started - queued.arrived
                    durations[bisect_left(SECONDS, total_s)] += 1
                    queue_durations[bisect_left(SECONDS, queue_s)] += 1
                    if total_s <= slo_s:
                        within_slo += 1
                    if (trace := queued.request.trace) is not None:
                        self._statistics.traced(trace, times, queue_s=queue_s, total_s=total_s)
                outcome.queue_ns = int((started - queued.arrived) * 1e9) + outcome.times.waited_ns
                outcome.fired = fired
            else:
                is_whole = False
                if isinstance(outcome, DeadlineExceeded) and not queued.is_over:
                    self._statistics.expired += 1
            if queued.receiver is not None:
                queued.outcome = outcome
                concluded.append(queued)
        if times is not None:
            self._count_succeeded(times, count, arrived, started, now)
        self._statistics.within_slo += within_slo
        if is_whole:
            self._update_costs(batch, now - started, seconds)
        tally = worker.execution.tally
        if tally.bisections or tally.expired_rows:
            self._statistics.tally(tally)
        if self._undelivered is not None:
            for tenant in dict.fromkeys(queued.tenant for queued in batch.requests):
                self._release(tenant)
            return []
        return concluded

    def _outputs_exist(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Release what was reserved for outputs, which count as what they are now, and learn from one of them."""
        if batch.reserved:
            _release_outputs(batch)
        if self._outputs.is_learning:
            for queued, outcome in zip(batch.requests, outcomes, strict=True):
                if isinstance(outcome, InferenceResult):
                    self._outputs.add(queued.request.key, queued.rows, outcome.outputs)
                    return

    def _release(self, tenant: str) -> None:
        """Pass on the outcomes of a tenant that are next in order of arrival."""
        assert self._undelivered is not None, "only called where order is preserved"
        self._outcomes.extend(self._undelivered.pop_ready(tenant, _IS_OVER), self._statistics.wrote)

    def _count_succeeded(self, times: ExecutionTimes, count: int, arrived: float, started: float, now: float) -> None:
        self._statistics.executed(times, time.time_ns() // 1_000_000)
        queue_ns, total_ns = int((count * started - arrived) * 1e9), int((count * now - arrived) * 1e9)
        queue_ns += count * times.waited_ns
        self._statistics.succeeded_together(times, count, queue_ns=queue_ns, total_ns=total_ns)

    def _update_costs(self, batch: Batch, elapsed_s: float, seconds: float) -> None:
        if self._may_run_on_loop:
            self._loop_cost.add(batch.rows, batch.size_bytes, seconds)
        if not self._may_run_on_loop or elapsed_s > _THREAD_HANDOFF_S or self._goal_s != math.inf:
            self.cost.add(batch.rows, elapsed_s)
            if self.cost.samples == _GOAL_CHECK_AFTER and self.cost.expected(1) > self._goal_s:
                log.warning(
                    "model %(model)s: slo_ms %(slo_ms).0f cannot be met: one request alone takes about "
                    "%(takes_ms).0f ms",
                    {
                        "event": "model.slo_cannot_be_met",
                        "model": self._name,
                        "slo_ms": self._goal_s * 1000,
                        "takes_ms": self.cost.expected(1) * 1000,
                    },
                )
        if batch.leaves_rows:
            self._backlog.add(batch.rows, elapsed_s)

    # Ends without an execution

    def _settle(self, queued: QueuedRequest, error: Exception) -> None:
        if not queued.conclude(error):
            return
        if isinstance(error, DeadlineExceeded):
            self._statistics.expired += 1
        if self._undelivered is None:
            self._outcomes.add(queued)
        else:
            self._release(queued.tenant)

    def _expire(self, now: float) -> None:
        for queued in self._queue.expire(now):
            self._settle(queued, self._expired_error())

    def _shed(self, now: float, rows: int) -> None:
        """Reject the requests that would miss their deadline even in the next batch: others can still be in time."""
        # In doubt a request is rejected: a run in vain takes capacity from the others.
        for queued in self._queue.shed(now + self._cautious_batch_s(rows)):
            self._reject(
                queued,
                Shed.TOO_LATE,
                f"model '{self._name}' is overloaded: this request could not be done before its deadline, and was not "
                "executed",
            )

    def _cautious_batch_s(self, rows: int) -> float:
        """Return an upper estimate of a batch's seconds, unless no request could meet it: then the expected seconds."""
        if self._waits or not self.cost.is_known:
            return self._backlog.worst_s
        worst_s = self.cost.worst(rows)
        return worst_s if worst_s < USABLE_SHARE * self._pressure.budget_s else self.cost.expected(rows)

    def _evict(self, queued_requests: Sequence[QueuedRequest]) -> None:
        for queued in queued_requests:
            self._reject(
                queued,
                Shed.EVICTED,
                f"Exceeds maximum queue size of model '{self._name}': this request was evicted, since its tenant or "
                "priority holds more than its share of the queue",
            )

    def _reject(self, queued: QueuedRequest, reason: Shed, why: str) -> None:
        self._statistics.shed_by[reason] += 1
        after_ms = self._retry_after_ms()
        self._settle(queued, ResourceExhausted(f"{why}; retry after {after_ms} ms", retry_after_ms=after_ms))

    def _set_timer(self, at: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # A loop's timer may fire a little early: then nothing has expired yet, and the timer is set again.
        self._timer = self._loop.call_later(min(max(at - now, 0.0005), _MAX_TIMER_S), self._on_timer)

    def _on_timer(self) -> None:
        now = self._clock()
        self._timer, self._timer_at = None, math.inf
        self._expire(now)
        at = self._queue.next_expiry()
        if at != math.inf:
            self._set_timer(at, now)

    def _unloading_error(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' is being unloaded")

    def _expired_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Request timeout expired in the queue of model '{self._name}': it was not executed")


def _release_outputs(batch: Batch) -> None:
    """Release what the requests of a batch have reserved for their outputs."""
    for queued, size in zip(batch.requests, batch.reserved, strict=True):
        queued.request.memory.release(size)
