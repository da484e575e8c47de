"""One version of one model, from its files to its unload.

LOADING ──> READY ──> UNLOADING ──> unloaded  (UNLOADING: out of the table; requests that use the version finish first)
   └──> UNAVAILABLE, with the reason          (an ensemble also from READY, when one of its models is unloaded)
"""

from __future__ import annotations

import asyncio
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from types import TracebackType

from mesh.rpc.tail_spans import SLOW_S
from services.infer.ensembles import graph as graphs
from services.infer.ensembles import loading as composing
from services.infer.ensembles import warmup
from services.infer.ensembles.graph import Graph
from services.infer.ensembles.loading import Composed, Resolved
from services.infer.ensembles.other_models import OtherModels
from services.infer.ensembles.scheduler import EnsembleScheduler
from services.infer.loading import loading
from services.infer.loading.loading import Loaded
from services.infer.model_files.wanted_models import ModelFiles, WantedVersion
from services.infer.models.load_context import LoadContext
from services.infer.models.objectives import Objectives
from services.infer.models.scheduling import scheduler_of
from services.infer.response_cache.cache import ResponseCache, ttl_s
from services.infer.response_cache.key import ResponseKeys
from services.infer.runtimes.given_up import GivenUp
from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.request_scheduler import RequestScheduler
from services.infer.scheduling.statistics import Statistics
from services.infer.sequences.arrival_order import ArrivalOrder
from shoal.access import objectives
from shoal.access.objectives import ModelObjective
from shoal.errors import DataLoss, FailedPrecondition, ShoalError, Unavailable, Unimplemented

log = logging.getLogger(__name__)


class State(StrEnum):
    """State of a version, as in the repository index."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = ""
    """In the repository and never loaded; an empty text, as clients of Triton expect."""


@dataclass(eq=False)
class Version:
    """One version of one model. Only the event loop's thread touches it."""

    name: str
    wanted: WantedVersion
    state: State = State.LOADING
    reason: str = ""
    may_retry: bool = False
    """True when the cause of UNAVAILABLE may be temporary: files or remote server were unreachable."""
    statistics: Statistics = field(default_factory=Statistics)
    slow_ns: float = SLOW_S * 1e9
    """Nanoseconds of a request beyond which its span is kept (mesh.rpc.tail_spans): `slo_ms`, if the model has it."""
    objective: ModelObjective = objectives.DEFAULT
    _own_goal_s: float = math.inf
    response_cache: ResponseCache | None = None
    """Only for a model whose configuration enables it."""
    decoupled: DecoupledScheduler | None = None
    """In place of the scheduler, for a model that sends any number of responses to a request."""
    given_up: GivenUp = field(default_factory=GivenUp)
    """Set to end the load, in thread or queue: it fails with the reason."""
    graph: Graph | None = None
    """Steps of an ensemble, once its configuration is read."""
    _resolved: Resolved = ()
    """Versions that an ensemble's steps resolved to at the last check."""
    arrival_order: ArrivalOrder | None = None
    """Only for a model with sequences, or an ensemble with such a step: keeps each sequence's requests in order."""
    _thread: asyncio.Future[Loaded] | None = None
    """The thread that loads the version; it outlives a cancelled load."""
    _loaded: Loaded | None = None
    _scheduler: RequestScheduler | None = None
    _resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    _users: int = 0
    _is_overdue: bool = False
    """True once the unload waits for requests no longer."""
    _end_timer: asyncio.TimerHandle | None = None
    _is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def number(self) -> int:
        return self.wanted.version

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY

    @property
    def in_flight(self) -> int:
        """Requests and calls that use the version now."""
        return self._users

    @property
    def is_loaded(self) -> bool:
        """True while the version holds its resources: READY, or an ensemble that lacks a step."""
        return self._loaded is not None and self.state is not State.UNLOADING

    def shrink(self) -> None:
        """Free memory that the model keeps for later runs. Called by any thread."""
        loaded = self._loaded
        if loaded is not None and loaded.session is not None:
            loaded.session.shrink()

    @property
    def needs(self) -> tuple[str, ...]:
        """Models that this ensemble needs; empty for any other model."""
        return self.graph.models if self.graph is not None else ()

    @property
    def needs_tensors_only(self) -> bool:
        """True when a request can be executed from its tensors alone, so that its message need not be parsed."""
        return self.response_cache is None and self.sees_tensors_only

    @property
    def sees_tensors_only(self) -> bool:
        """True when the model sees nothing of a request but its tensors."""
        return not self._reason_to_read_requests

    @property
    def _reason_to_read_requests(self) -> str:
        """Reason why the model sees more of a request than its tensors; empty when it sees only them."""
        if self.decoupled is not None:
            return "it is decoupled"
        if self.arrival_order is not None:
            return "its requests are steps of sequences"
        if isinstance(self.loaded, Composed):
            return "" if self.loaded.plan.sees_tensors_only else "a step reads ids or parameters of requests"
        session = self.loaded.session
        return "it reads ids or parameters of requests" if session is not None and session.wants_requests else ""

    @property
    def slow_path_reason(self) -> str:
        """Reason why ordinary requests of this version take the slow path; empty for the fast path.

        An ordinary request gives all required inputs as raw contents and asks for all outputs.
        """
        if self.response_cache is not None:
            return "it has a response cache"
        if reason := self._reason_to_read_requests:
            return reason
        signature = self.loaded.model.signature
        for spec in signature.inputs:
            if spec.datatype.name in ("BYTES", "BOOL") and not spec.is_optional:
                return f"input {spec.name} is {spec.datatype.name}"
        for spec in signature.outputs:
            if spec.datatype.is_bytes or spec.is_ragged:
                return f"output {spec.name} is {'BYTES' if spec.datatype.is_bytes else 'ragged'}"
        return ""

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None and self.state is State.UNLOADING:
            raise self._unloading_error()
        assert self._loaded is not None, "only a version that was READY is used"
        return self._loaded

    def _unloading_error(self) -> Unavailable:
        return Unavailable(f"model '{self.name}' is being unloaded")

    @property
    def scheduler(self) -> RequestScheduler:
        """Scheduler of a version that was READY.

        Raises:
            Unimplemented: the model is decoupled.
            Unavailable: the version is unloaded, and did not wait for the request.
        """
        if self._scheduler is None:
            if self.state is State.UNLOADING:
                raise self._unloading_error()
            raise Unimplemented("ModelInfer RPC doesn't support models with decoupled transaction policy")
        return self._scheduler

    async def load(self, context: LoadContext) -> None:
        """Load the version: READY afterwards, or UNAVAILABLE with a reason. Raises nothing but cancellation."""
        start = context.clock()
        try:
            await self._load(context)
            self.state = State.READY
            log.info(
                "model %(model)s version %(version)d is ready after %(seconds).3f s",
                {
                    "event": "model.ready",
                    "model": self.name,
                    "version": self.number,
                    "seconds": context.clock() - start,
                },
            )
        except asyncio.CancelledError:
            await self._resources.aclose()
            raise
        except Exception as err:
            await self._resources.aclose()
            self.may_retry = isinstance(err, OSError | DataLoss) or not isinstance(err, FailedPrecondition)
            self.reason = _reason(err)
            self.state = State.UNAVAILABLE
            log.warning(
                "model %(model)s version %(version)d is unavailable: %(reason)s",
                {"event": "model.unavailable", "model": self.name, "version": self.number, "reason": self.reason},
            )
            if not isinstance(err, ShoalError | OSError):
                log.error(
                    "model %(model)s version %(version)d: unexpected error",
                    {"event": "model.load_failed", "model": self.name, "version": self.number},
                    exc_info=err,
                )

    async def _load(self, context: LoadContext) -> None:
        async with context.at_once.take(self.wanted.tenant):
            if self.given_up():
                raise FailedPrecondition(self.given_up.reason)
            files = await self._resources.enter_async_context(self.wanted.open())
            self.graph = await asyncio.to_thread(graphs.read, self.name, files)
            loaded = await self._load_single(files, context) if self.graph is None else None
        # Outside of the semaphore: the models of an ensemble's steps must be loaded, too.
        loaded = loaded or await self._composed(files, context)
        await self._schedule(loaded, context)
        if self.graph is not None:
            model = await warmup.run(self.name, loaded.model, files.folder, self.scheduler)
            loaded = replace(loaded, model=model)
        self._loaded = loaded

    async def _load_single(self, files: ModelFiles, context: LoadContext) -> Loaded:
        self._thread = self._loading(files, context)
        loaded = await _finished(self._thread, self.given_up)
        if loaded.session is not None:
            # In a thread: a model's own finalizer may take long.
            self._resources.push_async_callback(asyncio.to_thread, loaded.session.close)
        return loaded

    async def thread_ended(self) -> None:
        """Wait until the thread of a load that was cancelled has ended."""
        if self._thread is not None:
            await asyncio.wait({self._thread})

    async def _composed(self, files: ModelFiles, context: LoadContext) -> Composed:
        graph, other_models = self.graph, context.other_models
        assert graph is not None, "it was read"
        assert other_models is not None, "versions are loaded by models"
        self._resolved = composing.resolved(graph, other_models)
        labels = await asyncio.to_thread(loading.labels_of, graph.config, files.folder)
        await composing.wait_until_loaded(graph, other_models)
        self._resolved = composing.resolved(graph, other_models)
        return composing.composed(graph, other_models, labels)

    async def _schedule(self, loaded: Loaded, context: LoadContext) -> None:
        scheduler = scheduler_of(self.name, self.number, loaded, context, self.statistics)
        self._own_goal_s = self.statistics.slo_s
        self.set_objective(context.objectives)
        await self._resources.enter_async_context(scheduler)
        if isinstance(scheduler, DecoupledScheduler):
            self.decoupled = scheduler
            return
        self._scheduler = scheduler
        # Not the policy's: a goal that half of the requests may miss would keep the spans of half of them.
        if self._own_goal_s != math.inf:
            self.slow_ns = self._own_goal_s * 1e9
        self.arrival_order = ArrivalOrder() if _has_sequences(loaded) else None
        ttl = ttl_s(loaded.model.config)
        if ttl is not None:
            self.response_cache = await self._resources.enter_async_context(self._caching(loaded, context, ttl))

    def set_objective(self, stated: Objectives) -> None:
        """Count requests by the policy's objectives from now on; by the model's own goal where it states no latency."""
        self.objective = found = stated.of(self.name)
        self.statistics.slo_s = self._own_goal_s if found.latency_s is None else found.latency_s

    def _loading(self, files: ModelFiles, context: LoadContext) -> asyncio.Future[Loaded]:
        load = partial(
            loading.load,
            self.name,
            files,
            context.runtime,
            version=self.number,
            threads=context.threads,
            clock=context.clock,
            given_up=self.given_up,
            digest=self.wanted.digest,
            allow_code=context.allow_code,
            allow_remote=context.allow_remote,
        )
        # A thread of its own: loads that take minutes leave those of the event loop's pool to others.
        thread = ThreadPoolExecutor(1, f"load-{self.name}")
        work = asyncio.get_running_loop().run_in_executor(thread, load)
        thread.shutdown(wait=False)
        return work

    def _caching(self, loaded: Loaded, context: LoadContext, ttl: float) -> ResponseCache:
        config, signature = loaded.model.config, loaded.model.signature
        keys = ResponseKeys(self.name, self.number, self.wanted.digest, config, signature)
        return ResponseCache(keys, self.scheduler, context.responses, self.statistics, ttl_s=ttl, clock=context.clock)

    def recheck(self, other_models: OtherModels) -> bool:
        """Check an ensemble after other models changed. Return True when the ensemble must be loaded again.

        A serving ensemble goes on with the new versions of its models if their signatures are equal to callers;
        otherwise it becomes UNAVAILABLE, with the reason.
        """
        if self.graph is None or self.state in (State.LOADING, State.UNLOADING):
            return False
        before, self._resolved = self._resolved, composing.resolved(self.graph, other_models)
        is_other = self._resolved != before
        return not self._refresh(is_other=is_other) if self.is_ready else is_other

    def _refresh(self, *, is_other: bool) -> bool:
        """Renew the plan of a serving ensemble. Return False when its steps no longer fit: it is UNAVAILABLE then."""
        scheduler = self._scheduler
        assert isinstance(scheduler, EnsembleScheduler), "every ensemble has one"
        try:
            scheduler.refresh()
            # Even when the plan is unchanged: a request may have renewed it, and nested steps are not in it.
            if is_other and self.response_cache is not None:
                self.response_cache.forget()
            return True
        except ShoalError as err:
            self.reason, self.state = err.message, State.UNAVAILABLE
            log.warning(
                "model %(model)s version %(version)d is unavailable: %(reason)s",
                {"event": "model.unavailable", "model": self.name, "version": self.number, "reason": self.reason},
            )
            return False

    def __enter__(self) -> Version:
        """Keep the version loaded for the block. Not a generator, because every request passes here."""
        self._users += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if not self._users:
            log.error(
                "model %(model)s version %(version)d: a request left the version twice",
                {"event": "model.request_left_twice", "model": self.name, "version": self.number},
                stack_info=True,
            )
            return
        self._users -= 1
        if not self._users:
            self._is_idle.set()

    async def unload(self, drain_s: float | None = None) -> None:
        """Wait for the requests that use the version, then release its resources. `find` no longer returns it.

        After `drain_s` seconds, the requests that are left end with UNAVAILABLE, and runs of the model are not awaited.
        None waits for all of them: a new version does not cut the requests of the old one.
        """
        self.state = State.UNLOADING
        if drain_s is not None:
            self.end_within(drain_s)
        try:
            while self._users and not self._is_overdue:
                self._is_idle.clear()
                await self._is_idle.wait()
            await self._resources.aclose()
        finally:
            if self._end_timer is not None:
                self._end_timer.cancel()
        self._loaded = self._scheduler = self.decoupled = self.response_cache = self.arrival_order = None
        if self.statistics.expired_executed:
            rows = self.statistics.expired_executed
            log.error(
                "model %(model)s version %(version)d: %(rows)d rows were executed after their deadline",
                {"event": "model.expired_rows_run", "model": self.name, "version": self.number, "rows": rows},
            )
        log.info(
            "model %(model)s version %(version)d is unloaded",
            {"event": "model.unloaded", "model": self.name, "version": self.number},
        )

    def end_within(self, drain_s: float) -> None:
        """End the requests that are left after `drain_s` seconds, while the version is unloading."""
        if self._end_timer is None:
            self._end_timer = asyncio.get_running_loop().call_later(drain_s, self._end_requests)

    def _end_requests(self) -> None:
        """End all requests of the version: the time to unload is over."""
        if self._users:
            log.warning(
                "model %(model)s version %(version)d: %(requests)d requests did not end in time; "
                "the unload does not wait for them",
                {
                    "event": "model.unload_does_not_wait",
                    "model": self.name,
                    "version": self.number,
                    "requests": self._users,
                },
            )
        self._is_overdue = True
        if self._scheduler is not None:
            self._scheduler.end_all()
        # Set last: the outcomes are delivered before `unload` continues.
        self._is_idle.set()


def _has_sequences(loaded: Loaded) -> bool:
    if isinstance(loaded, Composed):
        return any(step.version.arrival_order is not None for step in loaded.plan.steps)
    return loaded.sequences is not None


async def _finished(work: asyncio.Future[Loaded], given_up: GivenUp) -> Loaded:
    """Wait for a loading thread. When cancelled, signal the thread and close its session once it ends."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        given_up.set()
        work.add_done_callback(_close)
        raise


def _close(work: asyncio.Future[Loaded]) -> None:
    if not work.cancelled() and work.exception() is None and (session := work.result().session) is not None:
        # In a thread: a model's own finalizer may take long.
        work.get_loop().run_in_executor(None, session.close)


def _reason(error: Exception) -> str:
    if isinstance(error, ShoalError):
        return error.message
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return "internal error while loading: the log of the service has the cause"
