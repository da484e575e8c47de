"""Runs jobs: claims what is due, as much as there is room for, and sees each job through to its end.

    ┌─ fresh (accepted here, still in memory) ─┐                        ┌─ answer, End ──> recorder.end ──────┐
    │                                          ├─ claim ─> line ─> call ┤                                     ├─> let go
    └─ due (by poll, or when a wait is over) ──┘       of its model     └─ Again ────────> recorder.put_back ─┘
                                                      <──────────── "held": the lease is renewed ────────────>

All of it goes in bulk: a claim, a call and a record are of many jobs each, and a task is a call's or a record's, not a
job's. Jobs of one model stand in one line here, and as many are in calls at once as it answers soon (`bulks.Pace`). A
model with a line is claimed no more of, and no claim is of more than half of what may still be held: so a slow model,
or several, leave room for the others.

While the queue is drained, jobs submitted here are claimed in the write that makes them durable. What there is no room
for just then is fresh, and goes straight from intake to a claim. Nobody reads the queue but for a poll now and then.
When there is more than it has room for, it forgets the fresh ones and works by the queue's order. A queue counts as
drained when what waits there is of models with a line only; as soon as one of these is free, it is read, and until then
nothing of theirs is claimed in its write: it would pass those that wait.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any

from mesh.process.tasks import end
from services.ingest.dispatch.attempt import Attempts, Decision
from services.ingest.dispatch.bulk_calls import FIRST, ConcurrencyLimit, next_bulk
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.model_gate import ModelGate
from services.ingest.dispatch.recorder import Ending, Recorder, result_of
from services.ingest.dispatch.remote import GivenUp
from services.ingest.instance import Instance
from services.ingest.intake.backlog import Backlog
from services.ingest.job import BackToQueue, End, Job, Lease, after_stop, claim
from services.ingest.job_store import Inserted, Unknown
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

HELD_PER_CALL = 4
"""Jobs held at most, for each that a model may have in calls: answers that wait to be recorded keep no model idle, and
no more than this many are in memory when the store is away."""
HELD_BYTES = 128 << 20
"""Requests in memory, of all jobs that are held, beyond which nothing is claimed."""
_FRESH_PER_CALL = 1
_LARGE_BYTES = 16 << 10
_CLAIM_PART = 8
# From a queue that is long, an eighth of what may be held is claimed at least: small claims cost as much as large ones.
_SOON_S = 1.0
# A model that takes longer to answer, and longer than it needs, gets less at once.
_LINES = 1_000
# Models remembered with their pace while they have nothing here.
_AWAY_WAIT_S = 1.0
_LAST_WRITES_S = 1.0
# After a drain that ran out of time: to put back what did not finish.


@dataclass(slots=True, eq=False)
class Holding:
    """A job that this instance works on: in line, in a call, or being recorded."""

    job: Job
    call: ActiveAttempt | None = None
    """What its attempt is part of, while that is under way."""


@dataclass(slots=True, eq=False)
class ModelQueue:
    """The jobs of one model: those in line, and how many are in calls."""

    pace: ConcurrencyLimit
    waiting: deque[Job] = field(default_factory=deque)
    calls: int = 0


@dataclass(slots=True, eq=False)
class ActiveAttempt:
    """A call to infer that is under way, for one job or many."""

    line: ModelQueue
    began_s: float
    left: set[str]
    """The jobs that are neither answered nor given up."""
    given_up: GivenUp = field(default_factory=GivenUp)
    task: asyncio.Task[None] | None = None


class Dispatcher:
    """Owns every job that this instance holds a lease on. Used as `async with`; leaving drains."""

    def __init__(
        self,
        claims: Claims,
        attempts: Attempts,
        recorder: Recorder,
        *,
        instance: Instance,
        gate: ModelGate,
        backlog: Backlog,
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
        self._drain_s = drain_ms / 1000
        self._held: dict[str, Holding] = {}
        self._lines: dict[str, ModelQueue] = {}
        self._bytes = 0
        self._usual_bytes = 1.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._fresh: deque[Job] = deque()
        # Jobs that are being inserted as claimed.
        self._in_writes = 0
        self._is_drained = True
        self._behind: set[str] = set()
        # While it is drained: models that it could not be drained of, because they were closed.
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
        self._release(self._is_in_line)
        await self._finish(self._stop_at - asyncio.get_running_loop().time())
        self._release(lambda holding: holding.call is not None)
        await self._finish(_LAST_WRITES_S)
        await end(*self._tasks)

    def stop_claiming(self) -> None:
        """Begins the drain: nothing new is claimed, and what runs has `drain_ms` from now on."""
        if self._stop_at is None:
            self._stop_at = asyncio.get_running_loop().time() + self._drain_s
            self._wake.set()

    def claim_in_write(self, jobs: Sequence[Job]) -> list[Job]:
        """Return jobs that are about to be inserted: claimed where nobody waits before them and there is room.

        The outcome of the insert goes to `settle_write`.
        """
        room = self._claim_room() if self._is_drained and not self._fresh and self._stop_at is None else 0
        if room <= 0:
            return [*jobs]
        now = self._clock()
        lease, closed = self._claims.lease(), self._behind.union(self._closed(now))
        made: list[Job] = []
        for job in jobs:
            if room > 0 and job.due_at is not None and job.due_at <= now and job.model_name not in closed:
                room -= 1
                self._in_writes += 1
                job = claim(job, lease, now)
            made.append(job)
        return made

    def settle_write(self, jobs: Sequence[Job], outcome: Inserted | Unknown) -> None:
        """Take up the inserted ones of `jobs`, which are as `claim_in_write` returned them."""
        claimed = [job for job in jobs if job.lease is not None]
        self._in_writes -= len(claimed)
        if isinstance(outcome, Inserted):
            self._accept(outcome.written)
            return
        # Those that are there go back to the queue. A submit that is repeated with its key then finds a job that will
        # run, with all its attempts.
        again = BackToQueue(self._clock(), False, "it was not sure that it was durable: this attempt was not made")
        self._settle([(self._hold(job.replaced(request=None)), again) for job in claimed])

    def _accept(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        now = self._clock()
        self._backlog.added(sum(job.due_at is not None for job in jobs))
        self._claims.notice(jobs)
        light = [job.replaced(request=None) if job.is_apart else job for job in jobs]
        self._take([job for job in light if job.lease is not None])
        waiting = [job for job in light if job.due_at is not None]
        for job in waiting:
            if job.due_at is not None and job.due_at > now:
                self._read_at(job.due_at)
        if not self._is_drained or self._stop_at is not None:
            return
        self._fresh.extend(job for job in waiting if job.due_at is not None and job.due_at <= now)
        if len(self._fresh) > self._max_calls * _FRESH_PER_CALL:
            self._fall_behind()
        if waiting:
            self._wake.set()

    def due_again(self, jobs: Sequence[Job]) -> None:
        """Note jobs that are in the queue again, and read the queue at once."""
        self._backlog.added(len(jobs))
        self._claims.notice(jobs)
        self.wake()

    def wake(self) -> None:
        """Something may be due now: the queue is read at once, not only at the next poll."""
        self._read_at(self._clock())

    def held(self) -> dict[str, Lease]:
        """The lease of each job that this instance works on."""
        return {job_id: holding.job.lease for job_id, holding in self._held.items() if holding.job.lease is not None}

    @property
    def room(self) -> int:
        """How many more jobs may be held; none while it stops."""
        return 0 if self._stop_at is not None else max(0, self._max_held - len(self._held) - self._in_writes)

    def end(self, job: Job, how: End) -> None:
        """Sees to it that a job that was taken over ends. An attempt of it that runs here is given up."""
        self._settle([(self._hold(job), how)])

    def end_as(self, job: Job, standing: End) -> None:
        """The same for a job whose result stands already."""
        holding = self._hold(job)
        is_held = self._is_held([holding])
        work = self._recorder.end_as([(job, standing)], is_held, self._letting_go(is_held))
        self._spawn(work, "end of a job", [holding])

    def put_back(self, job: Job, again: BackToQueue) -> None:
        """Sees to it that a job that was taken over goes back to the queue."""
        self._settle([(self._hold(job), again)])

    def lost(self, job_id: str, lease: Lease) -> None:
        """`lease` does not hold the job any more: a call under it is given up.

        What is past its call goes on. Mostly its own last write has just ended the lease; and if not, an answer is
        still worth recording, and the fence keeps its holder from doing more.
        """
        holding = self._held.get(job_id)
        if holding is not None and self._is_before_its_end(holding) and holding.job.lease == lease:
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
            self._take(claimed)
            if not claimed:
                await self._sleep(self._idle_s())

    async def _claim(self) -> list[Job]:
        closed = self._closed(self._clock())
        if self._behind.difference(closed):
            self._fall_behind()
        room = self._claim_room()
        if room <= 0:
            return []
        now = asyncio.get_running_loop().time()
        if self._is_drained and now < self._next_read:
            fresh = [self._fresh.popleft() for _ in range(min(room, len(self._fresh)))]
            self._behind.update(job.model_name for job in fresh if job.model_name in closed)
            fresh = [job for job in fresh if job.model_name not in closed]
            jobs = await self._claims.claim_accepted(fresh) if fresh else []
        else:
            self._next_read = now + self._poll_s
            self._fresh.clear()  # They are in the queue, which is read now.
            jobs, is_more = await self._claims.claim_due(room, closed)
            if is_more:
                self._fall_behind()
            else:
                self._is_drained, self._behind = True, self._claims.due_models()
        self._backlog.taken(len(jobs))
        return jobs

    def _closed(self, now: datetime) -> list[str]:
        """Models that are not claimed now: nobody is there to run them, or some of theirs stand in line here."""
        return [*self._gate.closed(now), *(model for model, line in self._lines.items() if line.waiting)]

    def _claim_room(self) -> int:
        """How many jobs the next claim is of; 0 while it is better to wait for more room."""
        usual = max((line.pace.limit for line in self._lines.values() if line.calls), default=FIRST)
        most = min(self._max_calls, usual)
        room = min(most, (self.room + 1) // 2, int((HELD_BYTES - self._bytes) / self._usual_bytes))
        if room <= 0:
            return 0 if self._held else min(1, self.room)
        is_worth_it = self._is_drained or not self._held or room >= min(self._max_held // _CLAIM_PART, most)
        return room if is_worth_it else 0

    def _take(self, claimed: Sequence[Job]) -> None:
        """Lets claimed jobs stand in line, and calls as many as their models' paces allow."""
        for job in claimed:
            self._hold(job)
            self._line(job.model_name).waiting.append(job)
            self._usual_bytes += (len(job.request or b"") - self._usual_bytes) / 64
        for model in dict.fromkeys(job.model_name for job in claimed):
            self._call(self._lines[model])

    def _line(self, model: str) -> ModelQueue:
        line = self._lines.get(model)
        if line is None:
            if len(self._lines) >= _LINES:
                self._lines = {name: line for name, line in self._lines.items() if line.calls or line.waiting}
            line = self._lines[model] = ModelQueue(ConcurrencyLimit(self._max_calls, _SOON_S))
        return line

    def _call(self, line: ModelQueue) -> None:
        while line.waiting and line.calls < line.pace.limit and self._stop_at is None:
            jobs = next_bulk(line.waiting, line.pace.limit - line.calls)
            line.calls += len(jobs)
            call = ActiveAttempt(line, asyncio.get_running_loop().time(), {job.id for job in jobs})
            for job in jobs:
                self._held[job.id].call = call
            call.task = self._spawn(self._see_through(call, jobs), f"call of {len(jobs)} jobs of {jobs[0].model_name}")
            # A callback, not a `finally`: a task that is cancelled before its first step runs no code of its own.
            call.task.add_done_callback(partial(self._over, call))

    async def _see_through(self, call: ActiveAttempt, jobs: Sequence[Job]) -> None:
        async with aclosing(self._attempts.run(jobs, call.given_up)) as decided:
            async for some in decided:
                self._decided(call, some)

    def _decided(self, call: ActiveAttempt, some: Sequence[tuple[Job, Decision]]) -> None:
        known: list[tuple[Holding, Decision]] = []
        for job, decision in some:
            if job.id not in call.left:
                continue  # Given up.
            call.left.remove(job.id)
            holding = self._held[job.id]
            holding.call = None
            if job.request is not None and len(job.request) > _LARGE_BYTES:
                self._bytes -= len(job.request)
                holding.job = job.replaced(request=None)  # Not kept in memory while it is recorded.
            known.append((holding, decision))
        now = asyncio.get_running_loop().time()
        call.line.calls -= len(known)
        call.line.pace.answered(len(known), now - call.began_s, now)
        self._settle(known)
        self._call(call.line)
        self._wake.set()

    def _over(self, call: ActiveAttempt, _: asyncio.Task[None]) -> None:
        """The call's task has ended. What it says nothing of, for a fault of ours, lapses, and is tried again so."""
        call.line.calls -= len(call.left)
        for job_id in call.left:
            if (holding := self._held.get(job_id)) is not None and holding.call is call:
                del self._held[job_id]
                self._bytes -= len(holding.job.request or b"")
        call.left.clear()
        self._call(call.line)
        self._wake.set()

    def _settle(self, decided: Sequence[tuple[Holding, Decision]]) -> None:
        """Has decisions recorded, in a task for all of them."""
        ending = [(holding, how) for holding, how in decided if not isinstance(how, BackToQueue)]
        if ending:
            holdings = [holding for holding, _ in ending]
            endings = [
                Ending(holding.job, result_of(holding.job, how) if isinstance(how, End) else how)
                for holding, how in ending
            ]
            is_held = self._is_held(holdings)
            work = self._recorder.end(endings, is_held, self._letting_go(is_held))
            self._spawn(work, f"end of {len(endings)} jobs", holdings)
        back = [(holding, again) for holding, again in decided if isinstance(again, BackToQueue)]
        if back:
            holdings = [holding for holding, _ in back]
            work = self._put_all_back([(holding.job, again) for holding, again in back], self._is_held(holdings))
            self._spawn(work, f"return of {len(back)} jobs", holdings)

    async def _put_all_back(self, back: Sequence[tuple[Job, BackToQueue]], is_held: Callable[[Job], bool]) -> None:
        due = {job.id: again.due_at for job, again in back}

        let_go = self._letting_go(is_held)

        def on_back(jobs: Sequence[Job]) -> None:
            let_go(jobs)
            self._backlog.added(len(jobs))
            for job in jobs:
                self._read_at(due[job.id])

        await self._recorder.put_back(back, is_held, on_back)

    def _is_held(self, holdings: Sequence[Holding]) -> Callable[[Job], bool]:
        """Whether a job is still held as it is now: not let go, and not taken up anew by a later event."""
        those = {holding.job.id: holding for holding in holdings}
        return lambda job: self._held.get(job.id) is those[job.id]

    def _letting_go(self, is_held: Callable[[Job], bool]) -> Callable[[Sequence[Job]], None]:
        """Lets go of jobs whose writes are known to be done, unless they were taken up anew before that was known."""
        return lambda jobs: self._let_all_go([job for job in jobs if is_held(job)])

    def _hold(self, job: Job) -> Holding:
        if (before := self._held.get(job.id)) is not None:
            self._let_go(before)
        holding = self._held[job.id] = Holding(job)
        self._bytes += len(job.request or b"")
        return holding

    def _is_before_its_end(self, holding: Holding) -> bool:
        return holding.call is not None or self._is_in_line(holding)

    def _is_in_line(self, holding: Holding) -> bool:
        line = self._lines.get(holding.job.model_name)
        return line is not None and any(job is holding.job for job in line.waiting)

    def _let_all_go(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if (holding := self._held.pop(job.id, None)) is not None:
                self._bytes -= len(holding.job.request or b"")
        self._wake.set()

    def _let_go(self, holding: Holding) -> None:
        """Nothing more is done about it: it leaves its line or its call, and its records find nobody."""
        job, call = holding.job, holding.call
        del self._held[job.id]
        self._bytes -= len(job.request or b"")
        if call is not None:
            call.given_up.add(job.id)
            call.left.remove(job.id)
            call.line.calls -= 1
            if not call.left and call.task is not None:
                call.task.cancel()
        elif self._is_in_line(holding):
            line = self._lines[job.model_name]
            line.waiting = deque(other for other in line.waiting if other is not job)
        self._wake.set()

    def _release(self, which: Callable[[Holding], bool]) -> None:
        """Lets others take what is in line or in a call: nothing is counted."""
        leaving = [holding for holding in self._held.values() if which(holding)]
        for holding in leaving:
            self._let_go(holding)
        again = after_stop(self._clock(), self._instance)
        self._settle([(self._hold(holding.job), again) for holding in leaving])

    def _spawn(
        self, work: Coroutine[Any, Any, None], name: str, holdings: Sequence[Holding] = ()
    ) -> asyncio.Task[None]:
        """Runs `work`; `holdings` end with it, if they have not before."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, holdings))
        return task

    def _done(self, holdings: Sequence[Holding], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (err := task.exception()) is not None:
            # The leases of its jobs lapse, and whoever finds them so tries again.
            log.error("unexpected error in the %s", task.get_name(), exc_info=err)
        self._let_all_go([holding.job for holding in holdings if self._held.get(holding.job.id) is holding])

    def _fall_behind(self) -> None:
        self._is_drained = False
        self._behind.clear()
        self._fresh.clear()

    def _idle_s(self) -> float:
        """How long there is nothing to do unless somebody wakes the loop."""
        if not self._claim_room():
            return self._poll_s
        if self._fresh or not self._is_drained:
            return 0.0 if self._is_drained else self._poll_s / 10
        return max(0.0, self._next_read - asyncio.get_running_loop().time())

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

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
