"""Runs jobs: claims what is due, as much as there is room for, and sees each job through to its end.

    ┌─ fresh (accepted here, still in memory) ─┐                    ┌─ answer, End ──> recorder.end ──────┐
    │                                          ├─ claim ─> attempt ─┤                                     ├─> let go
    └─ due (by poll, or when a wait is over) ──┘   "calling"        └─ Again ────────> recorder.put_back ─┘
                                                  <──────────────────── "held": the lease is renewed ────>

While the queue is drained, jobs submitted here go straight from intake to a claim, and nobody reads the queue but for a
poll now and then. When there is more than it has room for, it forgets the fresh ones and works by the queue's order.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from types import TracebackType

from mesh.tasks import end
from services.ingest.clock import Clock
from services.ingest.dispatch.attempt import Attempts
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.gate import Gate
from services.ingest.dispatch.recorder import Recorder
from services.ingest.intake.backlog import Backlog
from services.ingest.job import Again, End, Job, Lease, Outcome, released
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

HELD_PER_CALL = 4
"""Jobs held at most, for each call that may be in flight: answers that wait to be recorded keep no model idle, and no
more than this many are in memory when the store is away."""
_FRESH_PER_CALL = 2
_LARGE_BYTES = 16 << 10
_AWAY_WAIT_S = 1.0
_LAST_WRITES_S = 1.0
# After a drain that ran out of time: to put back what did not finish.


@dataclass(slots=True, eq=False)
class Holding:
    """A job that this instance works on."""

    job: Job
    task: asyncio.Task[None] | None = None
    is_calling: bool = False
    is_released: bool = False


class Dispatcher:
    """Owns every job that this instance holds a lease on. Used as `async with`; leaving drains."""

    def __init__(
        self,
        claims: Claims,
        attempts: Attempts,
        recorder: Recorder,
        *,
        gate: Gate,
        backlog: Backlog,
        clock: Clock,
        instance: str,
        ready: asyncio.Event,
        max_in_flight: int,
        poll_ms: int,
        drain_ms: int,
    ) -> None:
        self._claims = claims
        self._attempts = attempts
        self._recorder = recorder
        self._gate = gate
        self._backlog = backlog
        self._clock = clock
        self._instance = instance
        self._ready = ready
        self._max_calls = max_in_flight
        self._max_held = max_in_flight * HELD_PER_CALL
        self._poll_s = poll_ms / 1000
        self._drain_s = drain_ms / 1000
        self._held: dict[str, Holding] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = 0
        self._fresh: deque[Job] = deque()
        self._is_drained = True
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
        await asyncio.wait([self._loop_task], timeout=_AWAY_WAIT_S)
        await end(self._loop_task)
        await self._finish(self._stop_at - asyncio.get_running_loop().time())
        for holding in self._held.values():
            if holding.is_calling and holding.task is not None:
                holding.is_released = True
                holding.task.cancel()
        await self._finish(_LAST_WRITES_S)
        await end(*self._tasks)

    def stop_claiming(self) -> None:
        """Begins the drain: nothing new is claimed, and what runs has `drain_ms` from now on."""
        if self._stop_at is None:
            self._stop_at = asyncio.get_running_loop().time() + self._drain_s
            self._wake.set()

    def accept(self, jobs: Sequence[Job]) -> None:
        """Hears of jobs that were just made durable here."""
        now = self._clock()
        for job in jobs:
            if job.due_at is not None and job.due_at > now:
                self._read_at(job.due_at)
        if not self._is_drained or self._stop_at is not None:
            return
        due = [job for job in jobs if job.due_at is not None and job.due_at <= now]
        self._fresh.extend(replace(job, request=None) if job.is_apart else job for job in due)
        if len(self._fresh) > self._max_calls * _FRESH_PER_CALL:
            self._fall_behind()
        self._wake.set()

    def wake(self) -> None:
        """Something may be due now: the queue is read at once, not only at the next poll."""
        self._read_at(self._clock())

    def held(self) -> dict[str, Lease]:
        """The lease of each job that this instance works on."""
        return {job_id: holding.job.lease for job_id, holding in self._held.items() if holding.job.lease is not None}

    @property
    def room(self) -> int:
        """How many more jobs may be held; none while it stops."""
        return 0 if self._stop_at is not None else max(0, self._max_held - len(self._held))

    def end(self, job: Job, how: End) -> None:
        """Sees to it that a job that was taken over ends. An attempt of it that runs here is given up."""
        self._hold(job, lambda holding: self._recorder.end(holding.job, how))

    def end_as(self, job: Job, standing: End) -> None:
        """The same for a job whose result stands already."""
        self._hold(job, lambda holding: self._recorder.end_as(holding.job, standing))

    def put_back(self, job: Job, again: Again) -> None:
        """Sees to it that a job that was taken over goes back to the queue."""
        self._hold(job, lambda holding: self._put_back(holding.job, again))

    def lost(self, job_id: str, lease: Lease) -> None:
        """`lease` does not hold the job any more: a call under it is given up.

        What is past its call goes on. Mostly its own last write has just ended the lease; and if not, an answer is
        still worth recording, and the fence keeps its holder from doing more.
        """
        holding = self._held.get(job_id)
        if holding is not None and holding.is_calling and holding.job.lease == lease:
            log.info("lost the lease of job %s: giving it up", job_id)
            self._let_go(holding)

    def taken(self, job_id: str, by_lease: str) -> None:
        """The lease of that id has the job now: what is done about it here under another is given up."""
        holding = self._held.get(job_id)
        if holding is not None and holding.job.lease is not None and holding.job.lease.id != by_lease:
            log.info("job %s was taken over: giving it up", job_id)
            self._let_go(holding)

    async def _run(self) -> None:
        await self._ready.wait()
        while self._stop_at is None:
            self._wake.clear()
            try:
                claimed = await self._claim()
            except ShoalError as err:
                log.warning("cannot claim jobs for now: %s", err)
                await self._sleep(_AWAY_WAIT_S * random.uniform(0.5, 1))
                continue
            except Exception:
                log.exception("claiming jobs")  # A fault of ours must not end the dispatching.
                await self._sleep(_AWAY_WAIT_S)
                continue
            for job in claimed:
                self._calls += 1
                self._hold(job, self._work, is_calling=True)
            if not claimed:
                await self._sleep(self._idle_s())

    async def _claim(self) -> list[Job]:
        room = min(self._max_calls - self._calls, self.room)
        if room <= 0:
            return []
        closed = self._gate.closed(self._clock())
        now = asyncio.get_running_loop().time()
        if self._is_drained and now < self._next_read:
            fresh = [self._fresh.popleft() for _ in range(min(room, len(self._fresh)))]
            fresh = [job for job in fresh if job.model_name not in closed]
            jobs = await self._claims.claim_fresh(fresh) if fresh else []
        else:
            self._next_read = now + self._poll_s
            self._fresh.clear()  # They are in the queue, which is read now.
            jobs, is_more = await self._claims.claim_due(room, closed)
            if is_more:
                self._fall_behind()
            else:
                self._is_drained = True
        self._backlog.taken(len(jobs))
        return jobs

    def _fall_behind(self) -> None:
        self._is_drained = False
        self._fresh.clear()

    def _idle_s(self) -> float:
        """How long there is nothing to do unless somebody wakes the loop."""
        if self._calls >= self._max_calls or not self.room:
            return self._poll_s
        if self._fresh or not self._is_drained:
            return 0.0 if self._is_drained else self._poll_s / 10
        return max(0.0, self._next_read - asyncio.get_running_loop().time())

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    def _hold(self, job: Job, work: Callable[[Holding], Awaitable[object]], *, is_calling: bool = False) -> None:
        if (before := self._held.get(job.id)) is not None:
            self._let_go(before)
        holding = Holding(job, is_calling=is_calling)
        self._held[job.id] = holding
        holding.task = asyncio.create_task(self._see_through(holding, work), name=f"job {job.id}")
        self._tasks.add(holding.task)
        # A callback, not a `finally`: a task that is cancelled before its first step runs no code of its own.
        holding.task.add_done_callback(lambda task: self._done(holding, task))

    def _done(self, holding: Holding, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._end_call(holding)
        if self._held.get(holding.job.id) is holding:
            del self._held[holding.job.id]
            self._wake.set()

    def _let_go(self, holding: Holding) -> None:
        if self._held.get(holding.job.id) is holding:
            del self._held[holding.job.id]
        if holding.task is not None:
            holding.task.cancel()

    async def _see_through(self, holding: Holding, work: Callable[[Holding], Awaitable[object]]) -> None:
        try:
            await work(holding)
        except asyncio.CancelledError:
            if not holding.is_released:
                return
            await self._put_back(holding.job, released(self._clock(), self._instance))
        except Exception:
            # Its lease lapses, and whoever finds it so tries again.
            log.exception("unexpected error with job %s", holding.job.id)

    async def _work(self, holding: Holding) -> None:
        decision = await self._attempts.run(holding.job)
        if holding.job.request is not None and len(holding.job.request) > _LARGE_BYTES:
            holding.job = replace(holding.job, request=None)  # Not kept in memory while it is recorded.
        self._end_call(holding)
        if isinstance(decision, Again):
            await self._put_back(holding.job, decision)
        elif isinstance(decision, End):
            await self._recorder.end(holding.job, decision)
        else:
            await self._recorder.end(holding.job, _ANSWERED, decision)

    def _end_call(self, holding: Holding) -> None:
        if holding.is_calling:
            holding.is_calling = False
            self._calls -= 1
            self._wake.set()

    async def _put_back(self, job: Job, again: Again) -> None:
        await self._recorder.put_back(job, again)
        self._backlog.added(1)
        self._read_at(again.due_at)

    def _read_at(self, due_at: datetime) -> None:
        """A job is due then: the queue is read at that moment, not only at the next poll."""
        wait_s = max(0.0, (due_at - self._clock()).total_seconds())
        at = asyncio.get_running_loop().time() + wait_s
        if at < self._next_read:
            self._next_read = at
            self._wake.set()

    async def _finish(self, seconds: float) -> None:
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=max(0.0, seconds))


_ANSWERED = End(Outcome.SUCCEEDED)
