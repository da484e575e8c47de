"""Areas of an ingest instance: the components of each, and one builder per area. `app.py` starts and stops them.

    shared ──> tenants ──> dispatch ──> queries ──> intake ──> schedules ──> operations, retention,
                                                                                     streams, batches

A builder depends only on areas built before it. Notifications in the other direction go through `JobEvents`.
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
from mesh.mongo_clock import DatabaseClock, milliseconds
from mesh.mongo_lease import LEASES, LeaderLease
from mesh.removal_guard import MARKS, RemovalGuard
from mesh.rpc.access import Access
from mesh.rpc.client.channel import Channel
from mesh.rpc.tenant_turns import TenantTurns
from services.ingest.config import IngestConfig
from services.ingest.connectors import settings
from services.ingest.connectors.connectors import ConnectorContext, Connectors
from services.ingest.connectors.reports import CONNECTORS, Reports
from services.ingest.connectors.run_stream import RunStreams
from services.ingest.dead_letters.dead_letters import DeadLetters
from services.ingest.dispatch.attempt import Attempts
from services.ingest.dispatch.cancel import JobCanceller
from services.ingest.dispatch.cascade import Cascade
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.lease_keeper import LeaseKeeper
from services.ingest.dispatch.model_gate import ModelGate
from services.ingest.dispatch.recorder import Recorder
from services.ingest.dispatch.remote import RemoteModel, RemoteResults
from services.ingest.documents import JOBS
from services.ingest.instance import Instance
from services.ingest.intake.backlog import JobBacklog
from services.ingest.intake.budget import Budget
from services.ingest.intake.claim_check import ClaimCheck
from services.ingest.intake.disk import Disk
from services.ingest.intake.durable_insert import DurableInsert
from services.ingest.intake.intake import GROUP_BYTES, GROUP_ITEMS, Intake, IntakeLimits
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.pressure import WritePressure
from services.ingest.intake.storage import StorageQuotas
from services.ingest.job_events import JobEvents
from services.ingest.metrics import IngestMetrics, JobCounts, QueueAges
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.operations.operation_repository import JOB_OPERATIONS, OperationRepository
from services.ingest.operations.operator import Operator
from services.ingest.queries.completions import Completions
from services.ingest.queries.jobs import Jobs
from services.ingest.queries.stored_results import StoredResults
from services.ingest.queries.watch import ChangeFeed, Watch
from services.ingest.queries.watch_many import WatchMany
from services.ingest.retention.expired_share import ExpiredShare
from services.ingest.retention.retention_repository import JOB_RETENTION, RetentionRepository
from services.ingest.retention.sweep import JobSweep
from services.ingest.schedules.documents import SCHEDULES
from services.ingest.schedules.firing import Firing
from services.ingest.schedules.schedule_repository import ScheduleRepository
from services.ingest.tenants.admission import Admission
from services.ingest.tenants.bucket import Buckets
from services.ingest.tenants.pending import PendingCounts
from services.ingest.tenants.tenant_repository import TenantRepository
from services.ingest.ulid import Ulids

if TYPE_CHECKING:
    from services.ingest.batches.app import Batches


@dataclass(frozen=True, slots=True)
class SharedComponents:
    """Components that the areas share."""

    instance: Instance
    channel: Channel
    database: AsyncDatabase[Document]
    clock: DatabaseClock
    jobs: AsyncCollection[Document]
    store: MongoJobs
    storage: StorageQuotas
    payloads: Payloads
    events: JobEvents
    access: Access | None
    """Decides about callers and models; None without a policy."""


@dataclass(frozen=True, slots=True)
class TenantsArea:
    """Settings, quotas and rates of tenants."""

    repository: TenantRepository
    pending: PendingCounts
    buckets: Buckets


@dataclass(frozen=True, slots=True)
class DispatchArea:
    """Claims, attempts, results, leases and dependencies of jobs."""

    model: RemoteModel
    backlog: JobBacklog
    claims: Claims
    recorder: Recorder
    dispatcher: Dispatcher
    lease_keeper: LeaseKeeper
    cascade: Cascade


@dataclass(frozen=True, slots=True)
class QueriesArea:
    """Queries, watches and completions of jobs."""

    jobs: Jobs
    changes: ChangeFeed
    watch: Watch
    watch_many: WatchMany
    completions: Completions


@dataclass(frozen=True, slots=True)
class IntakeArea:
    """Intake of jobs, and the disk check that runs in the background."""

    disk: Disk
    intake: Intake


@dataclass(frozen=True, slots=True)
class SchedulesArea:
    """Schedules, and the leader lease under which they fire."""

    lease: LeaderLease
    repository: ScheduleRepository
    firing: Firing


@dataclass(frozen=True, slots=True)
class OperationsArea:
    """Operations on many jobs, and their execution by the leader."""

    repository: OperationRepository
    operator: Operator


@dataclass(frozen=True, slots=True)
class RetentionArea:
    """Retention rules of jobs and batches, and the sweep of jobs."""

    repository: RetentionRepository
    guard: RemovalGuard
    sweep: JobSweep


@dataclass(frozen=True, slots=True)
class StreamsArea:
    """Connectors, and RunStream calls of clients."""

    connectors: Connectors
    reports: Reports
    run_streams: RunStreams


async def build_shared(config: IngestConfig, stack: AsyncExitStack, access: Access | None = None) -> SharedComponents:
    """Return the components that the areas share, already started."""
    client = await stack.enter_async_context(mongo.connect(config.mongo))
    channel = await stack.enter_async_context(Channel(config.mesh))
    database = client[config.database]
    clock = await stack.enter_async_context(DatabaseClock(database))
    ulids = Ulids(lambda: milliseconds(clock()))
    storage = await stack.enter_async_context(StorageQuotas(channel))
    return SharedComponents(
        instance=Instance(f"{config.node}/{config.instance}", ulids.new(), clock, ulids.new, asyncio.Event()),
        channel=channel,
        database=database,
        clock=clock,
        jobs=database[JOBS],
        store=MongoJobs(database[JOBS]),
        storage=storage,
        payloads=Payloads(database, ClaimCheck(channel, config.database, time.monotonic, storage.mark_over_quota)),
        events=JobEvents(),
        access=access,
    )


def build_tenants(shared: SharedComponents) -> TenantsArea:
    """Return the tenants area."""
    return TenantsArea(
        TenantRepository(shared.database),
        PendingCounts(shared.jobs, time.monotonic),
        Buckets(shared.database, time.monotonic),
    )


def build_dispatch(config: IngestConfig, shared: SharedComponents, tenants: TenantsArea) -> DispatchArea:
    """Return the dispatch area."""
    instance, store, payloads = shared.instance, shared.store, shared.payloads
    model, results = RemoteModel(shared.channel), RemoteResults(shared.channel)
    gate, backlog = ModelGate(), JobBacklog(config.max_backlog)
    claims = Claims(
        store,
        instance,
        lease_ms=config.lease_ms,
        weight_of=tenants.repository.weight,
        ageing=timedelta(milliseconds=config.ageing_ms),
    )
    attempts = Attempts(
        model,
        payloads,
        gate=gate,
        memory=Budget(config.pending_bytes),
        clock=instance.clock,
        timeout_ms=config.attempt_timeout_ms,
        access=shared.access,
    )
    recorder = Recorder(store, results, payloads, shared.events, instance)
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
    lease_keeper = LeaseKeeper(
        store, claims, dispatcher, results, payloads, backlog, instance, renew_ms=config.renew_ms
    )
    cascade = Cascade(store, claims, dispatcher, shared.events, instance)
    return DispatchArea(model, backlog, claims, recorder, dispatcher, lease_keeper, cascade)


async def build_queries(
    config: IngestConfig, shared: SharedComponents, dispatch: DispatchArea, stack: AsyncExitStack
) -> QueriesArea:
    """Return the queries area, with the MongoDB client of its watches started."""
    ready = shared.instance.ready
    # Each filtered watch holds a connection. Their own client keeps the other pool free for jobs.
    watching = await stack.enter_async_context(
        mongo.connect(config.mongo, max_connections=config.max_filter_watches + 4)
    )
    jobs = Jobs(shared.jobs, shared.payloads)
    changes = ChangeFeed(
        shared.jobs, ready=ready, on_taken=dispatch.dispatcher.taken_over, max_watches=config.max_watches
    )
    return QueriesArea(
        jobs,
        changes,
        Watch(jobs, changes),
        WatchMany(watching[config.database][JOBS], config.max_filter_watches),
        Completions(shared.jobs, StoredResults(shared.channel), ready=ready),
    )


def build_intake(
    config: IngestConfig, shared: SharedComponents, tenants: TenantsArea, dispatch: DispatchArea
) -> IntakeArea:
    """Return the intake area."""
    disk = Disk(shared.database, config.min_free_disk_bytes)
    pressure = WritePressure(
        config.max_write_wait_ms / 1000,
        group_items=GROUP_ITEMS,
        group_bytes=GROUP_BYTES,
        clock=time.monotonic,
    )

    def node_limits(tenant: str) -> None:
        disk.admit()
        pressure.admit(tenant)
        dispatch.backlog.admit()

    limits = IntakeLimits(
        storage=shared.storage,
        admission=Admission(
            tenants.repository,
            tenants.pending,
            tenants.buckets,
            node_limits,
            dispatch.backlog.share,
        ),
        memory=TenantTurns(config.pending_bytes, leaves_room=True),
        pressure=pressure,
    )
    insert = DurableInsert(shared.store, dispatch.dispatcher, shared.events)
    intake = Intake(
        shared.store,
        shared.payloads,
        insert,
        limits,
        shared.instance,
        inline_bytes=config.inline_bytes,
        access=shared.access,
    )
    return IntakeArea(disk, intake)


def build_schedules(
    config: IngestConfig, shared: SharedComponents, intake: IntakeArea, queries: QueriesArea, canceller: JobCanceller
) -> SchedulesArea:
    """Return the schedules area."""
    instance = shared.instance
    lease = LeaderLease(
        shared.database[LEASES],
        "ingest",
        f"{instance.name} {instance.new_id()}",
        ready=instance.ready,
        ttl_ms=config.lease_ms,
        renew_ms=config.renew_ms,
    )
    firing = Firing(
        shared.database[SCHEDULES],
        lease,
        submit=intake.intake.submit_scheduled,
        find=intake.intake.by_key,
        read=queries.jobs.get,
        cancel=canceller.cancel,
        clock=instance.clock,
        ready=instance.ready,
    )
    return SchedulesArea(lease, ScheduleRepository(shared.database[SCHEDULES], instance.clock), firing)


def build_operations(
    shared: SharedComponents, schedules: SchedulesArea, canceller: JobCanceller, dead_letters: DeadLetters
) -> OperationsArea:
    """Return the operations area."""
    repository = OperationRepository(shared.database[JOB_OPERATIONS], shared.jobs, shared.clock)
    operator = Operator(
        repository,
        shared.jobs,
        canceller,
        dead_letters,
        shared.access,
        leads=lambda: schedules.lease.is_held,
        ready=shared.instance.ready,
    )
    return OperationsArea(repository, operator)


def build_retention(config: IngestConfig, shared: SharedComponents, schedules: SchedulesArea) -> RetentionArea:
    """Return the retention area."""
    repository = RetentionRepository(shared.database[JOB_RETENTION], config.retention)
    lease = schedules.lease
    guard = RemovalGuard(
        shared.database[MARKS],
        "jobs",
        ExpiredShare(shared.jobs, repository),
        clock=shared.clock,
        command="shoal jobs retention set succeeded 7d",
    )
    sweep = JobSweep(
        shared.jobs,
        shared.payloads,
        repository,
        leads=lambda: lease.is_held,
        clock=guard,
        ready=shared.instance.ready,
        round_s=config.retention_round_ms / 1_000,
        check=guard.check,
    )
    return RetentionArea(repository, guard, sweep)


def build_streams(
    config: IngestConfig, shared: SharedComponents, intake: IntakeArea, queries: QueriesArea
) -> StreamsArea:
    """Return the streams area."""
    instance = shared.instance
    configured = settings.read(config.connectors) if config.connectors is not None else {}
    context = ConnectorContext(instance.name, instance.clock, shared.database)
    connectors = Connectors(configured, intake.intake, queries.completions, context, ready=instance.ready)
    reports = Reports(
        shared.database[CONNECTORS],
        connectors.own,
        instance=instance.name,
        clock=instance.clock,
        ready=instance.ready,
    )
    run_streams = RunStreams(
        intake.intake,
        queries.completions,
        most=config.max_streams,
        items=config.run_items,
        all_items=config.run_items_together,
    )
    return StreamsArea(connectors, reports, run_streams)


async def build_metrics(
    shared: SharedComponents,
    tenants: TenantsArea,
    dispatch: DispatchArea,
    schedules: SchedulesArea,
    streams: StreamsArea,
    retention: RetentionArea,
    intake: IntakeArea,
    batches: Batches | None,
    stack: AsyncExitStack,
) -> IngestMetrics:
    """Return the metrics of the instance, started."""
    ages = await stack.enter_async_context(
        QueueAges(shared.store, tenants.pending.count, shared.clock, shared.instance.ready)
    )
    counts = JobCounts(shared.events)
    return IngestMetrics(
        counts,
        ages,
        dispatch.backlog,
        dispatch.dispatcher,
        streams.connectors,
        schedules.lease,
        dispatch.lease_keeper,
        schedules.firing,
        shared.clock,
        retention.guard,
        intake.disk,
        None if batches is None else batches.runner,
    )


def build_batches(
    config: IngestConfig, shared: SharedComponents, dispatch: DispatchArea, retention: RetentionArea
) -> Batches | None:
    """Return the batches; None without Arrow, which they require."""
    if find_spec("pyarrow") is None:
        return None
    from services.ingest.batches.app import Batches

    instance = shared.instance
    return Batches(
        config,
        shared.database,
        shared.channel,
        dispatch.model,
        retention.repository,
        clock=instance.clock,
        new_id=instance.new_id,
        ready=instance.ready,
        access=shared.access,
    )


def subscribe(events: JobEvents, dispatch: DispatchArea, queries: QueriesArea) -> None:
    """Subscribe to the events about jobs; subscribers of one event are called in this order."""
    events.changed.subscribe(queries.changes.notify, queries.completions.poke, dispatch.cascade.changed)
    events.recorded.subscribe(queries.completions.recorded)
    events.accepted.subscribe(dispatch.cascade.accepted)
    events.due_again.subscribe(dispatch.dispatcher.due_again, queries.changes.due_again, dispatch.cascade.accepted)
