"""The response cache of one model version: what was asked before is answered at once, and asked twice is run once.

    call ──key──> kept?  ──yes──> hit
                    │no
                  in flight?  ──yes──> wait for it: shared          (joined by any number of callers)
                    │no
                  take off: a task of its own submits the call ──> answer copied, kept, given to all who wait

A flight belongs to nobody: whoever leaves (cancelled, out of time) leaves the others theirs, and only when nobody is
left it is called off. When it fails for a cause that is not the request's own (its leader's time was over, the queue
was full), those who only joined it try again: one of them leads the next flight.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol
from weakref import WeakSet

from mesh.process.tasks import end
from services.infer.offload import offload_if_long
from services.infer.requests import ragged
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest
from services.infer.response_cache.key import ResponseKeys
from services.infer.response_cache.store import ResponseStore, frozen
from services.infer.scheduling.statistics import Statistics
from shoal.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, ShoalError
from shoal.inference.v2 import model_config_pb2
from shoal.inference.v2.inference_pb2 import InferParameter

TTL_KEY = "response_cache_ttl_ms"
"""Parameter of a model's configuration: how long an answer is good."""

_OF_THE_REQUEST = (InvalidArgument, Internal)
# The model's answer to this request, as an output would be: running it again would fail again.

_JOINS = 2
# Who has joined so many flights that failed runs alone: then a row of failures cannot hold anybody up.

_LONG_BYTES = 256 << 10
_LONG_ELEMENTS = 1 << 12
# Beyond these a digest or a copy takes longer than a hop to a thread.


class CacheState(StrEnum):
    """Where an answer comes from, as `explain` says it."""

    OFF = "off"
    HIT = "hit"
    """It was kept."""
    MISS = "miss"
    """It was computed for this call."""
    SHARED = "shared"
    """It was computed for another call, which asked the same at the same time."""


class RequestRunner(Protocol):
    """Runs calls: a Scheduler."""

    async def submit(self, call: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult: ...

    def is_waiting(self, call: InferenceRequest) -> bool:
        """Whether its execution has not begun."""


@dataclass(eq=False, slots=True)
class _Flight:
    call: InferenceRequest
    task: asyncio.Task[InferenceResult]
    waiting: int = 0
    """How many wait for it."""
    is_led: bool = True
    """Somebody answers for its execution: who took off, or who took over."""
    kept_ns: int = 0


class ResponseCache:
    """Answers calls of one model version. Use as `async with`: leaving forgets what was kept.

    Args:
        store: where answers are kept, shared by all models.
        ttl_s: how long an answer is good; infinite for as long as the version is loaded.
        clock: seconds; the one that deadlines are on.
    """

    def __init__(
        self,
        keys: ResponseKeys,
        runs: RequestRunner,
        store: ResponseStore,
        statistics: Statistics,
        *,
        ttl_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._runs = runs
        self._store = store
        self._statistics = statistics
        self._ttl_s = ttl_s
        self._clock = clock
        self._owner = store.owner()
        self._flights: dict[bytes, _Flight] = {}
        self._old: WeakSet[asyncio.Task[InferenceResult]] = WeakSet()  # In flight, and forgotten.

    async def __aenter__(self) -> ResponseCache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._store.drop(self._owner)
        await end(*(flight.task for flight in self._flights.values()), *self._old)

    def forget(self) -> None:
        """What was kept, and what is in flight, is of no use to calls from now on: the model answers otherwise."""
        self._store.drop(self._owner)
        self._owner = self._store.owner()
        self._old.update(flight.task for flight in self._flights.values())
        self._flights.clear()

    async def answer(
        self,
        call: InferenceRequest,
        parameters: Mapping[str, InferParameter],
        deadline: float = math.inf,
        tenant: str = "",
    ) -> tuple[InferenceResult, CacheState]:
        """The answer to `call`, and where it comes from; `parameters` are those of its request.

        Raises what `Scheduler.submit` does.
        """
        arrived, began = self._clock(), time.perf_counter_ns()
        key = await offload_if_long(lambda: self._keys.key(call, parameters), _is_long(call.size_bytes, call.inputs.values()))
        outputs = self._store.get(self._owner, key, self._clock())
        looked_ns = time.perf_counter_ns() - began
        if outputs is not None:
            self._statistics.hit(looked_ns, looked_ns)
            return InferenceResult(outputs, ExecutionTimes(), 0, "cache"), CacheState.HIT
        timeout_us = call.parameters.timeout_us
        expires = min(deadline, arrived + timeout_us / 1e6) if timeout_us else deadline
        for _ in range(_JOINS):
            flight = self._flights.get(key)
            if flight is None:
                return await self._lead(key, call, expires, tenant, looked_ns), CacheState.MISS
            if expires <= self._clock():  # Perhaps while it waited for a flight that failed.
                raise _too_late()
            answer = await self._join(key, flight, expires)
            if answer is not None:
                if flight.is_led:
                    self._statistics.hit(looked_ns, time.perf_counter_ns() - began)
                    return answer, CacheState.SHARED
                flight.is_led = True  # Its leader has left: this call takes its place in the counts.
                self._statistics.missed(looked_ns + flight.kept_ns)
                return answer, CacheState.MISS
        answer = await self._runs.submit(call, expires, tenant)
        self._statistics.missed(looked_ns)
        return answer, CacheState.MISS

    async def _lead(
        self, key: bytes, call: InferenceRequest, expires: float, tenant: str, looked_ns: int
    ) -> InferenceResult:
        flight = self._take_off(key, call, expires, tenant)
        try:
            await self._until_landed(key, flight, math.inf)
        except asyncio.CancelledError:
            flight.is_led = False
            raise
        try:
            answer = flight.task.result()
            self._statistics.missed(looked_ns + flight.kept_ns)
            return answer
        finally:
            del flight  # It holds an error whose trace holds this frame: a circle, and in it the whole request.

    async def _join(self, key: bytes, flight: _Flight, expires: float) -> InferenceResult | None:
        """The flight's answer; None when it failed, and not because of the request. Raises the request's own error."""
        await self._until_landed(key, flight, expires)
        if flight.task.cancelled():
            return None
        error = flight.task.exception()
        if error is None:
            return flight.task.result()
        if isinstance(error, _OF_THE_REQUEST):
            raise _again(error) from error
        return None

    def _take_off(self, key: bytes, call: InferenceRequest, expires: float, tenant: str) -> _Flight:
        task = asyncio.create_task(self._fly(key, call, expires, tenant), name="cached-call")
        task.add_done_callback(_look)
        flight = self._flights[key] = _Flight(call, task)
        return flight

    async def _fly(self, key: bytes, call: InferenceRequest, expires: float, tenant: str) -> InferenceResult:
        flight, owner = self._flights[key], self._owner
        try:
            answer = got = await self._runs.submit(call, expires, tenant)
            began = time.perf_counter_ns()
            size = sum(array.nbytes for output in got.outputs for array in ragged.arrays(output))
            if size <= self._store.largest_bytes:
                outputs = await offload_if_long(lambda: frozen(got.outputs), _is_long(size, got.outputs))
                answer = InferenceResult(outputs, got.times, got.queue_ns, got.fired)
                self._store.put(owner, key, outputs, expires=self._clock() + self._ttl_s)
            flight.kept_ns = time.perf_counter_ns() - began
            return answer
        finally:
            self._forget(key, flight)
            del flight

    async def _until_landed(self, key: bytes, flight: _Flight, expires: float) -> None:
        """Raises DeadlineExceeded when `expires` comes before the execution has begun."""
        flight.waiting += 1
        try:
            while not flight.task.done():
                left = expires - self._clock()
                if left <= 0 and self._runs.is_waiting(flight.call):
                    raise _too_late()
                # Once it runs, its answer comes as soon as it can, as that of a call of one's own would.
                await asyncio.wait((flight.task,), timeout=left if 0 < left < math.inf else None)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    def _forget(self, key: bytes, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def ttl_s(config: model_config_pb2.ModelConfig) -> float | None:
    """How long answers of this model are good, in seconds; None when its configuration asks for no response cache.

    Raises:
        FailedPrecondition: the model is of a kind whose answers cannot be kept, or the time is no number.
    """
    written = config.parameters[TTL_KEY].string_value.strip() if TTL_KEY in config.parameters else ""
    if written and (not re.fullmatch(r"[0-9]{1,12}", written) or not int(written)):
        raise FailedPrecondition(f"parameter {TTL_KEY} '{written}': expected a whole number of milliseconds, 1 or more")
    if not config.response_cache.enable:
        return None
    if config.HasField("sequence_batching"):
        raise FailedPrecondition(
            "response_cache.enable with sequence_batching is not supported: an answer depends on the requests before it"
        )
    if config.model_transaction_policy.decoupled:
        raise FailedPrecondition(
            "response_cache.enable with model_transaction_policy.decoupled is not supported: "
            "a request has any number of answers"
        )
    return int(written) / 1000 if written else math.inf


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "Request timeout expired while the same request of another caller waited: it was not executed"
    )


def _again(error: ShoalError) -> ShoalError:
    """The same for another caller: an exception that is raised twice collects the traces of both."""
    return type(error)(error.message, retry_after_ms=error.retry_after_ms)


def _look(task: asyncio.Task[InferenceResult]) -> None:
    if not task.cancelled():
        task.exception()  # Nobody may be left to look at it, which is no news for the log.


def _is_long(size_bytes: int, values: Iterable[Value]) -> bool:
    if size_bytes > _LONG_BYTES:
        return True
    return any(a.dtype == object and a.size > _LONG_ELEMENTS for value in values for a in ragged.arrays(value))
