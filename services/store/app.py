"""The store service as a parts list: what starts first stops last."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from datetime import UTC, datetime

from mesh import mongo
from mesh.etcd import Etcd
from mesh.membership import Registration, State
from mesh.rpc.server import Rpc, Server
from mesh.rpc.task_methods import TaskMethods
from mesh.signals import until_stopped
from mesh.threads import Threads
from services.store.artifact_rpc import ArtifactParts
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.opening import open_blobs
from services.store.artifacts.staging import Staging
from services.store.backups.backup import Backup
from services.store.backups.places import BackupPlaces
from services.store.backups.restore import Restore
from services.store.collecting.collector import Collector
from services.store.collecting.references import References
from services.store.collecting.rounds import Rounds
from services.store.collecting.verification import Verification
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.exports.exports import Exports
from services.store.exports.places import Places
from services.store.registry.registry import Registry
from services.store.registry.registry_watch import RegistryWatch
from services.store.responses import Responses
from services.store.results.result_stream import ResultStream
from services.store.results.result_watch import ResultWatch
from services.store.results.results import Results
from services.store.retention.book import RuleBook
from services.store.retention.leadership import Leadership
from services.store.retention.retention import Retention
from services.store.retention.sweep import Sweep
from services.store.rpc import StoreRpc
from services.store.usage.counters import Counters
from services.store.usage.quotas import Quotas
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2, store_pb2_grpc

log = logging.getLogger(__name__)

_DESCRIPTOR = store_pb2.DESCRIPTOR.services_by_name["StoreService"]
_RETRY_S = 0.5
_SWEEP_S = 600.0
_THREADS = 8
# For files and hashing. Of 1 MiB, measured on a virtual machine with two EPYC cores: SHA-256 0.7 ms, a write into the
# page cache 0.4 to 3 ms, and an fsync of 200 MiB 75 ms (seconds on a spinning disk). On the loop, each would hold up
# every other call so long.


async def run(config: StoreConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    async with AsyncExitStack() as stack:
        threads = stack.enter_context(Threads(_THREADS, "store-io"))
        client = await stack.enter_async_context(mongo.connect(config.mongo))
        collections = Collections(client[config.database])
        blobs, folder = open_blobs(config.blobs, config.staging, threads, checksums=config.s3_checksums)
        staging = Staging(folder, config.max_uploads, config.upload_age_ms / 1000)
        artifacts = Artifacts(collections, blobs, staging, threads, max_bytes=config.max_artifact_bytes, clock=_now)
        registry = Registry(collections, artifacts, _now)
        registry_watch = await stack.enter_async_context(RegistryWatch(collections, registry))
        responses = Responses(blobs, threads, config.inline_bytes)
        counters = await stack.enter_async_context(Counters(collections, _now))
        results = Results(collections, responses, _now, counters.recorded)
        waiting = await stack.enter_async_context(results.waiting)
        watching = await stack.enter_async_context(mongo.connect(config.mongo, max_connections=config.max_watches + 4))
        result_watch = ResultWatch(watching[config.database], collections, results, config.max_watches)
        etcd = await stack.enter_async_context(Etcd(config.etcd)) if config.etcd else None
        book = RuleBook(collections, _now)
        retention = Retention(book, Sweep(collections, book, counters, _now), Leadership(etcd))
        result_stream = ResultStream(results, result_watch, config.max_streams)
        collector = Collector(collections, blobs, _now)
        await stack.enter_async_context(Rounds(collector, config.collect_every_ms / 1000))
        places = BackupPlaces(config.backups, threads, checksums=config.s3_checksums)
        quotas = Quotas(collections, counters, _now)
        parts = ArtifactParts(
            artifacts,
            References(collections, artifacts, _now),
            collector,
            Verification(collections, blobs, artifacts.reader, responses),
            Backup(collections, blobs, places, folder, threads, _now, config.backup_databases),
            Restore(collections, blobs, places, folder, threads, _now, counters, config.backup_databases),
            quotas,
            upload_idle_s=config.upload_idle_ms / 1000,
        )
        rpc = StoreRpc(
            parts,
            registry,
            registry_watch,
            results,
            result_watch,
            result_stream,
            Exports(
                collections,
                results,
                result_stream,
                Places(config.exports, threads, checksums=config.s3_checksums),
                threads,
                config.max_exports,
            ),
            retention,
            quotas,
        )
        add = Rpc(_DESCRIPTOR, lambda server: store_pb2_grpc.add_StoreServiceServicer_to_server(rpc, server))
        fast_methods = rpc.fast_methods(await stack.enter_async_context(TaskMethods()))
        server = await stack.enter_async_context(
            Server(config.listen, [add], drain_ms=config.drain_ms, fast_methods=fast_methods)
        )
        registration = await stack.enter_async_context(Registration.of(config, "store", server.address))
        async with asyncio.TaskGroup() as tasks:
            opening = tasks.create_task(_open(collections, server, registration))
            sweeping = tasks.create_task(_sweep_for_ever(staging, threads))
            try:
                await until_stopped()
            finally:
                waiting.stop()
            opening.cancel()
            sweeping.cancel()


async def _open(collections: Collections, server: Server, registration: Registration) -> None:
    """Makes the collections, however long MongoDB is away, and only then says that the service is there."""
    while True:
        try:
            await collections.prepare()
            break
        except Unavailable as err:
            log.warning("not serving yet: %s", err)
            await asyncio.sleep(_RETRY_S)
    await server.serve()
    await registration.update(state=State.READY)
    log.info("serving at %s", server.address)


async def _sweep_for_ever(staging: Staging, threads: Threads) -> None:
    while True:
        try:
            await threads.run(staging.sweep, _now().timestamp())
        except OSError:
            log.exception("unfinished uploads could not be swept")
        await asyncio.sleep(min(_SWEEP_S, staging.max_age_s))


def _now() -> datetime:
    return datetime.now(UTC)
