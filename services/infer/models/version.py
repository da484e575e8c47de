"""One version of one model, from its files to its end.

LOADING ──> READY ──> UNLOADING ──> gone      (UNLOADING: taken from the table; calls that hold it finish first)
   └──> UNAVAILABLE, with the reason
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

from services.infer.isolation.execution import ProcessExecution
from services.infer.isolation.session import ProcessSession
from services.infer.models import loading, modelconfig
from services.infer.models.loading import Loaded
from services.infer.models.wanted import ModelFiles, WantedVersion
from services.infer.responses.cache import ResponseCache, ttl_s
from services.infer.responses.key import ResponseKeys
from services.infer.responses.store import DEFAULT_BYTES, ResponseStore
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.runtime import Runtime
from services.infer.scheduling import rules
from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.execution import Execution, Runs
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from shoal.errors import DataLoss, FailedPrecondition, ShoalError, Unimplemented

log = logging.getLogger(__name__)


class State(StrEnum):
    """As the repository index says it."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = ""
    """The repository has it, and it was never loaded: an empty text, as clients expect."""


def as_it_is(model: str, execution: Execution) -> Runs:
    """Puts nothing around an execution."""
    return execution


@dataclass(frozen=True)
class Means:
    """What every version is loaded and run with."""

    runtime: Runtime | Runtimes
    threads: int
    """For one execution, where the model does not say."""
    limits: QueueLimits
    at_once: asyncio.Semaphore
    """Loading takes cores and memory: so many at a time."""
    clock: Callable[[], float] = time.monotonic
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Where the models with a response cache keep answers."""
    around: Callable[[str, Execution], Runs] = as_it_is
    """What stands around each execution of a model, by the model's name."""

    @classmethod
    def of(
        cls,
        runtime: Runtime | Runtimes,
        limits: QueueLimits,
        *,
        threads: int = 0,
        response_cache_bytes: int = DEFAULT_BYTES,
        around: Callable[[str, Execution], Runs] = as_it_is,
    ) -> Means:
        """With `threads` 0: as many as this process may use cores."""
        cores, responses = len(os.sched_getaffinity(0)), ResponseStore(response_cache_bytes)
        return cls(runtime, threads or cores, limits, asyncio.Semaphore(cores), responses=responses, around=around)


@dataclass(eq=False)
class Version:
    """One version of one model. Only the event loop's thread touches it."""

    name: str
    wanted: WantedVersion
    state: State = State.LOADING
    reason: str = ""
    may_retry: bool = False
    """It is UNAVAILABLE for a cause that may pass: its files could not be had."""
    statistics: Statistics = field(default_factory=Statistics)
    response_cache: ResponseCache | None = None
    """Only for a model whose configuration asks for it."""
    decoupled: DecoupledScheduler | None = None
    """In place of the scheduler, for a model that gives any number of responses."""
    _loaded: Loaded | None = None
    _scheduler: Scheduler | None = None
    _resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    _users: int = 0
    _is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def number(self) -> int:
        return self.wanted.version

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY

    @property
    def takes_numbers_only(self) -> bool:
        """Whether a request is to it what its tensors are: its bytes need not be parsed to be answered."""
        if self.response_cache is not None or self.decoupled is not None:
            return False
        return not getattr(self.loaded.session, "wants_requests", False)  # Ids and parameters too.

    @property
    def loaded(self) -> Loaded:
        assert self._loaded is not None, "only a version that was READY is asked"
        return self._loaded

    @property
    def scheduler(self) -> Scheduler:
        """Only a version that was READY is asked. Raises Unimplemented when it is decoupled."""
        if self._scheduler is None:
            raise Unimplemented("ModelInfer RPC doesn't support models with decoupled transaction policy")
        return self._scheduler

    async def load(self, means: Means) -> None:
        """Makes it READY, or UNAVAILABLE with a reason. Raises nothing but cancellation."""
        start = means.clock()
        try:
            async with means.at_once:
                await self._load(means)
            self.state = State.READY
            log.info("model %s version %d is ready after %.3f s", self.name, self.number, means.clock() - start)
        except asyncio.CancelledError:
            await self._resources.aclose()
            raise
        except Exception as err:
            await self._resources.aclose()
            self.may_retry = isinstance(err, OSError | DataLoss) or not isinstance(err, FailedPrecondition)
            self.reason = _reason(err)
            self.state = State.UNAVAILABLE
            log.warning("model %s version %d is unavailable: %s", self.name, self.number, self.reason)
            if not isinstance(err, ShoalError | OSError):
                log.error("model %s version %d: unexpected error", self.name, self.number, exc_info=err)

    async def _load(self, means: Means) -> None:
        files = await self._resources.enter_async_context(self.wanted.open())
        given_up = threading.Event()
        loaded = await _finished(self._loading(files, means, given_up), given_up)
        # On a thread: a model's own good-bye may take a while.
        self._resources.push_async_callback(asyncio.to_thread, loaded.session.close)
        if loaded.model.config.model_transaction_policy.decoupled and isinstance(loaded.session, ProcessSession):
            streams = self._streaming(loaded, loaded.session, means)
            self.decoupled = await self._resources.enter_async_context(streams)
            self._loaded = loaded
            return
        self._scheduler = await self._resources.enter_async_context(self._scheduling(loaded, means))
        ttl = ttl_s(loaded.model.config)
        if ttl is not None:
            self.response_cache = await self._resources.enter_async_context(self._caching(loaded, means, ttl))
        self._loaded = loaded

    def _loading(self, files: ModelFiles, means: Means, given_up: threading.Event) -> asyncio.Future[Loaded]:
        work = asyncio.to_thread(
            loading.load,
            self.name,
            files,
            means.runtime,
            version=self.number,
            threads=means.threads,
            clock=means.clock,
            is_given_up=given_up.is_set,
        )
        return asyncio.ensure_future(work)

    def _scheduling(self, loaded: Loaded, means: Means) -> Scheduler:
        return Scheduler(
            self.name,
            lambda: self._execution(loaded, means),
            loaded.batch_policy(),
            means.limits,
            rules.of(loaded.model.config),
            instances=modelconfig.instances(loaded.model.config),
            statistics=self.statistics,
            cost=loaded.cost,
            clock=means.clock,
        )

    def _streaming(self, loaded: Loaded, session: ProcessSession, means: Means) -> DecoupledScheduler:
        level = rules.of(loaded.model.config).levels[0]
        return DecoupledScheduler(
            self.name,
            self.number,
            session,
            QueueLimits(level.calls or means.limits.calls, means.limits.size_bytes),
            default_timeout_s=level.timeout_s,
            statistics=self.statistics,
            clock=means.clock,
        )

    def _execution(self, loaded: Loaded, means: Means) -> Runs:
        session, signature = loaded.session, loaded.model.signature
        if isinstance(session, ProcessSession):
            made: Execution = ProcessExecution(self.name, self.number, session, signature, means.clock)
        else:
            made = Execution(self.name, session, signature, means.clock)
        return means.around(self.name, made)

    def _caching(self, loaded: Loaded, means: Means, ttl: float) -> ResponseCache:
        config, signature = loaded.model.config, loaded.model.signature
        keys = ResponseKeys(self.name, self.number, self.wanted.digest, config, signature)
        return ResponseCache(keys, self.scheduler, means.responses, self.statistics, ttl_s=ttl, clock=means.clock)

    def __enter__(self) -> Version:
        """For as long as the block lasts, it is not unloaded. No generator: every call comes this way."""
        self._users += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._users -= 1
        if not self._users:
            self._is_idle.set()

    async def unload(self) -> None:
        """Waits for the calls that hold it, then gives everything back. Nobody can find it any more."""
        self.state = State.UNLOADING
        while self._users:
            self._is_idle.clear()
            await self._is_idle.wait()
        await self._resources.aclose()
        self._loaded = self._scheduler = self.decoupled = self.response_cache = None
        if self.statistics.expired_executed:
            rows = self.statistics.expired_executed
            log.error("model %s version %d: %d rows were run after their time was over", self.name, self.number, rows)
        log.info("model %s version %d is unloaded", self.name, self.number)


async def _finished(work: asyncio.Future[Loaded], given_up: threading.Event) -> Loaded:
    """Waits for a thread that can only be told. When cancelled, it still sees that the session is closed."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        given_up.set()
        work.add_done_callback(_close)
        raise


def _close(work: asyncio.Future[Loaded]) -> None:
    if not work.cancelled() and work.exception() is None:
        # On a thread: a model's own good-bye may take a while.
        work.get_loop().run_in_executor(None, work.result().session.close)


def _reason(error: Exception) -> str:
    if isinstance(error, ShoalError):
        return error.message
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return "internal error while loading: the log of the service has the cause"
