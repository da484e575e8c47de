"""Watches of single jobs: one change stream for the whole process, whose changes make watchers read their jobs again.

    MongoDB ──change stream──> ChangeFeed ──event per job──> each watcher reads the job and yields its new transitions

A change is only a hint: a watcher reads the transitions from the job itself. So none is missed when the stream fails:
whenever the stream is opened again (a failover, a lost position), all watchers read again. A slow watcher finds several
transitions in one read, and needs no queue.

Without watchers, the stream has only cancellations. At thousands of jobs per second, all changes would cost every
instance a good part of a core.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError

from mesh.mongo import Document, next_change, translate
from mesh.process.pauses import Pauses
from mesh.process.tasks import Background, end
from mesh.rpc.places import Places
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.ingest.job import Job, generations
from services.ingest.queries.jobs import Jobs
from shoal.errors import Unavailable

log = logging.getLogger(__name__)

# Longest wait of a change stream for a change; must be below the client's timeout for one operation.
_AWAIT_MS = 2_000
# Time that the wide stream stays open after its last watcher.
_QUIET_S = 10.0
_REOPEN_S = 0.5
# A watcher reads its job this often without a hint, in case an internal error lost one.
_POLL_S = 30.0
# Time for which a watcher retries while the database is unavailable.
_RETRY_FOR_S = 30.0
# A watcher that missed more transitions than this yields the newest state only; the job has the others.
_MAX_MISSED = 16


class ChangeFeed(Background):
    """Notifier of watchers about changed jobs. Used as `async with`."""

    def __init__(
        self,
        jobs: AsyncCollection[Document],
        *,
        ready: asyncio.Event,
        on_taken: Callable[[str, str], None],
        max_watches: int,
    ) -> None:
        self._jobs = jobs
        self._ready = ready
        self._on_taken = on_taken
        self._places = Places(max_watches, "watches")
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._has_watchers = asyncio.Event()

    @contextmanager
    def of(self, job_id: str, tenant: str | None = None) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever the job may have changed. The watch takes a place of `tenant`.

        Raises:
            ResourceExhausted: too many watches.
        """
        event = asyncio.Event()
        with self._places.take(tenant):
            self._watchers[job_id].add(event)
            self._has_watchers.set()
            try:
                yield event
            finally:
                self._watchers[job_id].discard(event)
                if not self._watchers[job_id]:
                    del self._watchers[job_id]
                if not self._watchers:
                    self._has_watchers.clear()

    def notify(self, job_id: str) -> None:
        """Notify the watchers of a job."""
        for event in self._watchers.get(job_id, ()):
            event.set()

    def due_again(self, jobs: Sequence[Job]) -> None:
        """Notify the watchers of jobs that are in the queue again."""
        for job in jobs:
            self.notify(job.id)

    async def _run(self) -> None:
        await self._ready.wait()
        while True:
            is_wide = self._places.taken > 0
            try:
                await self._follow(is_wide)
            except PyMongoError as err:
                log.warning(
                    "%(error)s", {"event": "watch.retrying", "error": translate(err, "following changes of jobs")}
                )
                await asyncio.sleep(_REOPEN_S)
            except Exception:
                log.exception("following changes of jobs", {"event": "watch.failed"})
                await asyncio.sleep(_REOPEN_S)

    async def _follow(self, is_wide: bool) -> None:
        """Follow the stream until it should become wide (a watcher) or narrow (no watcher for a while)."""
        stream = asyncio.create_task(self._stream(is_wide))
        breadth_change = asyncio.create_task(self._until_quiet() if is_wide else self._wait_for_a_watcher())
        try:
            await asyncio.wait([stream, breadth_change], return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                stream.result()
        finally:
            await end(stream, breadth_change)

    async def _wait_for_a_watcher(self) -> None:
        await self._has_watchers.wait()

    async def _until_quiet(self) -> None:
        while True:
            await asyncio.sleep(_QUIET_S)
            if not self._places.taken:
                return

    async def _stream(self, is_wide: bool) -> None:
        async with await self._jobs.watch(pipeline_of(is_wide), max_await_time_ms=_AWAIT_MS) as stream:
            for events in list(self._watchers.values()):
                for event in events:
                    event.set()
            # Not `async for`, whose wait for the next change ends with the client's timeout for one operation.
            while stream.alive:
                if (change := await next_change(stream)) is None:
                    continue
                job_id = change["documentKey"]["_id"]
                if (taken_by := change.get("taken_by")) is not None:
                    self._on_taken(job_id, taken_by)
                self.notify(job_id)


def pipeline_of(is_wide: bool) -> list[Document]:
    """Return the pipeline of the stream: take-overs for cancellation; when wide, all changes of state. No requests."""
    cancelled = {"updateDescription.updatedFields.cancel": {"$exists": True}}
    moved = {"updateDescription.updatedFields.state": {"$exists": True}}
    return [
        {"$match": {"operationType": "update", "$or": [cancelled, moved] if is_wide else [cancelled]}},
        {
            "$project": {
                "documentKey": 1,
                "taken_by": {
                    "$cond": [
                        {"$gt": ["$updateDescription.updatedFields.cancel", None]},
                        "$updateDescription.updatedFields.lease.id",
                        "$$REMOVE",
                    ]
                },
            }
        },
    ]


class Watch:
    """Server of watches of single jobs."""

    def __init__(self, jobs: Jobs, changes: ChangeFeed) -> None:
        self._jobs = jobs
        self._changes = changes
        # Reads that begin in the next iteration of the event loop, by job and tenant.
        self._reads: dict[tuple[str, str | None], asyncio.Task[Job]] = {}
        self._pauses = Pauses()

    async def follow(self, job_id: str, scope: TenantScope = EVERY_TENANT) -> AsyncIterator[Job]:
        """Yield the job of the scope, and again after each transition, until it has ended.

        Raises:
            NotFound: no such job. ResourceExhausted: too many watches. Unavailable: MongoDB is unavailable for 30 s.
        """
        with self._changes.of(job_id, scope.tenant) as changed:
            job = await self._jobs.get(job_id, scope)
            yield job
            while not job.is_final:
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _POLL_S)
                changed.clear()
                newer = await self._read_with_retry(job_id, scope)
                # Thousands may watch one job: other calls go on between two watchers.
                await self._pauses.pause()
                for view in views_between(job, newer):
                    yield view
                job = newer

    async def _read_with_retry(self, job_id: str, scope: TenantScope) -> Job:
        give_up = asyncio.get_running_loop().time() + _RETRY_FOR_S
        while True:
            try:
                return await self._shared(job_id, scope)
            except Unavailable:
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(_REOPEN_S)

    async def _shared(self, job_id: str, scope: TenantScope) -> Job:
        """Return the job. All its watchers learn of a change at the same time, and share one read."""
        key = job_id, scope.tenant
        reading = self._reads.get(key)
        if reading is None:
            reading = self._reads[key] = asyncio.create_task(self._read(key, scope), name="watched job")
        return await asyncio.shield(reading)

    async def _read(self, key: tuple[str, str | None], scope: TenantScope) -> Job:
        await asyncio.sleep(0)
        # A change that is noted from now on needs another read.
        del self._reads[key]
        return await self._jobs.get(key[0], scope)


def views_between(before: Job, after: Job) -> list[Job]:
    """Return the job as of each transition after `before`, up to `after`; empty when there is no new transition."""
    if not after.transitions or after.transitions[-1:] == before.transitions[-1:]:
        return []
    seen = before.transitions[-1] if before.transitions else None
    first = after.transitions.index(seen) + 1 if seen in after.transitions else 0
    missed = range(first, len(after.transitions) - 1)
    if len(missed) > _MAX_MISSED:
        return [after]
    return [*(as_of(after, index) for index in missed), after]


def as_of(job: Job, index: int) -> Job:
    """Return the job as it was after the transition at `index`, as far as the transitions record it."""
    step = job.transitions[index]
    return replace(
        job,
        state=step.state,
        attempts=step.attempt,
        updated_at=step.at,
        due_at=None,
        lease=None,
        last_code=0,
        last_message="",
        transitions=job.transitions[: index + 1],
        transition_count=job.transition_count - (len(job.transitions) - 1 - index),
        generation=generations(job)[index],
    )
