"""Brings requests to execution: a queue, and one worker for each instance of the model.

    start ──> queue ──take──> batch ──> on the loop, when it is shorter than a hop          ──> answers
                                   └──> worker thread: one hop there, and one back ──┘

The decisions are the queue's and the policies'; this shell only waits, hands over and counts. What is done per request is
kept small: no task, no timer, no lock; one pass over the batch when it is taken, run, and answered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.batcher import BatchPolicy, Wait
from services.infer.scheduling.cost import Backlog, CostCurve
from services.infer.scheduling.execution import Executor
from services.infer.scheduling.overload import SPARE, Pressure, spare_of
from services.infer.scheduling.queue import Batch, Queue, QueuedRequest, QueueLimits, Receiver
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.statistics import Statistics
from services.infer.scheduling.submit import submit_and_wait
from services.infer.scheduling.worker import ThreadWorker, Worker
from shoal.errors import DeadlineExceeded, ResourceExhausted, Unavailable

__all__ = ["InferenceResult", "Receiver", "Scheduler"]

log = logging.getLogger(__name__)

_RETRY_MIN_MS, _RETRY_MAX_MS = 5, 5_000
# A refused caller comes back soon enough to use what was freed, and not so soon that it only asks again.

_THREAD_HANDOFF_S = 150e-6
# Handing a batch to a thread and back takes about so long, twice that when both want the interpreter's lock: what is
# done sooner is run on the loop.

_LONE_HANDOFF_S = 500e-6
# The same for a request that comes alone: both threads sleep by then, and are woken. 0.3 to 1.1 ms on a machine that idles
# otherwise, and what is held up meanwhile is requests of other models, which are few.

_REQUEST_S = 2e-6
# What an execution does for each request holds the interpreter's lock: on a thread, the loop would wait for it as well.

_IDLE_GAP_S, _IDLE_GAPS = 100e-6, 8
# A request that comes so long after the last answer, and the ones before it too, was not in the same round of the loop as
# others: callers that ask again at once do so sooner.

_GOAL_CHECK_AFTER = 50
# Executions until a goal that cannot be met is reported.

_FINE_TIMER_S = 0.005
# The event loop's timers count milliseconds: the end of a wait is waited for by an idle worker.

_MAX_TIMER_S = 3600.0
# No timer is set for longer: loops differ in how far they can count.


class Scheduler:
    """Runs the requests of one model version. Use as `async with`: leaving runs what still waits, then stops.

    Args:
        execution: makes what runs the batches of one worker; called once for each.
        instances: how many executions may run at the same time.
        cost: what is known of it from trials.
        clock: seconds; the one that deadlines and the executions' expiry are on.
        worker: makes what runs an instance's batches.
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
        clock: Callable[[], float] = time.monotonic,
        worker: Callable[[Executor, asyncio.AbstractEventLoop, str], Worker] = ThreadWorker,
    ) -> None:
        self._name = name
        self._policy = policy
        self._rules = rules or Rules()
        self.cost = cost if cost is not None else CostCurve()
        self._compute = CostCurve()  # Of the model alone: what a run on the loop would take.
        self._queue = Queue(name, limits, policy, self._rules, self.cost)
        self._execution = execution
        self._instances = instances
        self._statistics = statistics
        self._clock = clock
        self._make_worker = worker
        self._goal_s = policy.slo_s if policy.has_goal else math.inf
        if policy.slo_s != math.inf and policy.is_static:
            log.warning("model %s: slo_ms does nothing beside a queue delay or preferred sizes, which win", name)
        self._waits = policy.is_static or policy.has_goal
        self._has_rules = self._rules != Rules(weights=self._rules.weights) or self._goal_s != math.inf
        self._backlog = Backlog()
        self._pressure = Pressure()
        self._idle: list[Worker] = []
        self._workers: list[Worker] = []
        self._may_run_on_loop = False
        self._free_at: dict[Worker, float] = {}
        self._was_busy = False
        self._unanswered: deque[QueuedRequest] | None = deque() if self._rules.preserves_order else None
        self._is_closing = self._is_ended = False
        self._will_dispatch = False
        self._answered_at = -math.inf
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
            self._close_workers()
            for timer in (self._timer, self._wake_timer):
                if timer is not None:
                    timer.cancel()
            # Nobody drained when leaving was cut short: what still waits is told so.
            while not isinstance(batch := self._queue.take(math.inf, is_late=True), Wait):
                for queued in batch.requests:
                    self._settle(queued, self._unloading_error())

    def _close_workers(self) -> None:
        self._idle, self._is_ended = [], True
        for worker in self._workers:
            worker.close()

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Runs one request with whatever it can share an execution with.

        Args:
            deadline: on this scheduler's clock; the request is not started at or after it, nor after its own `timeout`.
            tenant: whose request it is: those who wait together have their shares of the model.

        Raises:
            ResourceExhausted: the queue is full, or too long for the request to be done in time.
            DeadlineExceeded: it could not be started in time, and was not.
            Internal: the model cannot process this request.
            Unavailable: the model is being unloaded.
        """
        return await submit_and_wait(self, request, deadline, tenant)

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> QueuedRequest:
        """As `submit`, without waiting: `receiver` will be told. Raises what is clear at once."""
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
            self._statistics.shed += 1
            raise
        if evicted:
            self._evict(evicted)
        if self._unanswered is not None:
            self._unanswered.append(queued)
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
        """Whether requests come one at a time, of late: then there is no company to wait a round of the loop for."""
        self._idle_gaps = self._idle_gaps + 1 if now - self._answered_at > _IDLE_GAP_S else 0
        return self._idle_gaps > _IDLE_GAPS

    def is_waiting(self, request: InferenceRequest) -> bool:
        """Whether `request` is in the queue: its execution has not begun."""
        return self._queue.holds(request)

    def abandon(self, queued: QueuedRequest) -> None:
        """Nobody waits for this answer any more: its receiver will not be called. Nothing happens when it was."""
        if queued.is_abandoned:
            return
        queued.is_abandoned = True
        self._statistics.cancelled += 1
        self._queue.discard(queued)
        if queued.on_abandoned is not None:
            queued.on_abandoned()
        if self._unanswered is not None:
            self._release()

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
        """Raises ResourceExhausted when `queued` cannot make it: what waits before it takes too long already."""
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
        spare = spare_of(ahead_s, batch_s / self._instances)
        if ahead_s + batch_s < spare * (bound - now):
            return
        start_s = free_s + self._queue.rows_ahead(queued, tenant) // most * most * row_s  # Whole batches go before it.
        end = now + (start_s + batch_s) / spare
        meets_goal = end < queued.due or not self._can_reach_goal()
        if meets_goal and now + start_s < queued.expires and end < queued.deadline:
            return
        self._statistics.shed += 1
        after_ms = self._retry_after_ms()
        raise ResourceExhausted(
            f"model '{self._name}' is overloaded: about {start_s * 1000:.0f} ms of work wait before this request, "
            f"which should be done in {(bound - now) * 1000:.0f} ms; retry after {after_ms} ms",
            retry_after_ms=after_ms,
        )

    def _max_rows(self, now: float) -> int:
        """Rows for the next batch: less than may be run together, where that gets more requests answered in time."""
        if self._waits:
            return self._policy.max_rows
        return self._pressure.max_rows(now, self.cost, self._policy.max_rows, self._instances)

    @property
    def _has_estimates(self) -> bool:
        return self._backlog.is_known or self.cost.is_known

    def _row_and_batch_s(self, rows: int) -> tuple[float, float]:
        """Seconds for each row, and for a batch, while more waits than fits into a batch of so many rows."""
        if self._waits or not self.cost.is_known:
            return self._backlog.row_s, self._backlog.batch_s
        batch_s = self.cost.expected(rows)
        return batch_s / rows, batch_s

    def _can_reach_goal(self) -> bool:
        return self._backlog.batch_s < self._goal_s

    def _retry_after_ms(self) -> int:
        """When what waits now will be done, roughly."""
        row_s = self._backlog.row_s or self.cost.expected(1)
        backlog_s = self._queue.rows * row_s / self._instances
        return int(min(max(backlog_s * 1000, _RETRY_MIN_MS), _RETRY_MAX_MS))

    # Batches

    def _dispatch_soon(self) -> None:
        if not self._will_dispatch:
            self._will_dispatch = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Gives what waits to the instances that are free."""
        self._will_dispatch = False
        now = self._clock()
        if self._queue.next_expiry() <= now:
            self._expire(now)
        while self._idle:
            most = self._max_rows(now)
            if (self._queue.rows > most or self._pressure.is_overloaded) and self._has_estimates:
                self._shed(now, min(most, self._queue.rows))
            batch = self._queue.take(
                now, max_rows=most, instances=self._instances, is_idle=not self._was_busy, is_late=self._is_closing
            )
            if isinstance(batch, Wait):
                if batch.until is not None:
                    self._wake_at(batch.until, now)
                break
            worker = self._idle.pop()
            self._wake_timer_at = math.inf
            if self._may_run_on_loop and self._is_short(batch):
                self._run_on_loop(worker, batch, now)
                break
            self._run_on_worker(worker, batch, now)
        if not self._queue:
            self._was_busy = False
        if self._is_closing:
            self._check_drained()

    def _is_short(self, batch: Batch) -> bool:
        is_lone = self._idle_gaps > _IDLE_GAPS and len(batch.requests) == 1
        limit_s = (_LONE_HANDOFF_S if is_lone else _THREAD_HANDOFF_S) + len(batch.requests) * _REQUEST_S
        seconds = self._compute.mean_of(batch.rows)
        if seconds is None:
            return self._compute.is_known and self._compute.expected(batch.rows) < limit_s
        return seconds < limit_s

    def _run_on_loop(self, worker: Worker, batch: Batch, now: float) -> None:
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        outcomes = worker.execution.run(batch.requests)
        # As a thread's worker counts it: its turn on a core is no cost of the model's.
        seconds = min(time.perf_counter_ns() - start, time.thread_time_ns() - cpu) / 1e9
        self._idle.append(worker)
        if self._queue:
            self._was_busy = True
            self._dispatch_soon()  # And not now: what has come meanwhile should join.
        self._deliver_outcomes(worker, batch, outcomes, now, seconds)

    def _run_on_worker(self, worker: Worker, batch: Batch, now: float) -> None:
        self._free_at[worker] = now + (self.cost.mean_of(batch.rows) or 0.0)
        worker.run(batch.requests, partial(self._on_batch_done, worker, batch, now))

    def _on_batch_done(
        self, worker: Worker, batch: Batch, started: float, outcomes: Sequence[Outcome], seconds: float
    ) -> None:
        del self._free_at[worker]
        if not self._is_ended:
            self._idle.append(worker)
        if self._queue:
            # The model goes on while answers are written.
            self._was_busy = True
            self._dispatch()
        self._deliver_outcomes(worker, batch, outcomes, started, seconds)
        if self._is_closing:
            self._check_drained()

    def _check_drained(self) -> None:
        if not self._queue and len(self._idle) == len(self._workers):
            self._is_drained.set()

    def _wake_at(self, until: float, now: float) -> None:
        """Looks again at `until`, if nothing comes before."""
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

    # Outcomes

    def _deliver_outcomes(
        self, worker: Worker, batch: Batch, outcomes: Sequence[Outcome], started: float, seconds: float
    ) -> None:
        self._answered_at = now = self._clock()
        fired = batch.fired
        arrived = 0.0
        answers = 0
        times: ExecutionTimes | None = None
        is_whole = True
        unanswered, deliver = self._unanswered, self._deliver
        for queued, outcome in zip(batch.requests, outcomes, strict=True):
            if type(outcome) is InferenceResult:
                if outcome.times is not times:
                    if times is not None:
                        is_whole = False
                        self._count_answered(times, answers, arrived, started, now)
                    times, answers, arrived = outcome.times, 0, 0.0
                answers += 1
                arrived += queued.arrived
                outcome.queue_ns = int((started - queued.arrived) * 1e9) + outcome.times.waited_ns
                outcome.fired = fired
            else:
                is_whole = False
            if unanswered is not None:
                queued.outcome = outcome
            elif not queued.is_abandoned:
                deliver(queued, outcome)
        if times is not None:
            self._count_answered(times, answers, arrived, started, now)
        if is_whole:
            self._update_costs(batch, now - started, seconds)
        tally = worker.execution.tally
        if tally.bisections or tally.expired_rows:
            self._statistics.tally(tally)
        if unanswered is not None:
            self._release()

    def _deliver(self, queued: QueuedRequest, outcome: Outcome) -> None:
        queued.is_abandoned = True  # From here on, it is over.
        try:
            if isinstance(outcome, InferenceResult):
                queued.receiver.answered(outcome)
            else:
                if isinstance(outcome, DeadlineExceeded):
                    self._statistics.expired += 1
                queued.receiver.failed(outcome)
        except Exception:  # One caller's trouble is no other's.
            log.exception("model %s: an answer could not be given", self._name)

    def _release(self) -> None:
        """Gives what is next in the order of arrival, and ready."""
        unanswered = self._unanswered
        assert unanswered is not None, "only asked where order is preserved"
        while unanswered and (unanswered[0].is_abandoned or unanswered[0].outcome is not None):
            queued = unanswered.popleft()
            if not queued.is_abandoned and queued.outcome is not None:
                self._deliver(queued, queued.outcome)

    def _count_answered(self, times: ExecutionTimes, answers: int, arrived: float, started: float, now: float) -> None:
        self._statistics.executed(times, time.time_ns() // 1_000_000)
        queue_ns, total_ns = int((answers * started - arrived) * 1e9), int((answers * now - arrived) * 1e9)
        queue_ns += answers * times.waited_ns
        self._statistics.answered(times, answers, queue_ns=queue_ns, total_ns=total_ns)

    def _update_costs(self, batch: Batch, elapsed_s: float, seconds: float) -> None:
        if self._may_run_on_loop:
            self._compute.add(batch.rows, seconds)
        if not self._may_run_on_loop or elapsed_s > _THREAD_HANDOFF_S or self._goal_s != math.inf:
            self.cost.add(batch.rows, elapsed_s)
            if self.cost.samples == _GOAL_CHECK_AFTER and self.cost.expected(1) > self._goal_s:
                log.warning(
                    "model %s: slo_ms %.0f cannot be met: one request alone takes about %.0f ms",
                    *(self._name, self._goal_s * 1000, self.cost.expected(1) * 1000),
                )
        if batch.leaves_rows:
            self._backlog.add(batch.rows, elapsed_s)

    # Ends without an execution

    def _settle(self, queued: QueuedRequest, error: Exception) -> None:
        if self._unanswered is None:
            if not queued.is_abandoned:
                self._deliver(queued, error)
        else:
            queued.outcome = error
            self._release()

    def _expire(self, now: float) -> None:
        for queued in self._queue.expire(now):
            self._settle(queued, self._expired_error())

    def _shed(self, now: float, rows: int) -> None:
        """Sends away those that would be answered too late even if they were run next: others can still make it."""
        # The doubt goes against them: what is run in vain is capacity that others could have.
        for queued in self._queue.shed(now + self._cautious_batch_s(rows)):
            self._reject(
                queued,
                f"model '{self._name}' is overloaded: this request could not be done before its deadline, and was not "
                "executed",
            )

    def _cautious_batch_s(self, rows: int) -> float:
        """Seconds of a batch of `rows`, and rather more; but not so many that nothing could be done in time at all."""
        if self._waits or not self.cost.is_known:
            return self._backlog.worst_s
        worst_s = self.cost.worst(rows)
        return worst_s if worst_s < SPARE * self._pressure.budget_s else self.cost.expected(rows)

    def _evict(self, queued_requests: Sequence[QueuedRequest]) -> None:
        for queued in queued_requests:
            self._reject(
                queued,
                f"Exceeds maximum queue size of model '{self._name}': this request gave up its place, since others "
                "of its tenant or priority hold more than their share",
            )

    def _reject(self, queued: QueuedRequest, why: str) -> None:
        self._statistics.shed += 1
        after_ms = self._retry_after_ms()
        self._settle(queued, ResourceExhausted(f"{why}; retry after {after_ms} ms", retry_after_ms=after_ms))

    def _set_timer(self, at: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # A loop's timer may be a little early; then nothing has expired yet, and a moment later it is asked again.
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
