"""Dependency cascade: unblocks or ends waiting jobs soon after the jobs that they wait for have ended.

    a job ended here ──> its dependents ──┐
    a waiting job was accepted here ──────┼──> states of all its dependencies ──> due | ends | waits for fewer
    the sweep, one page a second ─────────┘

Dependents are read in pages. An ended job with many of them takes turns with the others, a page at a time.

The sweep guarantees that every waiting job is found, after any crash. The notices only make it fast. Every instance
does all of this: each write applies only to a job unchanged since its read, so one of several instances carries a
decision out. An end is stored with its lease (`decided_end`), so the next holder after a lapse carries out the same
end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

from mesh.process.tasks import Background
from services.ingest.dependencies.dependency_states import dependency_states
from services.ingest.dependencies.waiting import DependencyStates, decide, unmet
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.instance import Instance
from services.ingest.job import FINAL, End, Job
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Change, JobStore
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

SWEEP_S = 1.0
SWEEP_JOBS = 500
"""Waiting jobs that the sweep visits per second: after a crash, 500 waiting jobs take one second."""
PAGE_JOBS = 500
"""Dependents of one read, about 5 kB of memory each."""
# With 100 dependencies each, one query has 10,000 ids.
_DECIDED_AT_ONCE = 100
# Bound of the unprocessed notices. Further ones are left to the sweep.
_MAX_NOTICES = 10_000
_NOTICES_PER_STEP = 1_000
_UNAVAILABLE_WAIT_S = 1.0
# Pause after a page with more jobs to end than the dispatcher can hold. Reading a page takes about a tenth of it.
_FULL_WAIT_S = 0.25


class Cascade(Background):
    """Background task that decides about waiting jobs, once `ready` is set. Used as `async with`."""

    def __init__(
        self, store: JobStore, claims: Claims, dispatcher: Dispatcher, events: JobEvents, instance: Instance
    ) -> None:
        self._store = store
        self._claims = claims
        self._dispatcher = dispatcher
        self._events = events
        self._clock = instance.clock
        self._instance = instance.name
        self._ready = instance.ready
        self._ended: deque[str] = deque(maxlen=_MAX_NOTICES)
        self._accepted: deque[str] = deque(maxlen=_MAX_NOTICES)
        # Jobs with many dependents, and the last decided dependent of each. They take turns, the first is next.
        self._unread: dict[str, str] = {}
        self._read_at = 0.0
        self._wake = asyncio.Event()
        self._has_waiting = True
        self._swept_to = ""

    def changed(self, job_id: str) -> None:
        """Note a job that changed and may have ended. Free while no job waits for others."""
        if self._has_waiting:
            self._ended.append(job_id)
            self._wake.set()

    def accepted(self, jobs: Iterable[Job]) -> None:
        """Note new or requeued jobs: the waiting ones are decided once more.

        A dependency may have ended after its state was read and before the waiting job was stored.
        """
        if waiting := [job.id for job in jobs if job.waits_for]:
            self._has_waiting = True
            self._accepted.extend(waiting)
            self._wake.set()

    async def _run(self) -> None:
        await self._ready.wait()
        loop = asyncio.get_running_loop()
        sweep_at = 0.0
        while True:
            if loop.time() >= sweep_at:
                sweep_at = loop.time() + SWEEP_S
                await self._run_step(self._sweep)
            await self._run_step(self._process_notices)
            if self._ended or self._accepted:
                continue
            next_at = min(sweep_at, self._read_at) if self._unread else sweep_at
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, next_at - loop.time()))
            self._wake.clear()

    async def _run_step(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step, and log its failure, which the next sweep repairs."""
        try:
            await step()
        except ShoalError as err:
            log.warning(
                "cannot decide about jobs that wait for dependencies: %(error)s",
                {"event": "dependencies.retrying", "error": err},
            )
            await asyncio.sleep(_UNAVAILABLE_WAIT_S)
        except Exception:
            log.exception("unexpected error with jobs that wait for dependencies", {"event": "dependencies.failed"})
            await asyncio.sleep(_UNAVAILABLE_WAIT_S)

    async def _sweep(self) -> None:
        page = await self._store.dependents_page(self._swept_to, SWEEP_JOBS)
        if not page and not self._swept_to:
            self._has_waiting = False
            return
        self._has_waiting = True
        self._swept_to = page[-1].id if len(page) == SWEEP_JOBS else ""
        await self._decide(page)

    async def _process_notices(self) -> None:
        """Process up to a thousand notices of each kind, and one page of a job with many dependents."""
        if ended := _drained(self._ended):
            found = await self._store.dependents(ended, PAGE_JOBS)
            if len(found) < PAGE_JOBS:
                left = await self._decide(found)
                self._read_later({reference for job in left for reference in job.waits_for}.intersection(ended))
            else:
                self._read_later(ended)
        if accepted := _drained(self._accepted):
            left = await self._decide(await self._store.dependents_among(accepted))
            self._read_later({reference for job in left for reference in job.waits_for})
        if self._unread and asyncio.get_running_loop().time() >= self._read_at:
            job_id = next(iter(self._unread))
            await self._decide_page(job_id, self._unread.pop(job_id))

    def _read_later(self, ended: Iterable[str]) -> None:
        """Read the dependents of these jobs in pages, from the first. Beyond the bound, the sweep finds them."""
        for job_id in ended:
            if len(self._unread) < _MAX_NOTICES:
                self._unread[job_id] = ""

    async def _decide_page(self, job_id: str, after: str) -> None:
        """Decide about the dependents of a job on the page after `after`. Its next page is read in its next turn."""
        page = await self._store.dependents_of(job_id, after, PAGE_JOBS)
        # A job that has not ended is noted again at its end.
        if not page or (not after and not await self._has_ended(page[0].tenant, job_id)):
            return
        if left := await self._decide(page):
            decided = [job.id for job in page if job.id < left[0].id]
            self._unread[job_id] = decided[-1] if decided else after
            self._read_at = asyncio.get_running_loop().time() + _FULL_WAIT_S
        elif len(page) == PAGE_JOBS:
            self._unread[job_id] = page[-1].id

    async def _has_ended(self, tenant: str, job_id: str) -> bool:
        states = await dependency_states(self._store, tenant, [job_id])
        return job_id not in states or states[job_id].state in FINAL

    async def _decide(self, jobs: Sequence[Job]) -> list[Job]:
        """Decide about waiting jobs. Return the jobs that should end, but that the dispatcher cannot hold."""
        left: list[Job] = []
        for first in range(0, len(jobs), _DECIDED_AT_ONCE):
            some = jobs[first : first + _DECIDED_AT_ONCE]
            known, now = await self._dependency_states(some), self._clock()
            decided = {job.id: decide(job, known[job.tenant], self._instance, now) for job in some}
            await self._unblock([(job, after) for job in some if isinstance(after := decided[job.id], Job)])
            ends = [
                (job, how, unmet(job, known[job.tenant])) for job in some if isinstance(how := decided[job.id], End)
            ]
            held = self._dispatcher.capacity
            await self._end(ends[:held])
            left += [job for job, _, _ in ends[held:]]
        return left

    async def _dependency_states(self, jobs: Sequence[Job]) -> dict[str, DependencyStates]:
        """Return the states of all dependencies of `jobs`, by tenant and reference."""
        by_tenant: dict[str, set[str]] = {}
        for job in jobs:
            by_tenant.setdefault(job.tenant, set()).update(job.waits_for)
        known: dict[str, DependencyStates] = {}
        for tenant, references in by_tenant.items():
            known[tenant] = await dependency_states(self._store, tenant, references)
        return known

    async def _unblock(self, changes: Sequence[Change]) -> None:
        changed = [(before, after) for before, after in changes if before != after]
        if not changed:
            return
        await self._store.release_dependents(changed)
        if released := [after for _, after in changed if after.due_at is not None]:
            self._dispatcher.unblocked(len(released))
            self._events.due_again(released)

    async def _end(self, ends: Sequence[tuple[Job, End, tuple[str, ...]]]) -> None:
        if not ends:
            return
        taken = await self._store.take_to_end(ends, self._claims.lease())
        self._dispatcher.unblocked(len(taken))
        for job in taken:
            if job.decided_end is not None:
                self._dispatcher.end(job, job.decided_end)


def _drained(heard: deque[str]) -> list[str]:
    return [heard.popleft() for _ in range(min(len(heard), _NOTICES_PER_STEP))]
