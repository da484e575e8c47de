"""Trial loads: a version is loaded and warmed beside the served ones, and unloaded at once. It never serves.

files fetched ──> a free slot ──> begun ──> loaded, warmed ──> unloaded ──> passed
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace
from types import TracebackType

from mesh.process.tasks import end
from mesh.rpc.places import Places
from mesh.rpc.tenant_turns import TenantTurns
from services.infer.ensembles.other_models import OtherModels, StepVersion
from services.infer.model_files.wanted_models import WantedVersion
from services.infer.models.load_context import LoadContext, load_turns
from services.infer.models.version import State, Version
from shoal.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from shoal.store.v1 import store_pb2

MOST_TRIALS = 64
"""Trials that wait or run: a client that pushes a folder has fewer at a time."""

Source = Callable[[store_pb2.ModelVersion, bytes], AbstractAsyncContextManager[WantedVersion]]
"""Provides an unregistered version, with its files on this machine, for a caller; empty: for a service."""


class Trials:
    """Runs trial loads. Use as `async with`; leaving ends those in progress.

    A tenant's trials have half of the cores at a time, and half as many slots again are left to others: a load may take
    minutes. A trial whose caller leaves is cancelled, and keeps its slot until its thread or process has ended.

    Args:
        context: context of all loads.
        models: the served models, for the steps of ensembles.
        limit_s: longest time of one trial, with its downloads and its wait for a slot.
    """

    def __init__(self, context: LoadContext, models: OtherModels, *, limit_s: float) -> None:
        # Trials have slots of their own: they do not delay the loads of registered models.
        self._context = replace(context, other_models=_ServedModels(models), at_once=TenantTurns(MOST_TRIALS))
        self._limit_s = limit_s
        self._slots = load_turns(max(1, len(os.sched_getaffinity(0)) // 2))
        self._places = Places(MOST_TRIALS, "trial loads")
        self._source: Source | None = None
        self._running: set[asyncio.Task[None]] = set()

    def bind(self, source: Source) -> None:
        """Set the source of files. Until then, trials are rejected."""
        self._source = source

    async def __aenter__(self) -> Trials:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._running)

    async def run(
        self, model: store_pb2.ModelVersion, *, allow_code: bool = True, caller: bytes = b"", tenant: str = ""
    ) -> AsyncGenerator[None, None]:
        """Try a version: yield when the trial begins, and return when the version has passed and is unloaded.

        `allow_code` False: also where models may run code, this one may not; nor may it be on another server.
        `caller` must see the files; empty: nobody's right to them is checked. Tenants share the slots.

        Raises:
            FailedPrecondition: the version cannot be loaded; the message has the reason.
            InvalidArgument: an invalid name, or too many files.
            NotFound, DataLoss, Unavailable: the files cannot be fetched.
            ResourceExhausted: too many trials wait. DeadlineExceeded: the trial takes too long.
        """
        if self._source is None:
            raise Unavailable("this instance is starting: try again")
        place = ExitStack()
        place.enter_context(self._places.take(tenant))
        begun = asyncio.Event()
        context = self._context if allow_code else replace(self._context, allow_code=False, allow_remote=False)
        work = self._try(self._source(model, caller), model.name, tenant, begun, context)
        trial = asyncio.create_task(work, name=f"trial-{model.name}")
        self._running.add(trial)
        trial.add_done_callback(self._running.discard)
        trial.add_done_callback(lambda _: begun.set())
        trial.add_done_callback(lambda _: place.close())
        try:
            await begun.wait()
            if not trial.done():
                yield
            await asyncio.shield(trial)
        finally:
            trial.cancel()

    async def _try(
        self,
        source: AbstractAsyncContextManager[WantedVersion],
        name: str,
        tenant: str,
        begun: asyncio.Event,
        context: LoadContext,
    ) -> None:
        try:
            async with asyncio.timeout(self._limit_s) as limit, source as wanted, self._slots.take(tenant):
                begun.set()
                await self._load(Version(name, wanted), context)
        except OSError as err:
            if limit.expired():
                raise DeadlineExceeded(f"the trial load of {name} took more than {self._limit_s:g} s") from None
            raise Unavailable(f"the files of {name} cannot be kept: {err.strerror or err}") from err

    async def _load(self, version: Version, context: LoadContext) -> None:
        """Load the version and unload it. Raises FailedPrecondition when it cannot be loaded."""
        try:
            await version.load(context)
        finally:
            await version.thread_ended()
        if version.state is State.UNAVAILABLE:
            raise FailedPrecondition(version.reason)
        await version.unload(0)


class _ServedModels:
    """The served models for ensembles on trial, which change nothing: no model is served because a trial needs it."""

    def __init__(self, models: OtherModels) -> None:
        self._models = models

    def find(self, name: str, version: str) -> StepVersion:
        return self._models.find(name, version)

    async def need(self, name: str, by: str) -> None:
        pass

    def needs(self, name: str) -> Iterable[str]:
        return self._models.needs(name)

    async def tried(self, name: str) -> None:
        await self._models.tried(name)
