"""The parts of an ingest instance, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.h2.client.channel import Channel
from mesh.membership import Registration, State
from mesh.mongo import Document
from mesh.server import until_stopped
from mesh.serving import server as server_of
from mesh.tasks import end, log_failure
from services.ingest.clock import DatabaseClock, milliseconds
from services.ingest.config import IngestConfig
from services.ingest.connectors import checkpoints, settings
from services.ingest.connectors import reports as connector_reports
from services.ingest.connectors.connectors import Connectors, Place
from services.ingest.connectors.reports import CONNECTORS, Reports
from services.ingest.connectors.run_stream import RunStreams
from services.ingest.dead_letters.dead_letters import DeadLetters
from services.ingest.dependencies.cascade import Cascade
from services.ingest.dispatch.attempt import Attempts
from services.ingest.dispatch.cancel import Cancelling
from services.ingest.dispatch.claims import Claims
from services.ingest.dispatch.dispatcher import Dispatcher
from services.ingest.dispatch.gate import Gate
from services.ingest.dispatch.keeper import Keeper
from services.ingest.dispatch.recorder import Recorder
from services.ingest.dispatch.remote import RemoteModel, RemoteResults
from services.ingest.documents import INDEXES, JOBS, PAYLOAD_VALIDATOR, PAYLOADS, VALIDATOR
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
from services.ingest.leading import LEAD_VALIDATOR, LEADS, Lead
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.reading.answers import StoredAnswers
from services.ingest.reading.endings import Endings
from services.ingest.reading.jobs import Jobs
from services.ingest.reading.watch import Changes, Watch
from services.ingest.reading.watch_many import WatchMany
from services.ingest.retention.book import JOB_RETENTION
from services.ingest.retention.book import VALIDATOR as RETENTION_VALIDATOR
from services.ingest.retention.book import Book as RetentionBook
from services.ingest.retention.sweep import Sweep
from services.ingest.rpc import IngestRpc, rpc
from services.ingest.schedules.book import Schedules
from services.ingest.schedules.documents import INDEXES as SCHEDULE_INDEXES
from services.ingest.schedules.documents import SCHEDULES
from services.ingest.schedules.documents import VALIDATOR as SCHEDULE_VALIDATOR
from services.ingest.schedules.firing import Firing
from services.ingest.short import SUBMIT, ShortSubmit
from services.ingest.tenants.admission import Admission
from services.ingest.tenants.book import Book
from services.ingest.tenants.bucket import Buckets
from services.ingest.tenants.pending import Pending
from services.ingest.tenants.reading import Standings
from services.ingest.ulid import Ulids
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from services.ingest.batches.room import Batches

log = logging.getLogger(__name__)

_RETRY_S = 0.5


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

    book: Book
    pending: Pending
    buckets: Buckets


@dataclass(frozen=True, slots=True)
class DispatchArea:
    """Dispatch: claims, attempts, records, leases and dependencies."""

    model: RemoteModel
    backlog: Backlog
    claims: Claims
    recorder: Recorder
    dispatcher: Dispatcher
    keeper: Keeper
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
    """Schedules, and the lead that they are fired under."""

    lead: Lead
    book: Schedules
    firing: Firing


@dataclass(frozen=True, slots=True)
class RetentionArea:
    """Retention of jobs and batches."""

    book: RetentionBook
    sweep: Sweep


@dataclass(frozen=True, slots=True)
class StreamsArea:
    """Connectors and clients' streams."""

    connectors: Connectors
    reports: Reports
    run_streams: RunStreams


async def run(config: IngestConfig) -> None:
    """Serve until a signal stops it. MongoDB, etcd and the mesh may be unavailable, at the start and later."""
    async with AsyncExitStack() as stack:
        ground = await _ground(config, stack)
        tenants = _tenants(ground)
        dispatch = _dispatch(config, ground, tenants)
        reading = await _reading(config, ground, dispatch, stack)
        cancelling = Cancelling(reading.jobs, dispatch.claims, dispatch.dispatcher, reading.watch, ground.clock)
        dead_letters = DeadLetters(ground.store, reading.jobs, ground.payloads, ground.events, ground.instance)
        intake = _intake(config, ground, tenants, dispatch)
        schedules = _schedules(config, ground, intake, reading, cancelling)
        retention = _retention(config, ground, schedules)
        streams = _streams(config, ground, intake, reading)
        batches = _batches(config, ground, dispatch, retention)
        _subscribe(ground.events, dispatch, reading)
        servicer = IngestRpc(
            intake.intake,
            reading.jobs,
            reading.watch,
            cancelling,
            dead_letters,
            schedules.book,
            retention.book,
            reading.watch_many,
            batches,
            tenants.book,
            Standings(ground.jobs, tenants.book, tenants.pending),
            streams.run_streams,
            streams.reports,
            stream_items=config.stream_items,
            stream_bytes=config.stream_bytes,
        )
        # What starts last stops first. Leases are renewed until the last job is released, so the keeper outlives the
        # dispatcher; both outlive the server, whose last calls may need them.
        await stack.enter_async_context(tenants.book)
        await stack.enter_async_context(intake.disk)
        await stack.enter_async_context(dispatch.recorder)
        await stack.enter_async_context(reading.changes)
        await stack.enter_async_context(dispatch.keeper)
        await stack.enter_async_context(dispatch.dispatcher)
        await stack.enter_async_context(dispatch.cascade)
        await stack.enter_async_context(intake.intake)
        await stack.enter_async_context(schedules.lead)
        await stack.enter_async_context(schedules.firing)
        await stack.enter_async_context(retention.sweep)
        await stack.enter_async_context(reading.endings)
        await stack.enter_async_context(streams.connectors)
        await stack.enter_async_context(streams.reports)
        if batches is not None:
            await stack.enter_async_context(batches)
        server = await stack.enter_async_context(
            server_of(
                config.listen,
                [rpc(servicer)],
                drain_ms=config.drain_ms,
                front=config.front,
                short={SUBMIT: ShortSubmit(intake.intake)},
            )
        )
        registration = await stack.enter_async_context(Registration.of(config, "ingest", server.address))

        async def start() -> None:
            await _prepare(ground, dispatch.claims, tenants, batches)
            intake.disk.open()
            intake.intake.open()
            ground.instance.ready.set()
            await server.serve()
            await registration.update(state=State.READY)
            log.info("serving at %s", server.address)

        starting = asyncio.create_task(start(), name="start")
        starting.add_done_callback(log_failure)
        stack.push_async_callback(end, starting)
        await until_stopped()
        dispatch.dispatcher.stop_claiming()
        if batches is not None:
            batches.stop()


async def _ground(config: IngestConfig, stack: AsyncExitStack) -> Ground:
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


def _tenants(ground: Ground) -> TenantsArea:
    return TenantsArea(
        Book(ground.database), Pending(ground.jobs, time.monotonic), Buckets(ground.database, time.monotonic)
    )


def _dispatch(config: IngestConfig, ground: Ground, tenants: TenantsArea) -> DispatchArea:
    instance, store, payloads = ground.instance, ground.store, ground.payloads
    model, results = RemoteModel(ground.channel), RemoteResults(ground.channel)
    gate, backlog = Gate(), Backlog(config.max_backlog)
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
    keeper = Keeper(store, claims, dispatcher, results, payloads, backlog, instance, renew_ms=config.renew_ms)
    cascade = Cascade(store, claims, dispatcher, ground.events, instance)
    return DispatchArea(model, backlog, claims, recorder, dispatcher, keeper, cascade)


async def _reading(config: IngestConfig, ground: Ground, dispatch: DispatchArea, stack: AsyncExitStack) -> ReadingArea:
    ready = ground.instance.ready
    # Each watch with a filter holds a connection of its own: they must never take those that jobs need.
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


def _intake(config: IngestConfig, ground: Ground, tenants: TenantsArea, dispatch: DispatchArea) -> IntakeArea:
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


def _schedules(
    config: IngestConfig, ground: Ground, intake: IntakeArea, reading: ReadingArea, cancelling: Cancelling
) -> SchedulesArea:
    instance = ground.instance
    lead = Lead(
        ground.database[LEADS],
        f"{instance.name} {instance.new_id()}",
        ready=instance.ready,
        ttl_ms=config.lease_ms,
        renew_ms=config.renew_ms,
    )
    firing = Firing(
        ground.database[SCHEDULES],
        lead,
        submit=intake.intake.submit_scheduled,
        find=intake.intake.by_key,
        read=reading.jobs.get,
        cancel=cancelling.cancel,
        clock=instance.clock,
        ready=instance.ready,
    )
    return SchedulesArea(lead, Schedules(ground.database[SCHEDULES], instance.clock), firing)


def _retention(config: IngestConfig, ground: Ground, schedules: SchedulesArea) -> RetentionArea:
    book = RetentionBook(ground.database[JOB_RETENTION], config.retention)
    lead = schedules.lead
    sweep = Sweep(
        ground.jobs,
        ground.payloads,
        book,
        leads=lambda: lead.token is not None,
        clock=ground.clock,
        ready=ground.instance.ready,
        round_s=config.retention_round_ms / 1_000,
    )
    return RetentionArea(book, sweep)


def _streams(config: IngestConfig, ground: Ground, intake: IntakeArea, reading: ReadingArea) -> StreamsArea:
    instance = ground.instance
    configured = settings.read(config.connectors) if config.connectors is not None else {}
    place = Place(instance.name, instance.clock, ground.database)
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


def _batches(config: IngestConfig, ground: Ground, dispatch: DispatchArea, retention: RetentionArea) -> Batches | None:
    """Return the batches; None where Arrow, which they need, is not installed."""
    if find_spec("pyarrow") is None:
        return None
    from services.ingest.batches.room import Batches

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


def _subscribe(events: JobEvents, dispatch: DispatchArea, reading: ReadingArea) -> None:
    """Connect those that write jobs with those that act on it; all that hear of an event, in their order."""
    events.changed.subscribe(reading.changes.poke, reading.endings.poke, dispatch.cascade.changed)
    events.recorded.subscribe(reading.endings.recorded)
    events.accepted.subscribe(dispatch.cascade.accepted)
    events.due_again.subscribe(dispatch.dispatcher.due_again, reading.changes.due_again, dispatch.cascade.accepted)


async def _prepare(ground: Ground, claims: Claims, tenants: TenantsArea, batches: Batches | None) -> None:
    """Makes the collections, and takes up what an earlier process of this name left behind. Tries until it succeeds."""
    database = ground.database
    while True:
        try:
            # Before any lease of others is judged.
            await ground.clock.look()
            await mongo.ensure_collection(database, PAYLOADS, validator=PAYLOAD_VALIDATOR, indexes=[])
            await _prepare_connectors(database)
            await mongo.ensure_collection(database, JOB_RETENTION, validator=RETENTION_VALIDATOR, indexes=[])
            await mongo.ensure_collection(database, LEADS, validator=LEAD_VALIDATOR, indexes=[])
            await mongo.ensure_collection(database, SCHEDULES, validator=SCHEDULE_VALIDATOR, indexes=SCHEDULE_INDEXES)
            await mongo.ensure_collection(database, JOBS, validator=VALIDATOR, indexes=INDEXES)
            await tenants.book.open()
            await tenants.buckets.open()
            if lined_up := await claims.line_up():
                log.info("%d jobs of an earlier version were lined up", lined_up)
            if left := await claims.inherit():
                log.warning("an earlier process of this name left %d jobs: they are taken up", left)
            if batches is not None and (chunks := await batches.prepare()):
                log.warning("an earlier process of this name left %d chunks of batches: they are taken up", chunks)
            return
        except ShoalError as err:
            log.warning("not ready yet: %s", err)
            await asyncio.sleep(_RETRY_S)


async def _prepare_connectors(database: AsyncDatabase[Document]) -> None:
    for name, validator, indexes in (
        (checkpoints.CHECKPOINTS, checkpoints.VALIDATOR, ()),
        (CONNECTORS, connector_reports.VALIDATOR, connector_reports.INDEXES),
    ):
        await mongo.ensure_collection(database, name, validator=validator, indexes=indexes)
