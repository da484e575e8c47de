"""Keeps promises while others work: leases are renewed, lapsed ones found, deadlines enforced, leftovers swept.

Every instance does all of it, for all jobs. Two that find the same lapsed job are told apart by the take-over.
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
from services.ingest.dispatch.recorder import Results
from services.ingest.instance import Instance
from services.ingest.intake.backlog import Backlog
from services.ingest.intake.payloads import Payloads
from services.ingest.job import End, Job, Lease, after_lapse, imposed_end
from services.ingest.job_store import JobStore
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

CARE_S = 0.5
"""How often lapsed leases and passed deadlines are looked for: one look at an index each."""
CARE_JOBS = 200
SWEEP_S = 600.0
_FIRST_SWEEP_S = 30.0
"""It asks the store, which a node that starts does not have at once; and nothing hurries."""
_AWAY_WAIT_S = 1.0


class LeaseKeeper:
    """Runs its duties in the background for as long as the `async with` block lasts, once `ready` is set."""

    def __init__(
        self,
        store: JobStore,
        claims: Claims,
        dispatcher: Dispatcher,
        results: Results,
        payloads: Payloads,
        backlog: Backlog,
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

    async def __aenter__(self) -> LeaseKeeper:
        for name, duty, first_s in (
            ("renew leases", self._renew, 0.0),
            ("care for lapsed jobs", self._care, 0.0),
            ("count the backlog", self._recount, 0.0),
            ("sweep payloads", self._sweep, _FIRST_SWEEP_S),
        ):
            task = asyncio.create_task(self._do(name, duty, first_s), name=name)
            self._stack.push_async_callback(end, task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)

    async def _do(self, name: str, duty: Callable[[], Awaitable[float]], first_s: float) -> None:
        """Does `duty` from `first_s` on."""
        await self._ready.wait()
        await asyncio.sleep(first_s)
        await for_ever(name, duty, away_s=min(_AWAY_WAIT_S, self._renew_s), log=log)

    async def _renew(self) -> float:
        held = self._dispatcher.held()
        if held:
            for job_id in await self._claims.renew(held):
                self._dispatcher.lost(job_id, held[job_id])
        return self._renew_s

    async def _care(self) -> float:
        await self._recover()
        limit = min(CARE_JOBS, self._dispatcher.room)
        expired = await self._claims.take_expired(limit) if limit else []
        for job in expired:
            if (how := imposed_end(job, self._clock())) is not None:
                self._dispatcher.end(job, how)
        return 0.0 if len(expired) == CARE_JOBS else CARE_S * random.uniform(0.5, 1)

    async def _recover(self) -> None:
        limit = min(CARE_JOBS, self._dispatcher.room)
        lapsed = await self._claims.take_lapsed(limit, self._dispatcher.held().keys()) if limit else []
        if not lapsed:
            return
        log.warning("took over %d jobs whose leases lapsed", len(lapsed))
        standing = await self._standing([job.id for job, _ in lapsed])
        for job, lost in lapsed:
            self._resume(job, lost, standing.get(job.id))

    async def _standing(self, job_ids: Sequence[str]) -> dict[str, End]:
        """Results that the former holders had recorded: what has one need not run again."""
        try:
            return await self._results.standing(job_ids)
        except ShoalError as err:
            # Then they run again, and the store says what stands when the new results come.
            log.info("cannot ask the store about jobs that lapsed: %s", err)
            return {}

    def _resume(self, job: Job, lost: Lease, standing: End | None) -> None:
        if standing is not None and standing.generation == job.generation:
            self._dispatcher.end_as(job, standing)
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
            log.info("swept %d payloads that no job needed", swept)
        return SWEEP_S * random.uniform(0.5, 1)
