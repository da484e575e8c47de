"""Execution of operations by the leader: a page of jobs of each operation in turn, until each has ended.

A page that is repeated, after a kill or by two leaders at once, does no harm: an action applies only to a job that is
still as it was read, and a page is counted once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.mongo_clock import milliseconds
from mesh.process.tasks import Background, for_ever
from mesh.rpc.access import Access
from mesh.rpc.tenant_scope import TenantScope
from services.ingest.dead_letters.dead_letters import DeadLetters
from services.ingest.dead_letters.filters import DeadLetterSelection
from services.ingest.dispatch.cancel import JobCanceller
from services.ingest.job import State
from services.ingest.job_scan import ID_ALONE, scan
from services.ingest.operations.operation import Action, Operation
from services.ingest.operations.operation_repository import OperationRepository
from services.ingest.ulid import floor
from shoal.errors import NotFound, ShoalError

log = logging.getLogger(__name__)

PAGE_JOBS = 200
"""Jobs of one page, after which other operations and an abort have their turn."""
CANCELLED_TOGETHER = 16
"""Jobs that are cancelled concurrently, each with a watch of its end."""
_IDLE_S = 0.5
_UNAVAILABLE_WAIT_S = 5.0


class Operator(Background):
    """Background execution of operations while `leads()` returns True. Used as `async with`."""

    def __init__(
        self,
        operations: OperationRepository,
        jobs: AsyncCollection[Document],
        canceller: JobCanceller,
        dead_letters: DeadLetters,
        access: Access | None,
        *,
        leads: Callable[[], bool],
        ready: asyncio.Event,
    ) -> None:
        self._operations = operations
        self._jobs = jobs
        self._canceller = canceller
        self._dead_letters = dead_letters
        self._access = access
        self._leads = leads
        self._ready = ready
        # Operations whose last page has failed, with the time of the next attempt.
        self._again_at: dict[str, float] = {}

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("carry out operations on jobs", self._run_round, away_s=_UNAVAILABLE_WAIT_S, log=log)

    async def _run_round(self) -> float:
        """Carry out a page of each operation that runs; return the pause before the next round."""
        if not self._leads():
            return _IDLE_S
        running = await self._operations.running()
        now = time.monotonic()
        self._again_at = {one.id: at for one in running if (at := self._again_at.get(one.id, 0.0)) > now}
        for operation in running:
            if operation.id in self._again_at:
                continue
            if not self._leads():
                break
            try:
                await self._page(operation)
            except ShoalError as err:
                # The operations of others go on.
                log.warning(
                    "operation %(operation)s cannot be carried out for now: %(error)s",
                    {"event": "operation.retrying", "operation": operation.id, "error": err},
                )
                self._again_at[operation.id] = time.monotonic() + _UNAVAILABLE_WAIT_S
        return 0.0 if len(running) > len(self._again_at) else _IDLE_S

    async def _page(self, operation: Operation) -> None:
        query = operation.selection.query(operation.started_at)
        with translated("finding the jobs of an operation"):
            page = await scan(self._jobs, query, PAGE_JOBS, after=operation.position, order=1, fields=ID_ALONE)
        # Ids rise with the time of submission: later jobs are not the operation's.
        end = floor(milliseconds(operation.started_at) + 1)
        ids = [document["_id"] for document in page.documents if document["_id"] < end]
        changed = await self._change(operation, ids) if ids else 0
        ends = page.end is None or page.end >= end
        position = page.end or (ids[-1] if ids else operation.position or end)
        await self._operations.advance(operation, position, changed, len(ids) - changed, ends=ends)
        if ends:
            log.info(
                "operation %(operation)s (%(action)s) has examined all its jobs",
                {"event": "operation.examined", "operation": operation.id, "action": operation.action},
            )

    async def _change(self, operation: Operation, ids: Sequence[str]) -> int:
        """Apply the action to the jobs; return the number of jobs that changed."""
        scope = TenantScope(operation.tenant or None, operation.caller, self._access if operation.caller else None)
        selected = DeadLetterSelection(tuple(ids))
        match operation.action:
            case Action.REQUEUE:
                return len((await self._dead_letters.requeue(selected, operation.reason, scope)).ids)
            case Action.PURGE:
                return len((await self._dead_letters.purge(selected, scope)).ids)
            case Action.CANCEL:
                return await self._cancel(ids, operation.reason, scope)

    async def _cancel(self, ids: Sequence[str], reason: str, scope: TenantScope) -> int:
        turns = asyncio.Semaphore(CANCELLED_TOGETHER)

        async def cancel(job_id: str) -> bool:
            async with turns:
                try:
                    job = await self._canceller.cancel(job_id, reason, scope)
                except NotFound:
                    return False
            return job.state not in (State.SUCCEEDED, State.FAILED, State.DEAD, State.EXPIRED)

        return sum(await asyncio.gather(*map(cancel, ids)))
