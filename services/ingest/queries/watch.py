"""Watching jobs: one change stream for the whole process, fanned out as "look again".

    MongoDB ──change stream──> Changes ──event per job──> each watcher reads the job and tells what is new

A change is only a hint; what a watcher tells, it reads from the job itself, where the transitions are. So nothing is
missed whatever happens to the stream: whenever it is opened anew (a failover, a lost place), everyone looks again. A
watcher that is slow finds several transitions at once, and holds no queue.

With nobody watching, only cancellations are streamed: under a load of thousands of jobs a second, the rest would cost
every instance a good part of a core.
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
from mesh.process.tasks import Background, end
from services.ingest.job import Job, generations
from services.ingest.queries.jobs import Jobs
from shoal.errors import ResourceExhausted, Unavailable

log = logging.getLogger(__name__)

_AWAIT_MS = 2_000
# A change stream's longest wait for news; must be below the client's timeout for one operation.
_QUIET_S = 10.0
# How long the wide stream stays open after its last watcher.
_REOPEN_S = 0.5
_LOOK_S = 30.0
# A watcher looks at its job this often without any hint, in case a hint was lost by a fault of ours.
_PATIENCE_S = 30.0
# How long a watcher outlives a database that is away.
_STEPS_TOLD = 16
# A watcher that missed more transitions than this is told the newest state only; the job carries the others.


class ChangeFeed(Background):
    """Tells who is interested that a job has changed. Used as `async with`."""

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
        self._max_watches = max_watches
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._count = 0
        self._first_came = asyncio.Event()

    @contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job may have changed.

        Raises:
            ResourceExhausted: too many watch already.
        """
        if self._count >= self._max_watches:
            raise ResourceExhausted(f"{self._count} watches are open, which is the limit", retry_after_ms=1_000)
        event = asyncio.Event()
        self._watchers[job_id].add(event)
        self._count += 1
        self._first_came.set()
        try:
            yield event
        finally:
            self._count -= 1
            self._watchers[job_id].discard(event)
            if not self._watchers[job_id]:
                del self._watchers[job_id]
            if not self._count:
                self._first_came.clear()

    def notify(self, job_id: str) -> None:
        """The job has changed."""
        for event in self._watchers.get(job_id, ()):
            event.set()

    def due_again(self, jobs: Sequence[Job]) -> None:
        """Wake the watchers of jobs that are in the queue again."""
        for job in jobs:
            self.notify(job.id)

    async def _run(self) -> None:
        await self._ready.wait()
        while True:
            is_wide = self._count > 0
            try:
                await self._follow(is_wide)
            except PyMongoError as err:
                log.warning("%s", translate(err, "following changes of jobs"))
                await asyncio.sleep(_REOPEN_S)
            except Exception:
                log.exception("following changes of jobs")
                await asyncio.sleep(_REOPEN_S)

    async def _follow(self, is_wide: bool) -> None:
        """Streams until the breadth should change."""
        stream = asyncio.create_task(self._stream(is_wide))
        turn = asyncio.create_task(self._until_quiet() if is_wide else self._wait_for_a_watcher())
        try:
            await asyncio.wait([stream, turn], return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                stream.result()
        finally:
            await end(stream, turn)

    async def _wait_for_a_watcher(self) -> None:
        await self._first_came.wait()

    async def _until_quiet(self) -> None:
        while True:
            await asyncio.sleep(_QUIET_S)
            if not self._count:
                return

    async def _stream(self, is_wide: bool) -> None:
        async with await self._jobs.watch(pipeline_of(is_wide), max_await_time_ms=_AWAIT_MS) as stream:
            for events in list(self._watchers.values()):
                for event in events:
                    event.set()
            # Not `async for`: that one's wait for the next change ends with the client's timeout for one operation.
            while stream.alive:
                if (change := await next_change(stream)) is None:
                    continue
                job_id = change["documentKey"]["_id"]
                if (taken_by := change.get("taken_by")) is not None:
                    self._on_taken(job_id, taken_by)
                self.notify(job_id)


def pipeline_of(is_wide: bool) -> list[Document]:
    """What is streamed: take-overs for cancellation, and with watchers every change of a state. Never a request."""
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
    """Follows jobs for clients."""

    def __init__(self, jobs: Jobs, changes: ChangeFeed) -> None:
        self._jobs = jobs
        self._changes = changes

    async def follow(self, job_id: str) -> AsyncIterator[Job]:
        """The job as it is now, and again after each transition, until it has ended.

        Raises:
            NotFound: no such job. ResourceExhausted: too many watch. Unavailable: MongoDB was away for too long.
        """
        with self._changes.of(job_id) as changed:
            job = await self._jobs.get(job_id)
            yield job
            while not job.is_final:
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _LOOK_S)
                changed.clear()
                newer = await self._patiently(job_id)
                for view in views_between(job, newer):
                    yield view
                job = newer

    async def _patiently(self, job_id: str) -> Job:
        give_up = asyncio.get_running_loop().time() + _PATIENCE_S
        while True:
            try:
                return await self._jobs.get(job_id)
            except Unavailable:
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(_REOPEN_S)


def views_between(before: Job, after: Job) -> list[Job]:
    """`after`, preceded by the job as of each transition that lies between. None when there is no new one."""
    if not after.transitions or after.transitions[-1:] == before.transitions[-1:]:
        return []
    seen = before.transitions[-1] if before.transitions else None
    first = after.transitions.index(seen) + 1 if seen in after.transitions else 0
    missed = range(first, len(after.transitions) - 1)
    if len(missed) > _STEPS_TOLD:
        return [after]
    return [*(as_of(after, index) for index in missed), after]


def as_of(job: Job, index: int) -> Job:
    """The job as it was after that one of its transitions, as far as these tell."""
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
