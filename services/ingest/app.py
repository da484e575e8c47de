"""Composition of an ingest instance: its components, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.cluster.membership import Registration, State
from mesh.metrics.families import Source
from mesh.mongo import Document
from mesh.mongo_lease import LEASE_VALIDATOR, LEASES
from mesh.process.signals import until_stopped
from mesh.process.tasks import end, log_failure
from mesh.removal_guard import MARK_VALIDATOR, MARKS
from mesh.rpc import span_listing
from mesh.rpc.access import Access
from mesh.rpc.auditing import auditing_of
from mesh.rpc.cluster_access import access_of, published
from mesh.rpc.fast_call import admitted
from mesh.rpc.held_shares import HeldShares
from mesh.rpc.server import Server
from mesh.rpc.tenant_scope import Scopes
from services.ingest import areas
from services.ingest.areas import SharedComponents, TenantsArea
from services.ingest.config import IngestConfig
from services.ingest.connectors import checkpoints
from services.ingest.connectors import reports as connector_reports
from services.ingest.connectors.reports import CONNECTORS
from services.ingest.dead_letters.dead_letters import DeadLetters
from services.ingest.dispatch.cancel import JobCanceller
from services.ingest.dispatch.claims import Claims
from services.ingest.documents import (
    JOBS,
    LATER_INDEXES,
    NEEDED_INDEXES,
    PAYLOAD_VALIDATOR,
    PAYLOADS,
    RETIRED_INDEXES,
    VALIDATOR,
)
from services.ingest.fast_submit import FastSubmit
from services.ingest.operations.operation_repository import INDEXES as OPERATION_INDEXES
from services.ingest.operations.operation_repository import JOB_OPERATIONS
from services.ingest.operations.operation_repository import VALIDATOR as OPERATION_VALIDATOR
from services.ingest.rest import rest_app
from services.ingest.retention.retention_repository import JOB_RETENTION
from services.ingest.retention.retention_repository import VALIDATOR as RETENTION_VALIDATOR
from services.ingest.rpc import SERVICE, IngestRpc, RpcComponents, rpc
from services.ingest.schedules.documents import INDEXES as SCHEDULE_INDEXES
from services.ingest.schedules.documents import RETIRED_INDEXES as RETIRED_SCHEDULE_INDEXES
from services.ingest.schedules.documents import SCHEDULES
from services.ingest.schedules.documents import VALIDATOR as SCHEDULE_VALIDATOR
from services.ingest.tenants.tenant_status import TenantStatuses
from shoal.access.limits import Kind
from shoal.access.rpc_groups import SUBMIT
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from services.ingest.batches.app import Batches

log = logging.getLogger(__name__)

_RETRY_S = 0.5


async def run(config: IngestConfig, access: Access | None = None) -> None:
    """Serve until a signal. MongoDB, etcd and the mesh may be unavailable, at the start and later.

    `access` decides about callers and models, unless the configuration asks for the policy of the cluster. None: every
    caller may call every method.
    """
    async with AsyncExitStack() as stack:
        # The rows of a job, and what is in flight while it runs, are counted in infer.
        shares = HeldShares((Kind.REQUESTS, Kind.IN_FLIGHT, Kind.BYTES), (Kind.IN_FLIGHT, Kind.ROWS))
        watch = await stack.enter_async_context(access_of(config, shares))
        access = access if watch is None else watch.access
        shared = await areas.build_shared(config, stack, access)
        tenants = areas.build_tenants(shared)
        dispatch = areas.build_dispatch(config, shared, tenants)
        queries = await areas.build_queries(config, shared, dispatch, stack)
        canceller = JobCanceller(queries.jobs, dispatch.claims, dispatch.dispatcher, queries.watch, shared.clock)
        dead_letters = DeadLetters(shared.store, queries.jobs, shared.payloads, shared.events, shared.instance)
        intake = areas.build_intake(config, shared, tenants, dispatch)
        schedules = areas.build_schedules(config, shared, intake, queries, canceller)
        operations = areas.build_operations(shared, schedules, canceller, dead_letters)
        retention = areas.build_retention(config, shared, schedules)
        streams = areas.build_streams(config, shared, intake, queries)
        batches = areas.build_batches(config, shared, dispatch, retention)
        areas.subscribe(shared.events, dispatch, queries)
        scopes = Scopes(SERVICE, access)
        servicer = IngestRpc(
            RpcComponents(
                new_id=shared.instance.new_id,
                intake=intake.intake,
                jobs=queries.jobs,
                watch=queries.watch,
                watch_many=queries.watch_many,
                canceller=canceller,
                dead_letters=dead_letters,
                operations=operations.repository,
                schedules=schedules.repository,
                retention=retention.repository,
                tenants=tenants.repository,
                tenant_statuses=TenantStatuses(shared.jobs, tenants.repository, tenants.pending),
                batches=batches,
                run_streams=streams.run_streams,
                reports=streams.reports,
            ),
            scopes,
            stream_items=config.stream_items,
            stream_bytes=config.stream_bytes,
        )
        # The last to start stops first. Leases are renewed until the last job is released, so the lease keeper outlives
        # the dispatcher. Both outlive the server, whose last calls may need them.
        components: tuple[AbstractAsyncContextManager[object], ...] = (
            tenants.repository,
            intake.disk,
            dispatch.recorder,
            queries.jobs,
            queries.changes,
            dispatch.lease_keeper,
            dispatch.dispatcher,
            dispatch.cascade,
            intake.intake,
            schedules.lease,
            schedules.firing,
            operations.operator,
            retention.sweep,
            queries.completions,
            streams.connectors,
            streams.reports,
        )
        for component in components:
            await stack.enter_async_context(component)
        if batches is not None:
            await stack.enter_async_context(batches)
        auditing = await stack.enter_async_context(auditing_of(config, access))
        sources: list[Source] = []
        if config.metrics is not None:
            metrics = await areas.build_metrics(
                shared, tenants, dispatch, schedules, streams, retention, intake, batches, stack
            )
            sources += [metrics.read, shares.refused.read]
        server = await stack.enter_async_context(
            Server(
                config.listen,
                [rpc(servicer)],
                drain_ms=config.drain_ms,
                fast_methods=admitted({SUBMIT: FastSubmit(intake.intake, scopes)}, access),
                body_bytes=config.body_bytes,
                unread_bytes=config.unread_bytes,
                access=access,
                auditing=auditing,
                metrics=config.metrics,
                methods=span_listing.methods(),
                exports_as=("ingest", f"{config.node}/{config.instance}"),
                sources=sources,
                http=rest_app,
            )
        )
        registration = await stack.enter_async_context(Registration.of(config, "ingest", server.address))
        await stack.enter_async_context(published(watch, registration))

        async def start() -> None:
            await _prepare(shared, dispatch.claims, tenants, batches)
            intake.disk.open()
            intake.intake.open()
            shared.instance.ready.set()
            await server.serve()
            await registration.update(state=State.READY)
            log.info("serving at %(address)s", {"event": "service.serving", "address": server.address})
            await mongo.build_later_indexes(
                shared.jobs, LATER_INDEXES, RETIRED_INDEXES, meanwhile="lists of jobs are slow"
            )

        starting = asyncio.create_task(start(), name="start")
        starting.add_done_callback(log_failure)
        stack.push_async_callback(end, starting)
        await until_stopped()
        dispatch.dispatcher.stop_claiming()
        if batches is not None:
            batches.stop()


async def _prepare(shared: SharedComponents, claims: Claims, tenants: TenantsArea, batches: Batches | None) -> None:
    """Create the collections, and recover the work of an earlier process of this name. Retries until it succeeds."""
    database = shared.database
    while True:
        try:
            # Before this instance decides whether leases of others have lapsed.
            await shared.clock.synchronize()
            await mongo.ensure_collection(database, PAYLOADS, validator=PAYLOAD_VALIDATOR, indexes=[])
            await _prepare_connectors(database)
            await mongo.ensure_collection(
                database, JOB_OPERATIONS, validator=OPERATION_VALIDATOR, indexes=OPERATION_INDEXES
            )
            await mongo.ensure_collection(database, JOB_RETENTION, validator=RETENTION_VALIDATOR, indexes=[])
            await mongo.ensure_collection(database, LEASES, validator=LEASE_VALIDATOR, indexes=[])
            await mongo.ensure_collection(database, MARKS, validator=MARK_VALIDATOR, indexes=[])
            await mongo.ensure_collection(
                database,
                SCHEDULES,
                validator=SCHEDULE_VALIDATOR,
                indexes=SCHEDULE_INDEXES,
                retired=RETIRED_SCHEDULE_INDEXES,
            )
            await mongo.ensure_collection(database, JOBS, validator=VALIDATOR, indexes=NEEDED_INDEXES)
            await tenants.repository.open()
            await tenants.buckets.open()
            if migrated := await claims.add_tenant_queues():
                log.info(
                    "set the tenant queues of %(jobs)d jobs of an earlier version",
                    {"event": "jobs.migrated", "jobs": migrated},
                )
            if recovered := await claims.expire_inherited():
                log.warning(
                    "recovering %(jobs)d jobs that an earlier process of this instance held",
                    {"event": "jobs.recovering", "jobs": recovered},
                )
            if batches is not None and (chunks := await batches.prepare()):
                log.warning(
                    "recovering %(chunks)d batch chunks that an earlier process of this instance held",
                    {"event": "batch.recovering_chunks", "chunks": chunks},
                )
            return
        except ShoalError as err:
            log.warning("not ready yet: %(error)s", {"event": "service.not_ready", "error": err})
            await asyncio.sleep(_RETRY_S)


async def _prepare_connectors(database: AsyncDatabase[Document]) -> None:
    for name, validator, indexes in (
        (checkpoints.CHECKPOINTS, checkpoints.VALIDATOR, ()),
        (CONNECTORS, connector_reports.VALIDATOR, connector_reports.INDEXES),
    ):
        await mongo.ensure_collection(database, name, validator=validator, indexes=indexes)
