"""The areas of an ingest instance: the parts of each, and one builder that wires them. `app.py` starts and stops them.

    ground ──> tenants ──> dispatch ──> reading ──> intake ──> schedules ──> retention, streams, batches

A builder takes only what was built before it. What must be heard the other way goes through `JobEvents`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.mongo import Document
from mesh.mongo_lease import LEASES, LeaderLease
from mesh.rpc.client.channel import Channel
from services.ingest.clock import DatabaseClock, milliseconds
from services.ingest.config import IngestConfig
from services.ingest.connectors import settings
from services.ingest.connectors.connectors import ConnectorContext, Connectors
from services.ingest.connectors.reports import CONNECTORS, Reports
from services.ingest.connectors.run_stream import RunStreams
from services.ingest.dispatch.attempt import Attempts
from services.ingest.dispatch.cancel import Cancelling
from services.ingest.dispatch.cascade import Cascade
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.lease_keeper import LeaseKeeper
from services.ingest.dispatch.model_gate import ModelGate
from services.ingest.dispatch.recorder import Recorder
from services.ingest.dispatch.remote import RemoteModel, RemoteResults
from services.ingest.documents import JOBS
from services.ingest.instance import Instance
from services.ingest.intake.backlog import Backlog
from services.ingest.intake.budget import Budget
from services.ingest.intake.claim_check import ClaimCheck
from services.ingest.intake.disk import Disk
from services.ingest.intake.durable_insert import DurableInsert
from services.ingest.intake.intake import GROUP_BYTES, GROUP_ITEMS, Intake, Limits
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.pressure import Pressure
from services.ingest.intake.storage import Storage
from services.ingest.job_events import JobEvents
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.queries.completions import Endings
from services.ingest.queries.jobs import Jobs
from services.ingest.queries.stored_results import StoredAnswers
from services.ingest.queries.watch import Changes, Watch
from services.ingest.queries.watch_many import WatchMany
from services.ingest.retention.retention_repository import JOB_RETENTION, RetentionRepository
from services.ingest.retention.sweep import Sweep
from services.ingest.schedules.documents import SCHEDULES
from services.ingest.schedules.firing import Firing
from services.ingest.schedules.schedule_repository import Schedules
from services.ingest.tenants.admission import Admission
from services.ingest.tenants.bucket import Buckets
from services.ingest.tenants.pending import PendingCounts
from services.ingest.tenants.tenant_repository import TenantRepository
from services.ingest.ulid import Ulids

if TYPE_CHECKING:
    from services.ingest.batches.app import Batches


@dataclass(frozen=True, slots=True)
class Ground:
    """Parts that the areas share."""

    instance: Instance
    channel: Channel
    database: AsyncDatabase[Document]
    clock: DatabaseClock
    jobs: AsyncCollection[Document]
    store: MongoJobs
    storage: Storage
    payloads: Payloads
    events: JobEvents


@dataclass(frozen=True, slots=True)
class TenantsArea:
    """Tenants: settings, quotas and rates."""

    book: TenantRepository
    pending: PendingCounts
    buckets: Buckets


@dataclass(frozen=True, slots=True)
class DispatchArea:
    """Dispatch: claims, attempts, records, leases and dependencies."""

    model: RemoteModel
    backlog: Backlog
    claims: Claims
    recorder: Recorder
    dispatcher: Dispatcher
    keeper: LeaseKeeper
    cascade: Cascade


@dataclass(frozen=True, slots=True)
class ReadingArea:
    """Reading: jobs, watches and endings."""

    jobs: Jobs
    changes: Changes
    watch: Watch
    watch_many: WatchMany
    endings: Endings


@dataclass(frozen=True, slots=True)
class IntakeArea:
    """Intake, with the limits that work by themselves."""

    disk: Disk
    intake: Intake


@dataclass(frozen=True, slots=True)
class SchedulesArea:
    """Schedules, and the lease under which they are fired."""

    lease: LeaderLease
    book: Schedules
    firing: Firing


@dataclass(frozen=True, slots=True)
class RetentionArea:
    """Retention of jobs and batches."""

    book: RetentionRepository
    sweep: Sweep


@dataclass(frozen=True, slots=True)
class StreamsArea:
    """Connectors and clients' streams."""

    connectors: Connectors
    reports: Reports
    run_streams: RunStreams


async def build_ground(config: IngestConfig, stack: AsyncExitStack) -> Ground:
    """Return the parts that the areas share, started."""
    client = await stack.enter_async_context(mongo.connect(config.mongo))
    channel = await stack.enter_async_context(Channel(config.mesh))
    database = client[config.database]
    clock = await stack.enter_async_context(DatabaseClock(database))
    ulids = Ulids(lambda: milliseconds(clock()))
    storage = await stack.enter_async_context(Storage(channel))
    return Ground(
        instance=Instance(f"{config.node}/{config.instance}", ulids.new(), clock, ulids.new, asyncio.Event()),
        channel=channel,
        database=database,
        clock=clock,
        jobs=database[JOBS],
        store=MongoJobs(database[JOBS]),
        storage=storage,
        payloads=Payloads(database, ClaimCheck(channel, config.database, time.monotonic, storage.heard)),
        events=JobEvents(),
    )


def build_tenants(ground: Ground) -> TenantsArea:
    """Return the tenants."""
    return TenantsArea(
        TenantRepository(ground.database),
        PendingCounts(ground.jobs, time.monotonic),
        Buckets(ground.database, time.monotonic),
    )


def build_dispatch(config: IngestConfig, ground: Ground, tenants: TenantsArea) -> DispatchArea:
    """Return the dispatch."""
    instance, store, payloads = ground.instance, ground.store, ground.payloads
    model, results = RemoteModel(ground.channel), RemoteResults(ground.channel)
    gate, backlog = ModelGate(), Backlog(config.max_backlog)
    claims = Claims(
        store,
        instance,
        lease_ms=config.lease_ms,
        weight_of=tenants.book.weight,
        ageing=timedelta(milliseconds=config.ageing_ms),
    )
    attempts = Attempts(
        model,
        payloads,
        gate=gate,
        memory=Budget(config.pending_bytes, "requests being run"),
        clock=instance.clock,
        timeout_ms=config.attempt_timeout_ms,
    )
    recorder = Recorder(store, results, payloads, ground.events, instance)
    dispatcher = Dispatcher(
        claims,
        attempts,
        recorder,
        instance=instance,
        gate=gate,
        backlog=backlog,
        max_in_flight=config.max_in_flight,
        poll_ms=config.poll_ms,
        drain_ms=config.drain_ms,
    )
    keeper = LeaseKeeper(store, claims, dispatcher, results, payloads, backlog, instance, renew_ms=config.renew_ms)
    cascade = Cascade(store, claims, dispatcher, ground.events, instance)
    return DispatchArea(model, backlog, claims, recorder, dispatcher, keeper, cascade)


async def build_reading(
    config: IngestConfig, ground: Ground, dispatch: DispatchArea, stack: AsyncExitStack
) -> ReadingArea:
    """Return the reading, with the MongoDB client of its watches started."""
    ready = ground.instance.ready
    # Each watch with a filter holds a connection: a client of their own keeps them from those that jobs need.
    watching = await stack.enter_async_context(
        mongo.connect(config.mongo, max_connections=config.max_filter_watches + 4)
    )
    jobs = Jobs(ground.jobs, ground.payloads)
    changes = Changes(ground.jobs, ready=ready, on_taken=dispatch.dispatcher.taken, max_watches=config.max_watches)
    return ReadingArea(
        jobs,
        changes,
        Watch(jobs, changes),
        WatchMany(watching[config.database][JOBS], config.max_filter_watches),
        Endings(ground.jobs, StoredAnswers(ground.channel), ready=ready),
    )


def build_intake(config: IngestConfig, ground: Ground, tenants: TenantsArea, dispatch: DispatchArea) -> IntakeArea:
    """Return the intake."""
    disk = Disk(ground.database, config.min_free_disk_bytes)
    pressure = Pressure(
        config.max_write_wait_ms / 1000,
        group_items=GROUP_ITEMS,
        group_bytes=GROUP_BYTES,
        clock=time.monotonic,
    )
    limits = Limits(
        storage=ground.storage,
        admission=Admission(
            tenants.book,
            tenants.pending,
            tenants.buckets,
            gates=[disk.admit, pressure.admit, dispatch.backlog.admit],
        ),
        budget=Budget(config.pending_bytes, "submitted requests"),
        pressure=pressure,
    )
    insert = DurableInsert(ground.store, dispatch.dispatcher, ground.events)
    intake = Intake(ground.store, ground.payloads, insert, limits, ground.instance, inline_bytes=config.inline_bytes)
    return IntakeArea(disk, intake)


def build_schedules(
    config: IngestConfig, ground: Ground, intake: IntakeArea, reading: ReadingArea, cancelling: Cancelling
) -> SchedulesArea:
    """Return the schedules."""
    instance = ground.instance
    lease = LeaderLease(
        ground.database[LEASES],
        "ingest",
        f"{instance.name} {instance.new_id()}",
        ready=instance.ready,
        ttl_ms=config.lease_ms,
        renew_ms=config.renew_ms,
    )
    firing = Firing(
        ground.database[SCHEDULES],
        lease,
        submit=intake.intake.submit_scheduled,
        find=intake.intake.by_key,
        read=reading.jobs.get,
        cancel=cancelling.cancel,
        clock=instance.clock,
        ready=instance.ready,
    )
    return SchedulesArea(lease, Schedules(ground.database[SCHEDULES], instance.clock), firing)


def build_retention(config: IngestConfig, ground: Ground, schedules: SchedulesArea) -> RetentionArea:
    """Return the retention."""
    book = RetentionRepository(ground.database[JOB_RETENTION], config.retention)
    lease = schedules.lease
    sweep = Sweep(
        ground.jobs,
        ground.payloads,
        book,
        leads=lambda: lease.is_held,
        clock=ground.clock,
        ready=ground.instance.ready,
        round_s=config.retention_round_ms / 1_000,
    )
    return RetentionArea(book, sweep)


def build_streams(config: IngestConfig, ground: Ground, intake: IntakeArea, reading: ReadingArea) -> StreamsArea:
    """Return the connectors and the clients' streams."""
    instance = ground.instance
    configured = settings.read(config.connectors) if config.connectors is not None else {}
    place = ConnectorContext(instance.name, instance.clock, ground.database)
    connectors = Connectors(configured, intake.intake, reading.endings, place, ready=instance.ready)
    reports = Reports(
        ground.database[CONNECTORS],
        connectors.own,
        instance=instance.name,
        clock=instance.clock,
        ready=instance.ready,
    )
    run_streams = RunStreams(
        intake.intake,
        reading.endings,
        most=config.max_streams,
        items=config.run_items,
        all_items=config.run_items_together,
    )
    return StreamsArea(connectors, reports, run_streams)


def build_batches(
    config: IngestConfig, ground: Ground, dispatch: DispatchArea, retention: RetentionArea
) -> Batches | None:
    """Return the batches; None where Arrow, which they need, is not installed."""
    if find_spec("pyarrow") is None:
        return None
    from services.ingest.batches.app import Batches

    instance = ground.instance
    return Batches(
        config,
        ground.database,
        ground.channel,
        dispatch.model,
        retention.book,
        clock=instance.clock,
        new_id=instance.new_id,
        ready=instance.ready,
    )


def subscribe(events: JobEvents, dispatch: DispatchArea, reading: ReadingArea) -> None:
    """Connect those that write jobs with those that act on it; all that hear of an event, in their order."""
    events.changed.subscribe(reading.changes.poke, reading.endings.poke, dispatch.cascade.changed)
    events.recorded.subscribe(reading.endings.recorded)
    events.accepted.subscribe(dispatch.cascade.accepted)
    events.due_again.subscribe(dispatch.dispatcher.due_again, reading.changes.due_again, dispatch.cascade.accepted)
