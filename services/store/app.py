"""Wiring of the store service. Components stop in the reverse order of their start."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import AsyncExitStack
from datetime import timedelta

from mesh import mongo
from mesh.cluster.membership import Registration, State
from mesh.mongo_clock import DatabaseClock, utc_now
from mesh.mongo_lease import LEASES, LeaderLease
from mesh.process.signals import until_stopped
from mesh.process.threads import Threads
from mesh.removal_guard import MARKS, RemovalGuard
from mesh.rpc import span_listing
from mesh.rpc.access import Access
from mesh.rpc.auditing import Auditing
from mesh.rpc.cluster_access import access_of, published
from mesh.rpc.fast_call import admitted
from mesh.rpc.server import Rpc, Server
from mesh.rpc.task_methods import TaskMethods
from mesh.rpc.tenant_scope import Scopes
from services.store.artifact_rpc import ArtifactParts
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.opening import open_blobs
from services.store.artifacts.staging import Staging
from services.store.artifacts.staging_sweep import StagingSweep
from services.store.audit.anchors import Anchors
from services.store.audit.chain import AuditChain
from services.store.audit.rounds import AuditRounds
from services.store.audit.verification import AuditVerification
from services.store.backups.backup import Backup
from services.store.backups.locations import BackupLocations
from services.store.backups.restore import Restore
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.exports.exports import Exports
from services.store.exports.locations import ExportLocations
from services.store.garbage.collector import Collector
from services.store.garbage.references import References
from services.store.garbage.rounds import CollectorRounds
from services.store.garbage.verification import Verification
from services.store.metrics import RecordedCount, StoreMetrics
from services.store.registry.registry import Registry
from services.store.registry.registry_watch import RegistryWatch
from services.store.replica_set import ReplicaSet
from services.store.rest import rest_app
from services.store.results.large_responses import LargeResponses
from services.store.results.result_stream import ResultStream
from services.store.results.result_watch import ResultWatch
from services.store.results.results import Results
from services.store.retention.expired_share import ExpiredShare
from services.store.retention.rounds import LEASE_MS, RENEW_MS, RetentionRounds
from services.store.retention.rule_repository import RuleRepository
from services.store.retention.sweep import Sweep
from services.store.rpc import SERVICE, AuditParts, StoreRpc
from services.store.usage.counters import Counters
from services.store.usage.quotas import Quotas
from services.store.usage.totals import UsageTotals
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2, store_pb2_grpc

log = logging.getLogger(__name__)

_DESCRIPTOR = store_pb2.DESCRIPTOR.services_by_name["StoreService"]
_RETRY_S = 0.5
# Threads for files and hashing. Per 1 MiB, on a virtual machine with two EPYC cores: SHA-256 0.7 ms, a write into the
# page cache 0.4 to 3 ms; an fsync of 200 MiB 75 ms (seconds on a spinning disk). On the event loop, each would delay
# every other call that long.
_THREADS = 8


async def run(config: StoreConfig, access: Access | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    `access` decides about callers, unless the configuration asks for the policy of the cluster. None: every caller may
    call every method.
    """
    ready = asyncio.Event()
    async with AsyncExitStack() as stack:
        watch = await stack.enter_async_context(access_of(config))
        access = access if watch is None else watch.access
        threads = stack.enter_context(Threads(_THREADS, "store-io"))
        client = await stack.enter_async_context(mongo.connect(config.mongo))
        watching = await stack.enter_async_context(mongo.connect(config.mongo, max_connections=config.max_watches + 4))
        collections = Collections(client[config.database])
        clock = await stack.enter_async_context(DatabaseClock(client[config.database]))
        counters = await stack.enter_async_context(Counters(collections, clock))
        quotas = Quotas(collections, counters, clock)

        # Artifacts and the registry of models.
        blobs, folder = open_blobs(config.blobs, config.staging, threads, checksums=config.s3_checksums)
        staging = Staging(folder, config.max_uploads, config.upload_age_ms / 1000, config.min_free_disk_bytes)
        await stack.enter_async_context(StagingSweep(staging, threads, utc_now))
        artifacts = Artifacts(collections, blobs, staging, threads, max_bytes=config.max_artifact_bytes, clock=clock)
        registry = Registry(collections, artifacts, clock, config.registry_bytes)
        registry_watch = await stack.enter_async_context(RegistryWatch(collections, registry, config.max_watches))

        # Results.
        responses = LargeResponses(blobs, threads, config.inline_bytes)
        recorded = RecordedCount(counters.recorded)
        results = Results(collections, responses, clock, recorded)
        waiters = await stack.enter_async_context(results.waiters)
        result_watch = ResultWatch(watching[config.database], collections, results, config.max_watches)
        result_stream = ResultStream(results, result_watch, config.max_streams)
        export_locations = ExportLocations(config.exports, threads, checksums=config.s3_checksums)
        exports = Exports(collections, results, result_stream, export_locations, threads, config.max_exports)

        # Removal: retention by the leader, garbage collection by every instance.
        rules = RuleRepository(collections, clock)
        holder = f"{config.node}/{config.instance} {uuid.uuid4().hex}"
        leases = client[config.database][LEASES]
        lease = LeaderLease(leases, "store", holder, ready=ready, ttl_ms=LEASE_MS, renew_ms=RENEW_MS)
        await stack.enter_async_context(lease)
        marks = client[config.database][MARKS]
        guard = RemovalGuard(
            marks,
            "results",
            ExpiredShare(collections, rules),
            clock=clock,
            command="shoal store retention set results 30d",
        )
        sweep = Sweep(collections, rules, counters, clock, removal_clock=guard)
        await stack.enter_async_context(RetentionRounds(sweep, lease, config.retention_ms / 1000, check=guard.check))
        collector = Collector(collections, blobs, clock)
        await stack.enter_async_context(CollectorRounds(collector, config.collect_every_ms / 1000))

        # The audit log.
        chain = await stack.enter_async_context(AuditChain(collections, clock, config.instance))
        anchors = Anchors(collections, blobs, clock)
        keep, every_s = timedelta(milliseconds=config.audit_keep_ms), config.audit_anchor_ms / 1000
        await stack.enter_async_context(AuditRounds(collections, anchors, lease, guard, every_s=every_s, keep=keep))
        audit = AuditParts(collections, chain, AuditVerification(collections, anchors, chain))

        # Backups.
        backup_locations = BackupLocations(config.backups, threads, checksums=config.s3_checksums)
        databases = config.backup_databases
        backup = Backup(collections, blobs, backup_locations, folder, threads, clock, databases)
        restore = Restore(collections, blobs, backup_locations, folder, threads, clock, counters, databases)

        references = References(collections, artifacts, clock)
        verification = Verification(collections, blobs, artifacts.reader, responses)
        idle_s = config.upload_idle_ms / 1000
        parts = ArtifactParts(artifacts, references, collector, verification, backup, restore, quotas, idle_s)
        scopes = Scopes(SERVICE, access)
        rpc = StoreRpc(
            parts, registry, registry_watch, results, result_watch, result_stream, exports, rules, quotas, scopes, audit
        )
        add = Rpc(_DESCRIPTOR, lambda server: store_pb2_grpc.add_StoreServiceServicer_to_server(rpc, server))
        auditing: Auditing | None = None
        if access is not None:
            auditing = await stack.enter_async_context(Auditing(chain, access, f"{config.node}/{config.instance}"))
        fast_methods = admitted(rpc.fast_methods(await stack.enter_async_context(TaskMethods()), auditing), access)
        replica_set = await stack.enter_async_context(ReplicaSet(client))
        totals = await stack.enter_async_context(UsageTotals(collections))
        metrics = StoreMetrics(recorded, sweep, lease, chain, rpc, clock, guard, replica_set, totals)
        server = await stack.enter_async_context(
            Server(
                config.listen,
                [add],
                drain_ms=config.drain_ms,
                fast_methods=fast_methods,
                body_bytes=config.body_bytes,
                unread_bytes=config.unread_bytes,
                access=access,
                auditing=auditing,
                metrics=config.metrics,
                methods=span_listing.methods(),
                exports_as=("store", f"{config.node}/{config.instance}"),
                sources=[metrics.read],
                http=rest_app,
            )
        )
        registration = await stack.enter_async_context(Registration.of(config, "store", server.address))
        await stack.enter_async_context(published(watch, registration))
        async with asyncio.TaskGroup() as tasks:
            opening = tasks.create_task(_open(collections, clock, guard, ready, server, registration))
            try:
                await until_stopped()
            finally:
                waiters.stop()
            opening.cancel()


async def _open(
    collections: Collections,
    clock: DatabaseClock,
    guard: RemovalGuard,
    ready: asyncio.Event,
    server: Server,
    registration: Registration,
) -> None:
    """Create the collections, however long MongoDB is unavailable, and only then serve and register as ready.

    Indexes that only make queries faster are built afterwards.
    """
    while True:
        try:
            # Before this instance records or removes anything.
            await clock.synchronize()
            await collections.prepare()
            await guard.check()
            break
        except Unavailable as err:
            log.warning("not serving yet: %(error)s", {"event": "service.not_ready", "error": err})
            await asyncio.sleep(_RETRY_S)
    ready.set()
    await server.serve()
    await registration.update(state=State.READY)
    log.info("serving at %(address)s", {"event": "service.serving", "address": server.address})
    await collections.build_later_indexes()
