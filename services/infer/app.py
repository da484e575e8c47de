"""Wiring of an infer process, in start order; what started last stops first.

models <── core <── server <── registration      ready models are published in the membership
  ^── control: desired models  <── a repository folder, read once or polled; or the registry, watched through the mesh
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mesh.cluster.membership import ReadyModel, Registration, State
from mesh.process.crash_journal import CrashJournal
from mesh.process.exits import cut_s
from mesh.process.memory_limit import limit_memory
from mesh.process.signals import until_stopped
from mesh.process.tasks import end
from mesh.process.watched import Watched
from mesh.rpc import span_listing
from mesh.rpc.access import Access
from mesh.rpc.auditing import auditing_of
from mesh.rpc.channel import connect
from mesh.rpc.cluster_access import access_of, published
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.held_shares import HeldShares
from mesh.rpc.server import Rpc, Server
from services.infer import metrics
from services.infer.config import InferConfig
from services.infer.core import InferenceServer
from services.infer.model_process.inner_calls import InnerCalls
from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.model_process.shared.owners import Owners
from services.infer.models.control import Control
from services.infer.models.load_context import LoadContext, identity
from services.infer.models.models import Models
from services.infer.models.trials import Trials
from services.infer.operators.kernels_runtime import KernelsRuntime
from services.infer.policy_file import followed
from services.infer.remote.remote_runtime import RemoteRuntime
from services.infer.rest.app import InferRestApp
from services.infer.rpc import bulk_rpc, fast_methods, inference_rpc, trials_rpc
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.crash_guard import CrashGuard, journaled
from services.infer.sources import repository
from services.infer.sources.cache import Cache
from services.infer.sources.poll import Poll
from services.infer.sources.registry import Registry
from services.infer.sources.store_client import StoreClient
from shoal.access.limits import Kind

log = logging.getLogger(__name__)

# Longest wait of a start for the first load of every pushed model; the others are served once they are loaded.
_START_S = 30.0


def rpcs_of(config: InferConfig, core: InferenceServer, trials: Trials, access: Access | None = None) -> list[Rpc]:
    """Return the gRPC services: the inference protocol; in a mesh the bulk calls of jobs; with the store the trials."""
    bulk = [bulk_rpc(core, access)] if config.mesh is not None else []
    trying = [trials_rpc(trials, core.replica, access)] if config.cache_dir is not None else []
    return [inference_rpc(core, access), *bulk, *trying]


async def run(config: InferConfig) -> None:
    """Serve until the process receives a stop signal."""
    limit_memory(config.memory_bytes)
    async with AsyncExitStack() as stack:
        stopped = await stack.enter_async_context(_background(until_stopped()))
        inner_calls = InnerCalls()
        journal = stack.enter_context(CrashJournal(config.crash_journal)) if config.crash_journal else None
        owners = stack.enter_context(Owners(config.shared_dir))
        context = LoadContext.of(
            _runtimes(config, inner_calls, owners),
            config.queue_limits,
            threads=config.threads,
            response_cache_bytes=config.response_cache_bytes,
            state_bytes=config.state_bytes,
            wrap_execution=partial(journaled, journal) if journal else identity,
            drain_ms=config.drain_ms,
            allow_code=config.allows_code,
        )
        models = await stack.enter_async_context(Models(context))
        trials = await stack.enter_async_context(Trials(context, models, limit_s=config.trial_ms / 1000))
        control = await stack.enter_async_context(_control(config, models))
        guard = CrashGuard(config.crash_journal.parent) if config.crash_journal else None
        # Of processes that share a port, only one would receive a load or unload: their models would differ.
        on_request = None if config.share_port else control
        heavy = HeavyWork()
        replica = f"{config.node}/{config.instance}"
        core = InferenceServer(models, replica, control=on_request, crash_guard=guard, heavy=heavy)
        watch = await stack.enter_async_context(access_of(config, _shares()))
        access = None
        if config.policy is not None:
            access = await stack.enter_async_context(followed(config.policy, _shares(1 / config.limit_processes)))
        if watch is not None:
            access = watch.access
        if access is not None:
            access.follow_policy(lambda policy: models.set_objectives(policy.objectives))
        auditing = await stack.enter_async_context(auditing_of(config, access))
        refusals = [] if access is None or access.shares is None else [access.shares.refused.read]
        server = Server(
            config.listen,
            rpcs_of(config, core, trials, access),
            drain_ms=config.drain_ms,
            fast_methods=fast_methods(core, access),
            share_port=config.share_port,
            body_bytes=config.body_bytes,
            unread_bytes=config.unread_bytes,
            access=access,
            auditing=auditing,
            http=partial(InferRestApp, core, auditing=auditing),
            http_listen=config.http_listen,
            heavy=heavy,
            metrics=config.metrics,
            # Without a mesh, clients reach this address, and spans of other tenants are not for them.
            methods=span_listing.methods() if config.etcd is not None else {},
            exports_as=("infer", f"{config.node}/{config.instance}"),
            sources=[metrics.source(models), *refusals],
            holders=[inner_calls.held_by_tenant],
            shrink=models.shrink,
        )
        inner_calls.bind(core, server.memory.bodies)
        if not config.share_port:
            await stack.enter_async_context(server)
        registration = await stack.enter_async_context(Registration.of(config, "infer", server.address))
        await stack.enter_async_context(published(watch, registration))
        await stack.enter_async_context(_background(_publish(models, models.ready_set, registration)))
        await stack.enter_async_context(_background(_publish(models, models.awaited, registration)))
        if config.repository is not None:
            await stack.enter_async_context(_folder(config, config.repository, control))
            first_attempts = models.settled()
        else:
            registry = await stack.enter_async_context(_registry(config, control))
            trials.bind(registry.unregistered)
            first_attempts = _first_attempts(registry, models)
        starting = await stack.enter_async_context(_background(first_attempts))
        # One tenant's pushed model that loads for minutes does not keep those of all others from being served.
        limit_s = None if config.repository is not None else _START_S
        await asyncio.wait({starting, stopped}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            if starting.done():
                await starting
            # A process that listens receives connections. With a shared port, others respond until models are ready.
            if config.share_port:
                await stack.enter_async_context(server)
            await server.serve()
            await registration.update(state=State.READY)
            log.info("serving at %(address)s", {"event": "service.serving", "address": server.address})
        await stopped
        # The server's drain is part of this time.
        now, drain_s = context.clock(), context.drain_s
        models.stop_by(now + cut_s(drain_s), now + drain_s)


def _shares(part: float | None = None) -> HeldShares:
    """Return the shares of the policy's limits. Bytes and requests of a job are counted at its submit."""
    return HeldShares(tuple(Kind), (Kind.IN_FLIGHT, Kind.ROWS), part=part)


def _runtimes(config: InferConfig, inner_calls: InnerCalls, owners: Owners) -> Runtimes:
    """Return the runtimes. Processes that share models share those on a GPU, so that weights are there only once."""
    gpu_streams = GpuStreams()
    return Runtimes(
        [
            OnnxRuntime(gpu_streams),
            PythonRuntime(call=inner_calls, owners=owners),
            KernelsRuntime(lanes=gpu_streams),
            RemoteRuntime(),
        ],
        IsolatedOnnxRuntime(owners=owners),
        IsolatedOnnxRuntime(owners=owners, isolation="shared") if config.shared_dir else None,
    )


def _control(config: InferConfig, models: Models) -> Control:
    read_model = partial(repository.look, config.repository) if config.repository is not None else None
    is_explicit = config.model_control == "explicit"
    return Control(
        models,
        read_model,
        initially=config.load_models if is_explicit else None,
        allow_requests=is_explicit,
        allow_files=config.allows_code,
    )


@asynccontextmanager
async def _folder(config: InferConfig, root: Path, control: Control) -> AsyncIterator[None]:
    found = await asyncio.to_thread(repository.scan, root)
    control.offer(found)
    if config.model_control != "poll":
        yield
        return
    every_s = config.poll_ms / 1000
    async with Poll(partial(repository.scan, root), control.offer, found, lambda: asyncio.sleep(every_s)):
        yield


@asynccontextmanager
async def _registry(config: InferConfig, control: Control) -> AsyncIterator[Registry]:
    assert config.mesh is not None, "the configuration was checked"
    async with connect(config.mesh) as channel:
        store = StoreClient(channel)
        cache = Cache(config.cache_dir or Path(), config.instance, store)
        cache.start()
        registry = Registry(store, cache, control.offer)
        async with _background(registry.follow()):
            yield registry


async def _first_attempts(registry: Registry, models: Models) -> None:
    await registry.is_tried.wait()
    # Without desired models (the store is unavailable and nothing is cached) the process starts with none.
    if models.has_desired:
        await models.settled()


async def _publish(models: Models, changes: Watched[Any], registration: Registration) -> None:
    """Publish the ready and the awaited models, now and after each of `changes`."""
    async for _ in changes.follow():
        ready = [ReadyModel(*model) for model in models.ready_set.value]
        await registration.update(models=ready, awaited=models.awaited.value)


@asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run `work` as a task, and cancel the task at the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        await end(task)
