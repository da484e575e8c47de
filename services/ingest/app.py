"""The parts of an ingest instance, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.h2.client.channel import Channel
from mesh.membership import Registration, State
from mesh.mongo import Document
from mesh.mongo_lease import LEASE_VALIDATOR, LEASES, LeaderLease
from mesh.rpc.server import Server
from mesh.signals import until_stopped
from mesh.tasks import end, log_failure
from services.ingest.batches.door import batches_class
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
from services.ingest.intake.backlog import Backlog
from services.ingest.intake.budget import Budget
from services.ingest.intake.claim_check import ClaimCheck
from services.ingest.intake.disk import Disk
from services.ingest.intake.intake import GROUP_BYTES, GROUP_ITEMS, Intake
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.pressure import Pressure
from services.ingest.intake.storage import Storage
from services.ingest.job import Job
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
from services.ingest.short import SUBMIT, FastSubmit
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


async def run(config: IngestConfig) -> None:
    """Serves until it is told to stop. MongoDB, etcd, the mesh and what is behind it may be away, now or later."""
    name = f"{config.node}/{config.instance}"
    ready = asyncio.Event()
    gate = Gate()
    backlog = Backlog(config.max_backlog)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(mongo.connect(config.mongo))
        channel = await stack.enter_async_context(Channel(config.mesh))
        database = client[config.database]
        clock = await stack.enter_async_context(DatabaseClock(database))
        ulids = Ulids(lambda: milliseconds(clock()))
        documents = database[JOBS]
        storage = await stack.enter_async_context(Storage(channel))
        payloads = Payloads(database, ClaimCheck(channel, config.database, time.monotonic, storage.heard))
        results = RemoteResults(channel)
        jobs = Jobs(documents, payloads)
        book = Book(database)
        pending = Pending(documents, time.monotonic)
        buckets = Buckets(database, time.monotonic)
        disk = Disk(database, config.min_free_disk_bytes)
        pressure = Pressure(
            config.max_write_wait_ms / 1000,
            group_items=GROUP_ITEMS,
            group_bytes=GROUP_BYTES,
            clock=time.monotonic,
        )
        claims = Claims(
            documents,
            clock=clock,
            new_id=ulids.new,
            owner=name,
            process=ulids.new(),
            lease_ms=config.lease_ms,
            weight_of=book.weight,
            ageing=timedelta(milliseconds=config.ageing_ms),
        )
        model = RemoteModel(channel)
        attempts = Attempts(
            model,
            payloads,
            gate=gate,
            memory=Budget(config.pending_bytes, "requests being run"),
            clock=clock,
            timeout_ms=config.attempt_timeout_ms,
        )
        endings = Endings(documents, StoredAnswers(channel), ready=ready)
        recorder = Recorder(
            documents,
            results,
            payloads,
            clock=clock,
            instance=name,
            on_change=lambda job_id: moved(job_id),
            on_recorded=endings.recorded,
        )
        dispatcher = Dispatcher(
            claims,
            attempts,
            recorder,
            gate=gate,
            backlog=backlog,
            clock=clock,
            instance=name,
            ready=ready,
            max_in_flight=config.max_in_flight,
            poll_ms=config.poll_ms,
            drain_ms=config.drain_ms,
        )
        changes = Changes(documents, ready=ready, on_taken=dispatcher.taken, max_watches=config.max_watches)
        watch = Watch(jobs, changes)

        def moved(job_id: str) -> None:
            changes.poke(job_id)
            endings.poke(job_id)
            cascade.changed(job_id)

        keeper = Keeper(
            documents,
            claims,
            dispatcher,
            results,
            payloads,
            backlog,
            clock=clock,
            ready=ready,
            renew_ms=config.renew_ms,
        )

        intake = Intake(
            documents,
            payloads,
            backlog=backlog,
            storage=storage,
            admission=Admission(book, pending, buckets, gates=[disk.admit, pressure.admit, backlog.admit]),
            pressure=pressure,
            budget=Budget(config.pending_bytes, "submitted requests"),
            clock=clock,
            ulids=ulids,
            instance=name,
            inline_bytes=config.inline_bytes,
            takers=dispatcher,
            on_accepted=lambda accepted: cascade.accepted(accepted),
        )
        configured = settings.read(config.connectors) if config.connectors is not None else {}
        connectors = Connectors(configured, intake, endings, Place(name, clock, database), ready=ready)
        cancelling = Cancelling(jobs, claims, dispatcher, watch, clock)

        def due_again(again: Sequence[Job]) -> None:
            backlog.added(len(again))
            claims.notice(again)
            for job in again:
                changes.poke(job.id)
            dispatcher.wake()
            cascade.accepted(again)

        cascade = Cascade(documents, claims, dispatcher, clock=clock, instance=name, ready=ready, on_released=due_again)

        dead_letters = DeadLetters(documents, jobs, payloads, clock=clock, instance=name, on_requeued=due_again)
        lease = LeaderLease(
            database[LEASES],
            "ingest",
            f"{name} {ulids.new()}",
            ready=ready,
            ttl_ms=config.lease_ms,
            renew_ms=config.renew_ms,
        )
        schedules = Schedules(database[SCHEDULES], clock)
        firing = Firing(
            database[SCHEDULES],
            lease,
            submit=intake.submit_scheduled,
            find=intake.by_key,
            read=jobs.get,
            cancel=cancelling.cancel,
            clock=clock,
            ready=ready,
        )
        retention = RetentionBook(database[JOB_RETENTION], config.retention)
        sweep = Sweep(
            documents,
            payloads,
            retention,
            leads=lambda: lease.is_held,
            clock=clock,
            ready=ready,
            round_s=config.retention_round_ms / 1_000,
        )
        watching = await stack.enter_async_context(
            mongo.connect(config.mongo, max_connections=config.max_filter_watches + 4)
        )
        watch_many = WatchMany(watching[config.database][JOBS], config.max_filter_watches)
        reports = Reports(database[CONNECTORS], connectors.own, instance=name, clock=clock, ready=ready)
        run_streams = RunStreams(
            intake, endings, most=config.max_streams, items=config.run_items, all_items=config.run_items_together
        )
        batches = None
        if (made := batches_class()) is not None:
            batches = made(config, database, channel, model, retention, clock=clock, new_id=ulids.new, ready=ready)
        servicer = IngestRpc(
            intake,
            jobs,
            watch,
            cancelling,
            dead_letters,
            schedules,
            retention,
            watch_many,
            batches,
            book,
            Standings(documents, book, pending),
            run_streams,
            reports,
            stream_items=config.stream_items,
            stream_bytes=config.stream_bytes,
        )
        # What starts last stops first. Leases are renewed until the last job is let go, so the keeper outlives the
        # dispatcher; both outlive the server, whose last calls may need them.
        await stack.enter_async_context(book)
        await stack.enter_async_context(disk)
        await stack.enter_async_context(recorder)
        await stack.enter_async_context(changes)
        await stack.enter_async_context(keeper)
        await stack.enter_async_context(dispatcher)
        await stack.enter_async_context(cascade)
        await stack.enter_async_context(intake)
        await stack.enter_async_context(lease)
        await stack.enter_async_context(firing)
        await stack.enter_async_context(sweep)
        await stack.enter_async_context(endings)
        await stack.enter_async_context(connectors)
        await stack.enter_async_context(reports)
        if batches is not None:
            await stack.enter_async_context(batches)
        server = await stack.enter_async_context(
            Server(
                config.listen,
                [rpc(servicer)],
                drain_ms=config.drain_ms,
                fast_methods={SUBMIT: FastSubmit(intake)},
            )
        )
        registration = await stack.enter_async_context(Registration.of(config, "ingest", server.address))

        async def start() -> None:
            await _prepare(database, clock, claims, batches, book, buckets)
            disk.open()
            intake.open()
            ready.set()
            await server.serve()
            await registration.update(state=State.READY)
            log.info("serving at %s", server.address)

        starting = asyncio.create_task(start(), name="start")
        starting.add_done_callback(log_failure)
        stack.push_async_callback(end, starting)
        await until_stopped()
        dispatcher.stop_claiming()
        if batches is not None:
            batches.stop()


async def _prepare(
    database: AsyncDatabase[Document],
    clock: DatabaseClock,
    claims: Claims,
    batches: Batches | None,
    book: Book,
    buckets: Buckets,
) -> None:
    """Makes the collections, and takes up what an earlier process of this name left behind. Tries until it succeeds."""
    while True:
        try:
            await clock.look()  # Before any lease of others is judged.
            await mongo.ensure_collection(database, PAYLOADS, validator=PAYLOAD_VALIDATOR, indexes=[])
            await _prepare_connectors(database)
            await mongo.ensure_collection(database, JOB_RETENTION, validator=RETENTION_VALIDATOR, indexes=[])
            await mongo.ensure_collection(database, LEASES, validator=LEASE_VALIDATOR, indexes=[])
            await mongo.ensure_collection(database, SCHEDULES, validator=SCHEDULE_VALIDATOR, indexes=SCHEDULE_INDEXES)
            await mongo.ensure_collection(database, JOBS, validator=VALIDATOR, indexes=INDEXES)
            await book.open()
            await buckets.open()
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
