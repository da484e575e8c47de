"""The parts of an ingest instance, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.cluster.membership import Registration, State
from mesh.mongo import Document
from mesh.mongo_lease import LEASE_VALIDATOR, LEASES
from mesh.process.signals import until_stopped
from mesh.process.tasks import end, log_failure
from mesh.rpc.server import Server
from services.ingest import areas
from services.ingest.areas import (
    Ground,
    IntakeArea,
    ReadingArea,
    RetentionArea,
    SchedulesArea,
    StreamsArea,
    TenantsArea,
)
from services.ingest.config import IngestConfig
from services.ingest.connectors import checkpoints
from services.ingest.connectors import reports as connector_reports
from services.ingest.connectors.reports import CONNECTORS
from services.ingest.dead_letters.dead_letters import DeadLetters
from services.ingest.dispatch.cancel import Cancelling
from services.ingest.dispatch.claims import Claims
from services.ingest.documents import INDEXES, JOBS, PAYLOAD_VALIDATOR, PAYLOADS, VALIDATOR
from services.ingest.fast_submit import SUBMIT, FastSubmit
from services.ingest.retention.retention_repository import JOB_RETENTION
from services.ingest.retention.retention_repository import VALIDATOR as RETENTION_VALIDATOR
from services.ingest.rpc import IngestRpc, rpc
from services.ingest.schedules.documents import INDEXES as SCHEDULE_INDEXES
from services.ingest.schedules.documents import SCHEDULES
from services.ingest.schedules.documents import VALIDATOR as SCHEDULE_VALIDATOR
from services.ingest.tenants.tenant_status import TenantStatuses
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from services.ingest.batches.app import Batches

log = logging.getLogger(__name__)

_RETRY_S = 0.5


async def run(config: IngestConfig) -> None:
    """Serve until a signal stops it. MongoDB, etcd and the mesh may be unavailable, at the start and later."""
    async with AsyncExitStack() as stack:
        ground = await areas.build_ground(config, stack)
        tenants = areas.build_tenants(ground)
        dispatch = areas.build_dispatch(config, ground, tenants)
        reading = await areas.build_reading(config, ground, dispatch, stack)
        cancelling = Cancelling(reading.jobs, dispatch.claims, dispatch.dispatcher, reading.watch, ground.clock)
        dead_letters = DeadLetters(ground.store, reading.jobs, ground.payloads, ground.events, ground.instance)
        intake = areas.build_intake(config, ground, tenants, dispatch)
        schedules = areas.build_schedules(config, ground, intake, reading, cancelling)
        retention = areas.build_retention(config, ground, schedules)
        streams = areas.build_streams(config, ground, intake, reading)
        batches = areas.build_batches(config, ground, dispatch, retention)
        areas.subscribe(ground.events, dispatch, reading)
        servicer = _servicer(
            config, ground, tenants, dead_letters, cancelling, intake, reading, schedules, retention, streams, batches
        )
        # What starts last stops first. Leases are renewed until the last job is released, so the keeper outlives the
        # dispatcher; both outlive the server, whose last calls may need them.
        parts: tuple[AbstractAsyncContextManager[object], ...] = (
            tenants.book,
            intake.disk,
            dispatch.recorder,
            reading.changes,
            dispatch.keeper,
            dispatch.dispatcher,
            dispatch.cascade,
            intake.intake,
            schedules.lease,
            schedules.firing,
            retention.sweep,
            reading.endings,
            streams.connectors,
            streams.reports,
        )
        for part in parts:
            await stack.enter_async_context(part)
        if batches is not None:
            await stack.enter_async_context(batches)
        server = await stack.enter_async_context(
            Server(
                config.listen,
                [rpc(servicer)],
                drain_ms=config.drain_ms,
                fast_methods={SUBMIT: FastSubmit(intake.intake)},
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


def _servicer(
    config: IngestConfig,
    ground: Ground,
    tenants: TenantsArea,
    dead_letters: DeadLetters,
    cancelling: Cancelling,
    intake: IntakeArea,
    reading: ReadingArea,
    schedules: SchedulesArea,
    retention: RetentionArea,
    streams: StreamsArea,
    batches: Batches | None,
) -> IngestRpc:
    return IngestRpc(
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
        TenantStatuses(ground.jobs, tenants.book, tenants.pending),
        streams.run_streams,
        streams.reports,
        stream_items=config.stream_items,
        stream_bytes=config.stream_bytes,
    )


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
            await mongo.ensure_collection(database, LEASES, validator=LEASE_VALIDATOR, indexes=[])
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
