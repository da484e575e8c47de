"""Lease keeper: renews leases, takes over lapsed jobs, enforces deadlines, and sweeps unneeded payloads.

Every instance does this for all jobs. Of two instances that find the same lapsed job, the take-over succeeds for one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType

from mesh.process.tasks import end, for_ever
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.recorder import ResultStore
from services.ingest.instance import Instance
from services.ingest.intake.backlog import JobBacklog
from services.ingest.intake.payloads import Payloads
from services.ingest.job import End, Job, Lease, after_lapse, imposed_end
from services.ingest.job_store import JobStore
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

RECOVERY_S = 1.0
"""Maximum interval of the search for lapsed leases and passed deadlines: one index query each."""
RECOVERY_JOBS = 200
SWEEP_S = 600.0
# Delay of the first sweep, which needs the store: a starting node does not have it immediately.
_FIRST_SWEEP_S = 30.0
_UNAVAILABLE_WAIT_S = 1.0


class LeaseKeeper:
    """Background duties of an instance, which begin once `ready` is set. Used as `async with`."""

    def __init__(
        self,
        store: JobStore,
        claims: Claims,
        dispatcher: Dispatcher,
        results: ResultStore,
        payloads: Payloads,
        backlog: JobBacklog,
        instance: Instance,
        *,
        renew_ms: int,
    ) -> None:
        self._store = store
        self._payloads = payloads
        self._claims = claims
        self._dispatcher = dispatcher
        self._results = results
        self._backlog = backlog
        self._clock = instance.clock
        self._ready = instance.ready
        self._renew_s = renew_ms / 1000
        self._stack = AsyncExitStack()
        self.taken_over = 0
        """Jobs that were taken over."""

    async def __aenter__(self) -> LeaseKeeper:
        for name, duty, first_s in (
            ("renew leases", self._renew, 0.0),
            ("recover lapsed jobs", self._recover_and_expire, 0.0),
            ("count the backlog", self._recount, 0.0),
            ("sweep payloads", self._sweep, _FIRST_SWEEP_S),
        ):
            task = asyncio.create_task(self._run_duty(name, duty, first_s), name=name)
            self._stack.push_async_callback(end, task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)

    async def _run_duty(self, name: str, duty: Callable[[], Awaitable[float]], first_s: float) -> None:
        """Run `duty` repeatedly, `first_s` after `ready`."""
        await self._ready.wait()
        await asyncio.sleep(first_s)
        await for_ever(name, duty, away_s=min(_UNAVAILABLE_WAIT_S, self._renew_s), log=log)

    async def _renew(self) -> float:
        held = self._dispatcher.held()
        if held:
            for job_id in await self._claims.renew(held):
                self._dispatcher.lease_lost(job_id, held[job_id])
        return self._renew_s

    async def _recover_and_expire(self) -> float:
        await self._recover()
        limit = min(RECOVERY_JOBS, self._dispatcher.capacity)
        expired = await self._claims.take_expired(limit) if limit else []
        for job in expired:
            if (how := imposed_end(job, self._clock())) is not None:
                self._dispatcher.end(job, how)
        return 0.0 if len(expired) == RECOVERY_JOBS else RECOVERY_S * random.uniform(0.5, 1)

    async def _recover(self) -> None:
        limit = min(RECOVERY_JOBS, self._dispatcher.capacity)
        lapsed = await self._claims.take_lapsed(limit, self._dispatcher.held().keys()) if limit else []
        if not lapsed:
            return
        self.taken_over += len(lapsed)
        log.warning("took over %(jobs)d jobs whose leases lapsed", {"event": "jobs.leases_lapsed", "jobs": len(lapsed)})
        recorded = await self._recorded_ends([job.id for job, _ in lapsed])
        for job, lost in lapsed:
            self._resume(job, lost, recorded.get(job.id))

    async def _recorded_ends(self, job_ids: Sequence[str]) -> dict[str, End]:
        """Return the outcomes that the former holders had recorded: these jobs need not run again."""
        try:
            return await self._results.recorded_ends(job_ids)
        except ShoalError as err:
            # The jobs then run again, and the store returns the first result when the second is put.
            log.info(
                "cannot query the store for results of lapsed jobs: %(error)s",
                {"event": "jobs.lapsed_results_unknown", "error": err},
            )
            return {}

    def _resume(self, job: Job, lost: Lease, recorded: End | None) -> None:
        if recorded is not None and recorded.generation == job.generation:
            self._dispatcher.end_recorded(job, recorded)
            return
        decision = after_lapse(job, lost, self._clock(), random.random)
        if isinstance(decision, End):
            self._dispatcher.end(job, decision)
        else:
            self._dispatcher.put_back(job, decision)

    async def _recount(self) -> float:
        return await self._backlog.recount(self._store.count_waiting)

    async def _sweep(self) -> float:
        if swept := await self._payloads.sweep(self._clock()):
            log.info(
                "removed %(payloads)d payloads that no job needs", {"event": "payloads.removed", "payloads": swept}
            )
        return SWEEP_S * random.uniform(0.5, 1)
