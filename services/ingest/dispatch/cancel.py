"""Cancellation: the job is taken over from its holder and ended, unless the store already has its result."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from mesh.mongo_clock import Clock
from mesh.process.tasks import uninterrupted
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S as TURN_S
from mesh.rpc.tenant_turns import TenantTurns
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.job import Job, imposed_end
from services.ingest.limits import REASON_CHARS
from services.ingest.queries.jobs import Jobs
from services.ingest.queries.watch import Watch
from shoal.errors import InvalidArgument, ResourceExhausted

WAIT_S = 3.0
"""Maximum wait for the job's end: a few milliseconds, unless the store is unavailable."""
CANCELLED_AT_ONCE = 8
"""Jobs that one instance takes over at a time. Thousands would take all connections to MongoDB, and the places of the
jobs that the dispatcher holds."""


class JobCanceller:
    """Cancels jobs for clients and schedules."""

    def __init__(self, jobs: Jobs, claims: Claims, dispatcher: Dispatcher, watch: Watch, clock: Clock) -> None:
        self._jobs = jobs
        self._claims = claims
        self._dispatcher = dispatcher
        self._watch = watch
        self._clock = clock
        self._turns = TenantTurns(CANCELLED_AT_ONCE, leaves_room=True, wait_s=TURN_S)

    async def cancel(self, job_id: str, reason: str, scope: TenantScope = EVERY_TENANT) -> Job:
        """Cancel a job of the scope and return it as ended.

        While the store is unavailable, the job is returned before its end.

        Raises:
            InvalidArgument: `job_id` is empty, or `reason` too long. NotFound: no such job.
            Unavailable: MongoDB is unavailable.
        """
        if len(reason) > REASON_CHARS:
            raise InvalidArgument(f"reason: at most {REASON_CHARS} characters, got {len(reason)}")
        job = await self._jobs.get(job_id, scope)
        if job.is_final:
            return job
        async with self._turns.take(scope.tenant or ""):
            await uninterrupted(self._take_over(job_id, reason))
        # With too many watches the job ends all the same.
        with suppress(TimeoutError, ResourceExhausted):
            async with asyncio.timeout(WAIT_S):
                async for seen in self._watch.follow(job_id, scope):
                    job = seen
        return job

    async def _take_over(self, job_id: str, reason: str) -> None:
        """Take the job over, and begin its end; nothing, when it has ended meanwhile, or is being cancelled."""
        taken = await self._claims.take_to_cancel(job_id, reason)
        if taken is not None and (how := imposed_end(taken, self._clock())) is not None:
            self._dispatcher.end(taken, how)
