"""Sees to it that jobs that wait for others go on, or end, soon after these have ended.

    a job ended here ──> who waits for it? ──┐
    a job that waits was accepted here ──────┼──> look up all that it waits for ──> due | ends | waits for fewer
    the sweep, a page a second ──────────────┘

The sweep is the promise: it finds every job that waits, whoever was killed when. The rest is speed. Every instance does
all of it; each write demands the job as it was read, so of two that come to the same conclusion one carries it out.
An end is written down with the lease that it is carried out under (`doom`), so whoever finds that lease lapsed does the
same.
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
from services.ingest.job import End, Job
from services.ingest.job_events import JobEvents
from services.ingest.job_store import Change, JobStore
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

SWEEP_S = 1.0
SWEEP_JOBS = 500
"""So many a second, in turn: what a kill left unnoticed is found within a second for each 500 that wait."""
_LOOK_JOBS = 100
# With 100 dependencies each that is 10,000 ids in one question.
_HEARD_MOST = 10_000
# Ends that were heard of and not looked at yet. More are left to the sweep.
_HEARD_AT_ONCE = 1_000
_AWAY_S = 1.0


class Cascade(Background):
    """Runs beside an `async with` block, once `ready` is set."""

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
        self._heard: deque[str] = deque(maxlen=_HEARD_MOST)
        self._accepted: deque[str] = deque(maxlen=_HEARD_MOST)
        self._wake = asyncio.Event()
        self._is_any = True
        self._swept_to = ""

    def changed(self, job_id: str) -> None:
        """A job has changed here: it may have ended. Costs nothing while no job waits for any."""
        if self._is_any:
            self._heard.append(job_id)
            self._wake.set()

    def accepted(self, jobs: Iterable[Job]) -> None:
        """Jobs were made durable, or requeued, here: those among them that wait are looked at once more.

        What they wait for may have ended after it was looked up and before they were there to be found.
        """
        if waiting := [job.id for job in jobs if job.waits_for]:
            self._is_any = True
            self._accepted.extend(waiting)
            self._wake.set()

    async def _run(self) -> None:
        await self._ready.wait()
        loop = asyncio.get_running_loop()
        sweep_at = 0.0
        while True:
            if loop.time() >= sweep_at:
                sweep_at = loop.time() + SWEEP_S
                await self._surely(self._sweep)
            await self._surely(self._look_at_news)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, sweep_at - loop.time()))
            self._wake.clear()

    async def _surely(self, step: Callable[[], Awaitable[None]]) -> None:
        """A step whose failure the next sweep makes up for."""
        try:
            await step()
        except ShoalError as err:
            log.warning("cannot look after jobs that wait for others for now: %s", err)
            await asyncio.sleep(_AWAY_S)
        except Exception:
            log.exception("looking after jobs that wait for others")  # A fault of ours must not end the duty.
            await asyncio.sleep(_AWAY_S)

    async def _sweep(self) -> None:
        page = await self._store.dependents_page(self._swept_to, SWEEP_JOBS)
        if not page and not self._swept_to:
            self._is_any = False
            return
        self._is_any = True
        self._swept_to = page[-1].id if len(page) == SWEEP_JOBS else ""
        await self._look(page)

    async def _look_at_news(self) -> None:
        while self._heard or self._accepted:
            if ended := _taken(self._heard):
                await self._look(await self._store.dependents(ended))
            if accepted := _taken(self._accepted):
                await self._look(await self._store.dependents_among(accepted))

    async def _look(self, jobs: Sequence[Job]) -> None:
        for first in range(0, len(jobs), _LOOK_JOBS):
            some = jobs[first : first + _LOOK_JOBS]
            known, now = await self._known(some), self._clock()
            decided = {job.id: decide(job, known[job.tenant], self._instance, now) for job in some}
            await self._go_on([(job, after) for job in some if isinstance(after := decided[job.id], Job)])
            await self._end(
                [(job, how, unmet(job, known[job.tenant])) for job in some if isinstance(how := decided[job.id], End)]
            )

    async def _known(self, jobs: Sequence[Job]) -> dict[str, DependencyStates]:
        """How all that `jobs` wait for stand, by tenant and reference. Others' jobs are nobody's dependencies."""
        wanted: dict[str, set[str]] = {}
        for job in jobs:
            wanted.setdefault(job.tenant, set()).update(job.waits_for)
        known: dict[str, DependencyStates] = {}
        for tenant, references in wanted.items():
            known[tenant] = await dependency_states(self._store, tenant, references)
        return known

    async def _go_on(self, changes: Sequence[Change]) -> None:
        changed = [(before, after) for before, after in changes if before != after]
        if not changed:
            return
        await self._store.release_dependents(changed)
        if released := [after for _, after in changed if after.due_at is not None]:
            self._events.due_again(released)

    async def _end(self, dooms: Sequence[tuple[Job, End, tuple[str, ...]]]) -> None:
        dooms = dooms[: self._dispatcher.room]  # The others wait for the next sweep.
        if not dooms:
            return
        for job in await self._store.take_to_end(dooms, self._claims.lease()):
            if job.decided_end is not None:
                self._dispatcher.end(job, job.decided_end)


def _taken(heard: deque[str]) -> list[str]:
    return [heard.popleft() for _ in range(min(len(heard), _HEARD_AT_ONCE))]
