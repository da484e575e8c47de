"""Dispatcher: claims due jobs up to its capacity, runs each, and has its end recorded.

    ┌─ just accepted (in memory) ──────┐                                ┌─ result, End ──> recorder.end ──────┐
    │                                  ├─ claim ─> model queue ─> call ─┤                                     ├> release
    └─ due (by poll, or after a wait) ─┘                                └─ BackToQueue ──> recorder.put_back ─┘
                                         <───────────────── held: the lease is renewed ─────────────────>

Every step is in bulk: a claim, a call and a record have many jobs each, and tasks belong to calls and records, not to
jobs. Claimed jobs of one model wait in its model queue; a concurrency limit that adapts to the model's latency bounds
its jobs in calls (`bulk_calls.ConcurrencyLimit`). No jobs are claimed of a model whose model queue is not empty, and a
claim takes at most half of the remaining capacity. So slow models leave capacity to the others.

While the job queue is drained, submitted jobs are claimed in the write that makes them durable. Jobs beyond the
capacity are "just accepted": they go from intake to a claim without a read of the queue, which is only polled now and
then. With more of them than the capacity, the dispatcher drops these and reads by queue order. The queue also counts as
drained while all its jobs are of models whose model queues are not empty. Until such a model is free and the queue is
read, no job of the model is claimed in its write, where it would overtake the queued ones.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any

from mesh.process.tasks import end
from services.ingest.dispatch.attempt import Attempts, Decision
from services.ingest.dispatch.bulk_calls import INITIAL_LIMIT, ConcurrencyLimit, next_bulk
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.model_gate import ClosedQueue, ModelGate, is_closed
from services.ingest.dispatch.recorder import EndingJob, Recorder, result_of
from services.ingest.dispatch.remote import GivenUpJobs
from services.ingest.instance import Instance
from services.ingest.intake.backlog import JobBacklog
from services.ingest.job import BackToQueue, End, Job, Lease, after_stop, after_stop_in_call, claim
from services.ingest.job_store import Inserted, UnknownOutcome
from services.ingest.polls import polls
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

HELD_PER_CALL = 4
"""Maximum jobs held, as a multiple of one model's jobs in calls. Results that wait to be recorded then keep no model
idle, and memory is bounded while the store is unavailable."""
HELD_BYTES = 128 << 20
"""Bytes of requests of all held jobs beyond which no job is claimed."""
_ACCEPTED_PER_CALL = 1
_LARGE_BYTES = 16 << 10
# A claim from a long queue has at least an eighth of the maximum jobs held: small claims cost as much as large ones.
_CLAIM_FRACTION = 8
# A model that takes longer than this, and longer than its best time explains, gets a lower concurrency limit.
_FAST_S = 1.0
# Idle models beyond this number lose their adapted concurrency limits.
_MAX_QUEUES = 1_000
# Jobs that become due within this time are claimed together.
_DUE_TOGETHER = timedelta(milliseconds=20)
_UNAVAILABLE_WAIT_S = 1.0
# Time to put unfinished jobs back after a drain that timed out.
_LAST_WRITES_S = 1.0


@dataclass(slots=True, eq=False)
class HeldJob:
    """A job that this instance holds: in its model queue, in a call, or being recorded."""

    job: Job
    call: ActiveAttempt | None = None
    """The call that the job is in, if any."""


@dataclass(slots=True, eq=False)
class ModelQueue:
    """Jobs of one model: the waiting ones, and the number in calls."""

    concurrency: ConcurrencyLimit
    waiting: deque[Job] = field(default_factory=deque)
    calls: int = 0


@dataclass(slots=True, eq=False)
class ActiveAttempt:
    """A call to infer in progress, with one job or many."""

    queue: ModelQueue
    began_s: float
    left: set[str]
    """Ids of the jobs that are neither decided nor given up."""
    given_up: GivenUpJobs = field(default_factory=GivenUpJobs)
    task: asyncio.Task[None] | None = None


class Dispatcher:
    """Owner of every job that this instance holds a lease on. Used as `async with`; the exit drains."""

    def __init__(
        self,
        claims: Claims,
        attempts: Attempts,
        recorder: Recorder,
        *,
        instance: Instance,
        gate: ModelGate,
        backlog: JobBacklog,
        max_in_flight: int,
        poll_ms: int,
        drain_ms: int,
    ) -> None:
        self._claims = claims
        self._attempts = attempts
        self._recorder = recorder
        self._gate = gate
        self._backlog = backlog
        self._clock = instance.clock
        self._instance = instance.name
        self._ready = instance.ready
        self._max_calls = max_in_flight
        self._max_held = max_in_flight * HELD_PER_CALL
        self._poll_s = poll_ms / 1000
        self._polls = polls(poll_ms)
        self._drain_s = drain_ms / 1000
        self.lost = 0
        """Jobs whose lease was lost to another instance, or has lapsed."""
        self.put_back_count = 0
        """Attempts after which a job went back to the queue."""
        self._held: dict[str, HeldJob] = {}
        self._queues: dict[str, ModelQueue] = {}
        self._bytes = 0
        self._mean_bytes = 1.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._just_accepted: deque[Job] = deque()
        # Number of jobs that are being inserted as claimed.
        self._in_writes = 0
        self._is_drained = True
        # While `_is_drained`: what is closed, with queued jobs that were left.
        self._undrained: set[ClosedQueue] = set()
        self._wake = asyncio.Event()
        self._next_read = 0.0
        self._stop_at: float | None = None
        self._loop_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Dispatcher:
        self._loop_task = asyncio.create_task(self._run(), name="dispatcher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop_claiming()
        assert self._loop_task is not None
        assert self._stop_at is not None
        await asyncio.wait([self._loop_task], timeout=_UNAVAILABLE_WAIT_S)
        await end(self._loop_task)
        self._release_all(self._is_queued, lambda _: after_stop(self._clock(), self._instance))
        await self._finish(self._stop_at - asyncio.get_running_loop().time())
        self._release_all(
            lambda held_job: held_job.call is not None,
            lambda job: after_stop_in_call(job, self._clock(), self._instance),
        )
        await self._finish(_LAST_WRITES_S)
        await end(*self._tasks)

    def stop_claiming(self) -> None:
        """Begin the drain: claim no more jobs, and give running ones `drain_ms` from now."""
        if self._stop_at is None:
            self._stop_at = asyncio.get_running_loop().time() + self._drain_s
            self._wake.set()

    def claim_in_write(self, jobs: Sequence[Job]) -> list[Job]:
        """Return jobs that are about to be inserted: claimed where no queued job precedes them and capacity allows.

        The queued jobs of other tenants do not precede those of a tenant that has none, when it is next among them.

        The outcome of the insert goes to `settle_write`.
        """
        is_drained = self._is_drained and not self._just_accepted
        capacity = self._claim_capacity() if is_drained else self._free_capacity()
        if capacity <= 0:
            return [*jobs]
        now = self._clock()
        lease, closed = self._claims.lease(), self._undrained | self._closed(now)
        made: list[Job] = []
        for job in jobs:
            # An insert of unknown outcome may be made after its lease has lapsed. A lapse ends a job of one attempt, so
            # the job is claimed after its insert.
            may_lapse = job.policy.max_attempts > 1
            is_due = job.due_at is not None and job.due_at <= now
            may_claim = capacity > 0 and may_lapse and is_due and not is_closed(job.tenant, job.model_name, closed)
            if may_claim and (is_drained or self._claims.take_turn(job.tenant)):
                capacity -= 1
                self._in_writes += 1
                job = claim(job, lease, now)
            made.append(job)
        return made

    def settle_write(self, jobs: Sequence[Job], outcome: Inserted | UnknownOutcome) -> None:
        """Accept the inserted jobs among `jobs`, which `claim_in_write` returned."""
        claimed = [job for job in jobs if job.lease is not None]
        self._in_writes -= len(claimed)
        if isinstance(outcome, Inserted):
            self._accept(outcome.written)
            return
        # Jobs that were inserted after all return to the queue. A submit that is repeated with its idempotency key then
        # finds a job that will run, with all its attempts.
        back = BackToQueue(self._clock(), False, "its insert was not confirmed: this attempt was not made")
        self._record([(self._hold(job.replaced(request=None)), back) for job in claimed])

    def _accept(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        now = self._clock()
        self._backlog.added(sum(job.due_at is not None or bool(job.waits_for) for job in jobs))
        self._claims.note_queued(jobs)
        light = [job.replaced(request=None) if job.is_apart else job for job in jobs]
        self._enqueue([job for job in light if job.lease is not None])
        waiting = [job for job in light if job.due_at is not None]
        for job in waiting:
            if job.due_at is not None and job.due_at > now:
                self._read_at(job.due_at)
        if not self._is_drained or self._stop_at is not None:
            return
        self._just_accepted.extend(job for job in waiting if job.due_at is not None and job.due_at <= now)
        if len(self._just_accepted) > self._max_calls * _ACCEPTED_PER_CALL:
            self._read_by_queue_order()
        if waiting:
            self._wake.set()

    def due_again(self, jobs: Sequence[Job]) -> None:
        """Note jobs that are in the queue again, and read the queue immediately."""
        self._backlog.added(len(jobs))
        self._claims.note_queued(jobs)
        self.wake()

    def unblocked(self, jobs: int) -> None:
        """Take jobs out of the backlog that waited for others. The ones that are due are added by `due_again`."""
        self._backlog.removed(jobs)

    def wake(self) -> None:
        """Read the queue immediately, rather than at the next poll."""
        self._read_at(self._clock())

    def held(self) -> dict[str, Lease]:
        """Return the lease of each held job, by job id."""
        return {job_id: held_job.job.lease for job_id, held_job in self._held.items() if held_job.job.lease is not None}

    @property
    def held_count(self) -> int:
        """Number of held jobs."""
        return len(self._held)

    @property
    def capacity(self) -> int:
        """Number of further jobs that may be held; 0 during the drain."""
        return 0 if self._stop_at is not None else max(0, self._max_held - len(self._held) - self._in_writes)

    def end(self, job: Job, how: End) -> None:
        """End a job that was taken over. A running attempt of the job is given up."""
        self._record([(self._hold(job), how)])

    def end_recorded(self, job: Job, recorded: End) -> None:
        """End a job that was taken over and whose result the store has recorded already."""
        held_job = self._hold(job)
        is_held = self._is_held([held_job])
        work = self._recorder.end_recorded([(job, recorded)], is_held, self._releaser(is_held))
        self._spawn(work, "end of a job", [held_job])

    def put_back(self, job: Job, decision: BackToQueue) -> None:
        """Return a job that was taken over to the queue."""
        self._record([(self._hold(job), decision)])

    def lease_lost(self, job_id: str, lease: Lease) -> None:
        """Give up the attempt of a job that `lease` no longer holds.

        A job past its call is still recorded. Mostly its own last write has just ended the lease; otherwise the result
        is still worth recording, and the fence prevents other writes.
        """
        held_job = self._held.get(job_id)
        if held_job is not None and self._is_before_result(held_job) and held_job.job.lease == lease:
            log.info("lost the lease of job %(job)s: giving up its attempt", {"event": "job.lease_lost", "job": job_id})
            self.lost += 1
            self._release(held_job)

    def taken_over(self, job_id: str, by_lease: str) -> None:
        """Release a job that the lease with id `by_lease` holds now, unless that is this instance's."""
        held_job = self._held.get(job_id)
        if held_job is not None and held_job.job.lease is not None and held_job.job.lease.id != by_lease:
            log.info("job %(job)s was taken over: releasing it", {"event": "job.taken_over", "job": job_id})
            self.lost += 1
            self._release(held_job)

    async def _run(self) -> None:
        await self._ready.wait()
        while self._stop_at is None:
            self._wake.clear()
            try:
                claimed = await self._claim()
            except ShoalError as err:
                log.warning("cannot claim jobs for now: %(error)s", {"event": "dispatch.claim_retrying", "error": err})
                await self._sleep(_UNAVAILABLE_WAIT_S * random.uniform(0.5, 1))
                continue
            # An internal error must not end the dispatching.
            except Exception:
                log.exception("unexpected error while claiming jobs", {"event": "dispatch.claim_failed"})
                await self._sleep(_UNAVAILABLE_WAIT_S)
                continue
            self._enqueue(claimed)
            if not claimed:
                await self._sleep(self._idle_s())

    async def _claim(self) -> list[Job]:
        closed = self._closed(self._clock())
        if self._undrained - closed:
            self._read_by_queue_order()
        capacity = self._claim_capacity()
        if capacity <= 0:
            return []
        now = asyncio.get_running_loop().time()
        if self._is_drained and now < self._next_read:
            accepted = [self._just_accepted.popleft() for _ in range(min(capacity, len(self._just_accepted)))]
            left = [job for job in accepted if is_closed(job.tenant, job.model_name, closed)]
            self._undrained.update(
                job.model_name if job.model_name in closed else (job.tenant, job.model_name) for job in left
            )
            accepted = [job for job in accepted if not is_closed(job.tenant, job.model_name, closed)]
            jobs = await self._claims.claim_accepted(accepted) if accepted else []
        else:
            self._next_read = now + self._polls.next_s()
            # The queue, which is read now, has these jobs too.
            self._just_accepted.clear()
            jobs, is_more = await self._claims.claim_due(capacity, closed)
            if jobs:
                self._polls.reset()
                # The interval above follows the polls that found nothing.
                self._next_read = min(self._next_read, now + self._polls.next_s())
            if is_more:
                self._read_by_queue_order()
            else:
                self._is_drained, self._undrained = True, self._claims.due_queues(closed)
            if (due_at := self._claims.next_due()) is not None:
                self._read_at(max(due_at, self._clock() + _DUE_TOGETHER))
        self._backlog.removed(len(jobs))
        return jobs

    def _closed(self, now: datetime) -> set[ClosedQueue]:
        """Return the queues of which no jobs are claimed now: not reachable, limited, or waiting in a model queue."""
        return {*self._gate.closed(now), *(model for model, queue in self._queues.items() if queue.waiting)}

    def _claim_capacity(self) -> int:
        """Return the size of the next claim; 0 while it is better to wait for more capacity."""
        capacity = self._free_capacity()
        is_worth_it = (
            self._is_drained or not self._held or capacity >= min(self._max_held // _CLAIM_FRACTION, self._most())
        )
        return capacity if is_worth_it else 0

    def _free_capacity(self) -> int:
        """Return the number of jobs that may be claimed at a time now."""
        capacity = min(self._most(), (self.capacity + 1) // 2, int((HELD_BYTES - self._bytes) / self._mean_bytes))
        return capacity if capacity > 0 or self._held else min(1, self.capacity)

    def _most(self) -> int:
        usual = max((queue.concurrency.limit for queue in self._queues.values() if queue.calls), default=INITIAL_LIMIT)
        return min(self._max_calls, usual)

    def _enqueue(self, claimed: Sequence[Job]) -> None:
        """Put claimed jobs into their model queues, and call as many as the concurrency limits allow."""
        for job in claimed:
            self._hold(job)
            self._queue_of(job.model_name).waiting.append(job)
            self._mean_bytes += (len(job.request or b"") - self._mean_bytes) / 64
        for model in dict.fromkeys(job.model_name for job in claimed):
            self._call(self._queues[model])

    def _queue_of(self, model: str) -> ModelQueue:
        queue = self._queues.get(model)
        if queue is None:
            if len(self._queues) >= _MAX_QUEUES:
                self._queues = {name: queue for name, queue in self._queues.items() if queue.calls or queue.waiting}
            queue = self._queues[model] = ModelQueue(ConcurrencyLimit(self._max_calls, _FAST_S))
        return queue

    def _call(self, queue: ModelQueue) -> None:
        while queue.waiting and queue.calls < queue.concurrency.limit and self._stop_at is None:
            jobs = next_bulk(queue.waiting, queue.concurrency.limit - queue.calls)
            queue.calls += len(jobs)
            call = ActiveAttempt(queue, asyncio.get_running_loop().time(), {job.id for job in jobs})
            for job in jobs:
                self._held[job.id].call = call
            call.task = self._spawn(self._run_attempt(call, jobs), f"call of {len(jobs)} jobs of {jobs[0].model_name}")
            # A callback rather than `finally`: a task that is cancelled before its first step runs none of its code.
            call.task.add_done_callback(partial(self._attempt_ended, call))

    async def _run_attempt(self, call: ActiveAttempt, jobs: Sequence[Job]) -> None:
        async with aclosing(self._attempts.run(jobs, call.given_up)) as decided:
            async for some in decided:
                self._take_decisions(call, some)

    def _take_decisions(self, call: ActiveAttempt, some: Sequence[tuple[Job, Decision]]) -> None:
        known: list[tuple[HeldJob, Decision]] = []
        for job, decision in some:
            # Otherwise the job was given up.
            if job.id not in call.left:
                continue
            call.left.remove(job.id)
            held_job = self._held[job.id]
            held_job.call = None
            if job.request is not None and len(job.request) > _LARGE_BYTES:
                self._bytes -= len(job.request)
                # Free the memory while the job is recorded.
                held_job.job = job.replaced(request=None)
            known.append((held_job, decision))
        now = asyncio.get_running_loop().time()
        call.queue.calls -= len(known)
        call.queue.concurrency.record_results(len(known), now - call.began_s, now)
        self._record(known)
        self._call(call.queue)
        self._wake.set()

    def _attempt_ended(self, call: ActiveAttempt, _: asyncio.Task[None]) -> None:
        """Clean up after a call's task. Jobs without a decision (an internal error) lapse, and are retried then."""
        call.queue.calls -= len(call.left)
        for job_id in call.left:
            if (held_job := self._held.get(job_id)) is not None and held_job.call is call:
                del self._held[job_id]
                self._bytes -= len(held_job.job.request or b"")
        call.left.clear()
        self._call(call.queue)
        self._wake.set()

    def _record(self, decided: Sequence[tuple[HeldJob, Decision]]) -> None:
        """Record decisions: one task for all ends, one for all returns to the queue."""
        ending = [(held_job, how) for held_job, how in decided if not isinstance(how, BackToQueue)]
        if ending:
            held_jobs = [held_job for held_job, _ in ending]
            endings = [
                EndingJob(held_job.job, result_of(held_job.job, how) if isinstance(how, End) else how)
                for held_job, how in ending
            ]
            is_held = self._is_held(held_jobs)
            work = self._recorder.end(endings, is_held, self._releaser(is_held))
            self._spawn(work, f"end of {len(endings)} jobs", held_jobs)
        back = [(held_job, again) for held_job, again in decided if isinstance(again, BackToQueue)]
        self.put_back_count += len(back)
        if back:
            held_jobs = [held_job for held_job, _ in back]
            work = self._put_back([(held_job.job, again) for held_job, again in back], self._is_held(held_jobs))
            self._spawn(work, f"return of {len(back)} jobs", held_jobs)

    async def _put_back(self, back: Sequence[tuple[Job, BackToQueue]], is_held: Callable[[Job], bool]) -> None:
        due = {job.id: again.due_at for job, again in back}

        release = self._releaser(is_held)

        def on_back(jobs: Sequence[Job]) -> None:
            release(jobs)
            self._backlog.added(len(jobs))
            for job in jobs:
                self._read_at(due[job.id])

        await self._recorder.put_back(back, is_held, on_back)

    def _is_held(self, held_jobs: Sequence[HeldJob]) -> Callable[[Job], bool]:
        """Return a predicate: True while a job is still held by the same entry, neither released nor held anew."""
        entries = {held_job.job.id: held_job for held_job in held_jobs}
        return lambda job: self._held.get(job.id) is entries[job.id]

    def _releaser(self, is_held: Callable[[Job], bool]) -> Callable[[Sequence[Job]], None]:
        """Return a function that releases jobs after their writes, except jobs that are held anew since."""
        return lambda jobs: self._remove_all([job for job in jobs if is_held(job)])

    def _hold(self, job: Job) -> HeldJob:
        if (before := self._held.get(job.id)) is not None:
            self._release(before)
        held_job = self._held[job.id] = HeldJob(job)
        self._bytes += len(job.request or b"")
        return held_job

    def _is_before_result(self, held_job: HeldJob) -> bool:
        return held_job.call is not None or self._is_queued(held_job)

    def _is_queued(self, held_job: HeldJob) -> bool:
        queue = self._queues.get(held_job.job.model_name)
        return queue is not None and any(job is held_job.job for job in queue.waiting)

    def _remove_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if (held_job := self._held.pop(job.id, None)) is not None:
                self._bytes -= len(held_job.job.request or b"")
        self._wake.set()

    def _release(self, held_job: HeldJob) -> None:
        """Release a job: remove it from its model queue or its call, and ignore writes about it in progress."""
        job, call = held_job.job, held_job.call
        del self._held[job.id]
        self._bytes -= len(job.request or b"")
        if call is not None:
            call.given_up.add(job.id)
            call.left.remove(job.id)
            call.queue.calls -= 1
            if not call.left and call.task is not None:
                call.task.cancel()
        elif self._is_queued(held_job):
            queue = self._queues[job.model_name]
            queue.waiting = deque(other for other in queue.waiting if other is not job)
        self._wake.set()

    def _release_all(self, which: Callable[[HeldJob], bool], decide: Callable[[Job], BackToQueue | End]) -> None:
        """Release the selected held jobs, and record a decision about each."""
        leaving = [held_job for held_job in self._held.values() if which(held_job)]
        for held_job in leaving:
            self._release(held_job)
        self._record([(self._hold(held_job.job), decide(held_job.job)) for held_job in leaving])

    def _spawn(
        self, work: Coroutine[Any, Any, None], name: str, held_jobs: Sequence[HeldJob] = ()
    ) -> asyncio.Task[None]:
        """Run `work` in a task; `held_jobs` that are still held at its end are released."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, held_jobs))
        return task

    def _done(self, held_jobs: Sequence[HeldJob], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (err := task.exception()) is not None:
            # The leases of its jobs lapse, and the next holder retries.
            log.error(
                "unexpected error in the %(task)s", {"event": "dispatch.failed", "task": task.get_name()}, exc_info=err
            )
        self._remove_all([held_job.job for held_job in held_jobs if self._held.get(held_job.job.id) is held_job])

    def _read_by_queue_order(self) -> None:
        self._is_drained = False
        self._undrained.clear()
        self._just_accepted.clear()

    def _idle_s(self) -> float:
        """Return the time until the next claim, unless an event wakes the loop."""
        if not self._claim_capacity():
            return self._poll_s
        if self._just_accepted or not self._is_drained:
            return 0.0 if self._is_drained else self._poll_s / 10
        wait_s = max(0.0, self._next_read - asyncio.get_running_loop().time())
        # A closed queue opens after a time, without a wake.
        return min(wait_s, self._poll_s) if self._undrained else wait_s

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    def _read_at(self, due_at: datetime) -> None:
        """Read the queue at `due_at` at the latest, rather than at the next poll."""
        wait_s = max(0.0, (due_at - self._clock()).total_seconds())
        at = asyncio.get_running_loop().time() + wait_s
        if at < self._next_read:
            self._next_read = at
            self._wake.set()

    async def _finish(self, seconds: float) -> None:
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=max(0.0, seconds))
