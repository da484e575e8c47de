"""Response cache of one model version: a repeated request is served from the store, concurrent equal ones run once.

    request ──key──> stored?  ──yes──> hit
                     │no
                   in flight?  ──yes──> wait for that flight: shared     (joined by any number of the tenant's callers)
                     │no
                   start a flight: a task submits the request ──> outputs copied, stored, given to all who wait

A flight (single-flight execution) has no owner: a caller that leaves (cancelled, expired) does not end it for the
others, and it is cancelled when none is left. When a flight fails for a cause other than the request itself (its
leader expired, the queue was full), the callers that joined it retry: one of them leads the next flight.

Requests of one priority share a flight: none is delayed by a leader with a worse one. A request of a model (an inner
call) shares none, since the flight's run may wait for this request itself.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from types import TracebackType
from typing import Protocol, TypeAlias
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
from shoal.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, ShoalError, Unavailable
from shoal.inference.v2 import model_config_pb2
from shoal.inference.v2.inference_pb2 import InferParameter

TTL_KEY = "response_cache_ttl_ms"
"""Parameter of a model's configuration: lifetime of a stored response."""

# Errors that the model gives to this request: running it again would fail again.
_REQUEST_ERRORS = (InvalidArgument, Internal)

# Flights that a request joins before it runs alone: repeated failures of flights cannot delay it further.
_MAX_JOINS = 2

# Callers of one flight that go on in one iteration of the event loop: each response takes some 50 us, and thousands of
# callers may wait for one run.
_WOKEN_AT_ONCE = 64

# Beyond these bounds, a digest or a copy takes longer than a handoff to a thread.
_LONG_BYTES = 256 << 10
_LONG_ELEMENTS = 1 << 12


FlightKey: TypeAlias = tuple[bytes, int, object]
"""Key of the request, its priority, and its inner call, if any."""


class CacheState(StrEnum):
    """Source of a result, as `explain` reports it."""

    OFF = "off"
    HIT = "hit"
    """From the store."""
    MISS = "miss"
    """Computed for this request."""
    SHARED = "shared"
    """Computed for an equal request of another caller at the same time."""


class RequestRunner(Protocol):
    """A scheduler as the cache uses it."""

    async def submit(
        self, request: InferenceRequest, deadline: float = math.inf, tenant: str = ""
    ) -> InferenceResult: ...

    def is_waiting(self, request: InferenceRequest) -> bool:
        """Return True while the request's execution has not begun."""


@dataclass(eq=False, slots=True)
class _Flight:
    request: InferenceRequest
    task: asyncio.Task[InferenceResult]
    waiters: dict[asyncio.Future[None], None] = field(default_factory=dict)
    """Callers that wait for it, in the order of their arrival."""
    has_leader: bool = True
    """True while a caller counts the execution as its own: the one that started it, or took it over."""
    store_ns: int = 0

    def wake(self, _: object = None) -> None:
        """Wake the callers of a flight that has ended, some in each iteration of the event loop."""
        for waiter in list(islice(self.waiters, _WOKEN_AT_ONCE)):
            del self.waiters[waiter]
            waiter.set_result(None)
        if self.waiters:
            asyncio.get_running_loop().call_soon(self.wake)


class ResponseCache:
    """Response cache of one model version. Use as `async with`: leaving drops the stored outputs.

    Args:
        store: table of outputs, shared by all models.
        ttl_s: lifetime of outputs; infinite for as long as the version is loaded.
        clock: seconds; deadlines are on this clock.
    """

    def __init__(
        self,
        keys: ResponseKeys,
        runner: RequestRunner,
        store: ResponseStore,
        statistics: Statistics,
        *,
        ttl_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._runner = runner
        self._store = store
        self._statistics = statistics
        self._ttl_s = ttl_s
        self._clock = clock
        self._owner = store.owner()
        self._flights: dict[FlightKey, _Flight] = {}
        self._detached_tasks: WeakSet[asyncio.Task[InferenceResult]] = WeakSet()

    async def __aenter__(self) -> ResponseCache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._store.drop(self._owner)
        await end(*(flight.task for flight in self._flights.values()), *self._detached_tasks)

    def forget(self) -> None:
        """Drop the stored outputs and detach the flights, because the model has changed."""
        self._store.drop(self._owner)
        self._owner = self._store.owner()
        self._detached_tasks.update(flight.task for flight in self._flights.values())
        self._flights.clear()

    async def result(
        self,
        request: InferenceRequest,
        parameters: Mapping[str, InferParameter],
        deadline: float = math.inf,
        tenant: str = "",
    ) -> tuple[InferenceResult, CacheState]:
        """Return the result of `request` and its source; `parameters` are those of the request's message.

        Raises as `Scheduler.submit` does.
        """
        arrived, began = self._clock(), time.perf_counter_ns()
        key = await offload_if_long(
            lambda: self._keys.key(request, parameters, tenant), _is_long(request.size_bytes, request.inputs.values())
        )
        outputs = self._store.get(self._owner, key, self._clock())
        lookup_ns = time.perf_counter_ns() - began
        if outputs is not None:
            self._statistics.hit(lookup_ns, lookup_ns)
            return InferenceResult(outputs, ExecutionTimes(), 0, "cache"), CacheState.HIT
        timeout_us = request.parameters.timeout_us
        expires = min(deadline, arrived + timeout_us / 1e6) if timeout_us else deadline
        flight_key: FlightKey = key, request.parameters.priority, request.parameters.inner_call
        for _ in range(_MAX_JOINS):
            flight = self._flights.get(flight_key)
            if flight is None:
                return await self._lead(flight_key, request, expires, tenant, lookup_ns), CacheState.MISS
            # Expired, perhaps while it waited for a flight that failed.
            if expires <= self._clock():
                raise self._expired_error()
            result = await self._join(flight_key, flight, expires)
            if result is not None:
                if flight.has_leader:
                    self._statistics.hit(lookup_ns, time.perf_counter_ns() - began)
                    return result, CacheState.SHARED
                # The leader has left: this request is counted in its place.
                flight.has_leader = True
                self._statistics.missed(lookup_ns + flight.store_ns)
                return result, CacheState.MISS
        result = await self._runner.submit(request, expires, tenant)
        self._statistics.missed(lookup_ns)
        return result, CacheState.MISS

    async def _lead(
        self, key: FlightKey, request: InferenceRequest, expires: float, tenant: str, lookup_ns: int
    ) -> InferenceResult:
        flight = self._start_flight(key, request, expires, tenant)
        try:
            await self._wait_for(key, flight, math.inf)
        except asyncio.CancelledError:
            flight.has_leader = False
            raise
        try:
            if flight.task.cancelled():
                raise Unavailable("the model is being unloaded")
            result = flight.task.result()
            self._statistics.missed(lookup_ns + flight.store_ns)
            return result
        finally:
            # Its error's traceback refers to this frame: without `del`, a reference cycle keeps the request in memory.
            del flight

    async def _join(self, key: FlightKey, flight: _Flight, expires: float) -> InferenceResult | None:
        """Return the flight's result; None when it failed for a cause other than the request.

        Raises the request's own error.
        """
        await self._wait_for(key, flight, expires)
        if flight.task.cancelled():
            return None
        error = flight.task.exception()
        if error is None:
            return flight.task.result()
        if isinstance(error, _REQUEST_ERRORS):
            raise _copy_of_error(error) from error
        return None

    def _start_flight(self, key: FlightKey, request: InferenceRequest, expires: float, tenant: str) -> _Flight:
        task = asyncio.create_task(self._execute(key, request, expires, tenant), name="cached-call")
        task.add_done_callback(_retrieve_exception)
        flight = self._flights[key] = _Flight(request, task)
        task.add_done_callback(flight.wake)
        return flight

    async def _execute(self, key: FlightKey, request: InferenceRequest, expires: float, tenant: str) -> InferenceResult:
        flight, owner = self._flights[key], self._owner
        try:
            result = computed = await self._runner.submit(request, expires, tenant)
            began = time.perf_counter_ns()
            size = sum(array.nbytes for output in computed.outputs for array in ragged.arrays(output))
            if size <= self._store.largest_bytes:
                outputs = await offload_if_long(lambda: frozen(computed.outputs), _is_long(size, computed.outputs))
                result = InferenceResult(outputs, computed.times, computed.queue_ns, computed.fired)
                self._store.put(owner, key[0], outputs, expires=self._clock() + self._ttl_s)
            flight.store_ns = time.perf_counter_ns() - began
            return result
        finally:
            self._remove_flight(key, flight)
            del flight

    async def _wait_for(self, key: FlightKey, flight: _Flight, expires: float) -> None:
        """Wait for the flight's end. Raises DeadlineExceeded when `expires` passes before the execution has begun."""
        waiter = asyncio.get_running_loop().create_future()
        flight.waiters[waiter] = None
        try:
            while not waiter.done():
                remaining_s = expires - self._clock()
                if remaining_s <= 0 and self._runner.is_waiting(flight.request):
                    raise self._expired_error()
                # A running execution is awaited beyond `expires`, as one of the request's own would be.
                await asyncio.wait((waiter,), timeout=remaining_s if 0 < remaining_s < math.inf else None)
        except asyncio.CancelledError:
            # The scheduler counts the last one, with the flight.
            self._statistics.cancelled += len(flight.waiters) > 1
            raise
        finally:
            flight.waiters.pop(waiter, None)
            if not flight.waiters and not flight.task.done():
                self._remove_flight(key, flight)
                flight.task.cancel()

    def _expired_error(self) -> DeadlineExceeded:
        self._statistics.expired += 1
        return DeadlineExceeded(
            "Request timeout expired while the same request of another caller waited: it was not executed"
        )

    def _remove_flight(self, key: FlightKey, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def ttl_s(config: model_config_pb2.ModelConfig) -> float | None:
    """Return the lifetime of a model's responses in seconds; None when the configuration enables no response cache.

    Raises:
        FailedPrecondition: the model is of a kind that cannot be cached, or the lifetime is not a number.
    """
    ttl_text = config.parameters[TTL_KEY].string_value.strip() if TTL_KEY in config.parameters else ""
    if ttl_text and (not re.fullmatch(r"[0-9]{1,12}", ttl_text) or not int(ttl_text)):
        raise FailedPrecondition(
            f"parameter {TTL_KEY} '{ttl_text}': expected a whole number of milliseconds, 1 or more"
        )
    if not config.response_cache.enable:
        return None
    if config.HasField("sequence_batching"):
        raise FailedPrecondition(
            "response_cache.enable with sequence_batching is not supported: "
            "a response depends on the requests before it"
        )
    if config.model_transaction_policy.decoupled:
        raise FailedPrecondition(
            "response_cache.enable with model_transaction_policy.decoupled is not supported: "
            "a request has any number of responses"
        )
    return int(ttl_text) / 1000 if ttl_text else math.inf


def _copy_of_error(error: ShoalError) -> ShoalError:
    """Return a copy for another caller: an exception that is raised twice collects both tracebacks."""
    return type(error)(error.message, retry_after_ms=error.retry_after_ms)


def _retrieve_exception(task: asyncio.Task[InferenceResult]) -> None:
    if not task.cancelled():
        # Without a remaining caller, asyncio would log the error as never retrieved.
        task.exception()


def _is_long(size_bytes: int, values: Iterable[Value]) -> bool:
    if size_bytes > _LONG_BYTES:
        return True
    return any(a.dtype == object and a.size > _LONG_ELEMENTS for value in values for a in ragged.arrays(value))
