"""Metrics of ingest: counts of this instance's jobs, and the state of the queue, read every few seconds."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mesh.metrics.families import Family, Kind, Reading
from mesh.metrics.largest import OTHER
from mesh.mongo_clock import Clock, DatabaseClock
from mesh.mongo_lease import LeaderLease
from mesh.process.tasks import Background, for_ever
from mesh.removal_guard import RemovalGuard
from services.ingest.connectors.connectors import Connectors
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.lease_keeper import LeaseKeeper
from services.ingest.intake.backlog import JobBacklog
from services.ingest.intake.disk import Disk
from services.ingest.job import Job, Outcome
from services.ingest.job_events import JobEvents
from services.ingest.job_store import JobStore
from services.ingest.schedules.firing import Firing
from shoal.store.v1 import store_pb2

if TYPE_CHECKING:
    from services.ingest.batches.chunk_runner import ChunkRunner

log = logging.getLogger(__name__)

C, G = Kind.COUNTER, Kind.GAUGE
ACCEPTED = Family("shoal.ingest.jobs.accepted", C, "{job}", "Jobs that are durable, counted where they were submitted.")
ENDED = Family(
    "shoal.ingest.jobs.ended", C, "{job}", "Jobs that have ended, by outcome, counted where they ran.", ("outcome",)
)
PUT_BACK = Family("shoal.ingest.jobs.put_back", C, "{job}", "Attempts after which a job went back to the queue.")
LEASES_LOST = Family("shoal.ingest.leases.lost", C, "{job}", "Jobs given up: another instance has their lease.")
TAKEN_OVER = Family("shoal.ingest.leases.taken_over", C, "{job}", "Jobs taken over, since their holder's lease lapsed.")
FIRED = Family("shoal.ingest.schedules.fired", C, "{job}", "Times of schedules for which the instance made a job.")
SKIPPED = Family(
    "shoal.ingest.schedules.skipped", C, "{time}", "Times, or runs of missed times, for which no job was made."
)
FIRING_FAILED = Family("shoal.ingest.schedules.failed", C, "{attempt}", "Attempts to fire that failed; repeated.")
AGAIN = Family("shoal.ingest.jobs.due_again", C, "{job}", "Jobs that were requeued, or freed by their dependencies.")
HELD = Family("shoal.ingest.jobs.held", G, "{job}", "Jobs whose lease the instance holds: running, or about to.")
BACKLOG = Family("shoal.ingest.backlog", G, "{job}", "Queued jobs of all instances together, estimated.")
AGE = Family(
    "shoal.ingest.queue.age", G, "s", "Age of the oldest due job of a tenant: the 20 oldest, or `other`.", ("tenant",)
)
QUEUED = Family(
    "shoal.ingest.queue.jobs",
    G,
    "{job}",
    "Jobs of a tenant that are queued or wait for others, 10,000 at most; of the 20 tenants with the oldest due jobs.",
    ("tenant",),
)
OLDEST = Family("shoal.ingest.queue.oldest", G, "s", "Age of the oldest due job of all; 0: none is due.")
QUEUES = Family("shoal.ingest.queues", G, "{queue}", "Tenant queues that have jobs.")
READ_AGE = Family("shoal.ingest.queue.read_age", G, "s", "Time since the ages of the queue were read; -1: never.")
LEADS = Family("shoal.ingest.leader", G, "", "1: the instance leads ingest; schedules fire and operations run there.")
BATCH_ROWS = Family(
    "shoal.ingest.batch.rows",
    C,
    "{row}",
    "Rows of batches that were written, attempts that are repeated included.",
    ("outcome",),
)
BATCH_CHUNKS = Family("shoal.ingest.batch.chunks", G, "{chunk}", "Chunks of batches that the instance runs now.")
_LABELS = ("connector",)
MESSAGES = Family("shoal.ingest.connector.messages", C, "{message}", "Messages that a connector has read.", _LABELS)
ANSWERED = Family("shoal.ingest.connector.answered", C, "{message}", "Messages that it has answered.", _LABELS)
DEAD = Family("shoal.ingest.connector.dead", C, "{message}", "Messages that ended as dead letters.", _LABELS)
LAG = Family("shoal.ingest.connector.lag", G, "{message}", "Messages that its source has beyond its position.", _LABELS)
LAG_TIME = Family("shoal.ingest.connector.lag_time", G, "s", "Time by which it lags behind its source.", _LABELS)
MONGO_TRIP = Family("shoal.ingest.mongo.round_trip", G, "s", "Time of the last small read of MongoDB's primary.")
CLOCK_AHEAD = Family(
    "shoal.ingest.mongo.clock_ahead", G, "s", "Time by which this machine's clock is ahead of MongoDB's, which is used."
)
DISK_FREE = Family("shoal.ingest.mongo.disk_free", G, "By", "Free space of MongoDB's disk; -1: unknown.")
DISK_RESERVE = Family(
    "shoal.ingest.mongo.disk_reserve", G, "By", "Free space of MongoDB's disk below which submits are rejected."
)
STOPPED = Family(
    "shoal.ingest.retention.stopped", G, "", "1: jobs past their retention stay until the clock is confirmed."
)
FAMILIES = (
    *(CLOCK_AHEAD, DISK_FREE, DISK_RESERVE, STOPPED),
    *(PUT_BACK, LEASES_LOST, TAKEN_OVER, FIRED, SKIPPED, FIRING_FAILED, MONGO_TRIP),
    *(ACCEPTED, ENDED, AGAIN, HELD, BACKLOG, AGE, QUEUED, OLDEST, QUEUES, READ_AGE, LEADS),
    *(BATCH_ROWS, BATCH_CHUNKS),
    *(MESSAGES, ANSWERED, DEAD, LAG, LAG_TIME),
)

TENANTS = 20
"""Tenants with a series of their own."""
COUNTED = 10_000
"""Jobs of a tenant that are counted: an index entry each."""
QUEUES_READ = 1_000
"""Tenant queues whose ages are read: one step of an index each."""
_READ_S = 5.0
# Reading takes at most a twentieth of the time.
_REST = 20
_UNAVAILABLE_WAIT_S = 10.0


class JobCounts:
    """Counts of the jobs that this instance accepts and ends."""

    def __init__(self, events: JobEvents) -> None:
        self.accepted = 0
        self.due_again = 0
        self.ended: Counter[str] = Counter({outcome.name.lower(): 0 for outcome in Outcome})
        events.accepted.subscribe(self._add_accepted)
        events.recorded.subscribe(self._add_ended)
        events.due_again.subscribe(self._add_again)

    def _add_accepted(self, jobs: Sequence[Job]) -> None:
        self.accepted += len(jobs)

    def _add_ended(self, job: Job, result: store_pb2.Result) -> None:
        self.ended[Outcome(result.outcome).name.lower()] += 1

    def _add_again(self, jobs: Sequence[Job]) -> None:
        self.due_again += len(jobs)


class QueueAges(Background):
    """Ages of the oldest due jobs, and numbers of jobs, by tenant: read every few seconds. Used as `async with`."""

    def __init__(
        self, store: JobStore, count: Callable[[str, int], Awaitable[int]], clock: Clock, ready: asyncio.Event
    ) -> None:
        """`count` returns the number of queued jobs of a tenant, at most the one given."""
        self._store = store
        self._count = count
        self._clock = clock
        self._ready = ready
        self._loop_time = asyncio.get_running_loop().time
        self._read_at: float | None = None
        self.queues = 0
        self.ages: dict[str, float] = {}
        """Seconds by tenant, the oldest first."""
        self.jobs: dict[str, int] = {}
        """Queued jobs of the TENANTS oldest."""

    @property
    def read_age_s(self) -> float:
        """Seconds since the last read; -1: there was none."""
        return -1.0 if self._read_at is None else self._loop_time() - self._read_at

    async def _run(self) -> None:
        await self._ready.wait()
        await for_ever("read the ages of the queue", self._read, away_s=_UNAVAILABLE_WAIT_S, log=log)

    async def _read(self) -> float:
        began = self._loop_time()
        found = await self._store.tenant_queues("", QUEUES_READ)
        now = self._clock()
        ages: dict[str, float] = {}
        for key, due_at in found:
            ages[key.tenant] = max(ages.get(key.tenant, 0.0), (now - due_at).total_seconds())
        ages = dict(sorted(ages.items(), key=lambda pair: -pair[1]))
        self.queues, self.ages, self._read_at = len(found), ages, self._loop_time()
        self.jobs = {tenant: await self._count(tenant, COUNTED) for tenant in [*ages][:TENANTS]}
        return max(_READ_S, _REST * (self._loop_time() - began))


def labelled(oldest_first: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the ages of the TENANTS oldest tenants, and of all others together as OTHER, in seconds."""
    ages = dict(oldest_first[:TENANTS])
    if len(oldest_first) > TENANTS:
        # A tenant of this name that is among the oldest is as old as the others, at least.
        ages.setdefault(OTHER, oldest_first[TENANTS][1])
    return ages


class IngestMetrics:
    """Readings of one instance."""

    def __init__(
        self,
        counts: JobCounts,
        ages: QueueAges,
        backlog: JobBacklog,
        dispatcher: Dispatcher,
        connectors: Connectors,
        lease: LeaderLease,
        lease_keeper: LeaseKeeper,
        firing: Firing,
        clock: DatabaseClock,
        guard: RemovalGuard,
        disk: Disk,
        chunks: ChunkRunner | None,
    ) -> None:
        self._disk = disk
        self._guard = guard
        self._chunks = chunks
        self._lease_keeper = lease_keeper
        self._firing = firing
        self._clock = clock
        self._counts = counts
        self._ages = ages
        self._backlog = backlog
        self._dispatcher = dispatcher
        self._connectors = connectors
        self._lease = lease

    def read(self) -> Iterable[Reading]:
        yield ACCEPTED, (), self._counts.accepted
        for outcome, count in self._counts.ended.items():
            yield ENDED, (outcome,), count
        yield AGAIN, (), self._counts.due_again
        yield PUT_BACK, (), self._dispatcher.put_back_count
        yield LEASES_LOST, (), self._dispatcher.lost
        yield TAKEN_OVER, (), self._lease_keeper.taken_over
        yield FIRED, (), self._firing.fired
        yield SKIPPED, (), self._firing.skipped
        yield FIRING_FAILED, (), self._firing.failed
        yield MONGO_TRIP, (), self._clock.round_trip_s
        yield CLOCK_AHEAD, (), self._clock.ahead_s
        yield DISK_FREE, (), self._disk.free
        yield DISK_RESERVE, (), self._disk.reserve
        # An instance that does not lead removes nothing.
        yield STOPPED, (), int(self._guard.is_stopped and self._lease.is_held)
        yield HELD, (), self._dispatcher.held_count
        yield BACKLOG, (), self._backlog.estimate
        yield from self._queue()
        yield LEADS, (), int(self._lease.is_held)
        if self._chunks is not None:
            yield BATCH_ROWS, ("succeeded",), self._chunks.succeeded
            yield BATCH_ROWS, ("failed",), self._chunks.failed
            yield BATCH_CHUNKS, (), self._chunks.running
        for name, (_, progress) in self._connectors.own().items():
            yield MESSAGES, (name,), progress.messages
            yield ANSWERED, (name,), progress.answered
            yield DEAD, (name,), progress.dead
            status = progress.status()
            if status.lag is not None:
                yield LAG, (name,), status.lag
            if status.lag_ms is not None:
                yield LAG_TIME, (name,), status.lag_ms / 1_000

    def _queue(self) -> Iterable[Reading]:
        oldest_first = list(self._ages.ages.items())
        yield OLDEST, (), max(0.0, oldest_first[0][1]) if oldest_first else 0.0
        yield QUEUES, (), self._ages.queues
        yield READ_AGE, (), self._ages.read_age_s
        for tenant, age_s in labelled(oldest_first).items():
            yield AGE, (tenant,), age_s
        for tenant, jobs in self._ages.jobs.items():
            yield QUEUED, (tenant,), jobs
