"""Scheduler of decoupled models: each request runs alone, gives any number of responses, and is paced by its caller.

    stream ──> admission (bounded, tenants take turns) ──> link of an instance ──responses──> caller
                                                                 ^──credit, cancel──┘

A response costs credit, which is returned when the caller reads it: a model that is faster than its caller is paused.
A request begins with little credit, since nothing is known about the size of its responses.
A tenant that holds fewer places is next, and one with a name leaves a ninth of the places to others: its requests
may last for as long as their callers want.
When a caller leaves, its request is cancelled in the model; the slot is free once the model has ended the request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from services.infer.model_process import payload, request_info
from services.infer.model_process.channel import Message
from services.infer.model_process.checks import check_outputs
from services.infer.model_process.decoupled_streams import DecoupledStreams
from services.infer.model_process.inner_calls import ModelRun, OuterCall
from services.infer.model_process.session import ProcessSession, error_of
from services.infer.requests.outcome import ExecutionTimes
from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.senders import Senders
from services.infer.scheduling.statistics import Shed, Statistics
from shoal.errors import DeadlineExceeded, Internal, ResourceExhausted, ShoalError, Unavailable

T = TypeVar("T")

CREDIT = 16
"""Responses of one request that may be in flight: enough to hide the handoffs, few enough to hold little memory."""

# Of large responses fewer are in flight: 240 requests whose clients did not read held 16 MiB each.
_FIRST_CREDIT, _IN_FLIGHT_BYTES = 2, 2 << 20

_RETRY_MS = 100

# A tenant with a name may hold so many times the places that are free.
_FREE_FACTOR = 8

# Beyond it, reading all bytes takes longer than a handoff to a thread.
_LONG_BYTES = 256 << 10

# Time for a request to end after its caller left. Then its process is killed, unless it serves other requests.
_CANCEL_GRACE_S = 30.0


@dataclass(frozen=True)
class Response:
    """One response of a decoupled model."""

    outputs: Sequence[Tensor] = ()
    error: ShoalError | None = None
    is_final: bool = False
    is_empty: bool = False
    """True for a response without outputs, which only ends the request."""


@dataclass(eq=False)
class _ActiveStream:
    """A request in its slot, until the model has ended it."""

    link: DecoupledStreams
    request: InferenceRequest
    tenant: str
    run: ModelRun
    # Bounded by the credit.
    events: asyncio.Queue[Message | ShoalError] = field(default_factory=asyncio.Queue)
    number: int = 0
    credit: int = 0
    """Responses that the model may send, or has sent and the caller has not read."""
    is_abandoned: bool = False
    """True once the caller has left."""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


@dataclass(eq=False)
class _Waiter:
    request: InferenceRequest
    outer: OuterCall
    admitted: asyncio.Future[_ActiveStream]
    sender: tuple[str, Hashable] = ("", None)
    """Tenant of the request and sender of its call."""
    is_waiting: bool = True


class DecoupledScheduler:
    """Runs the requests of one version of a decoupled model. Use as `async with`."""

    def __init__(
        self,
        name: str,
        version: int,
        session: ProcessSession,
        limits: QueueLimits,
        *,
        default_timeout_s: float = math.inf,
        statistics: Statistics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Schedule requests to the processes of `session`; `clock` gives seconds, and deadlines are on it."""
        self._name, self._version = name, version
        self._session, self._limits = session, limits
        self._default_timeout_s = default_timeout_s
        self._statistics, self._clock = statistics, clock
        self._waiting: Senders[_Waiter] = Senders({})
        self._streams: set[_ActiveStream] = set()
        self._is_closing = False

    async def __aenter__(self) -> DecoupledScheduler:
        self._loop = asyncio.get_running_loop()
        self._session.on_streams_started = lambda: self._from_thread(self._admit_waiting)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._reject_waiting(self._unloading_error())
        for stream in list(self._streams):
            stream.events.put_nowait(self._unloading_error())
            self._release(stream)

    async def stream(
        self, request: InferenceRequest, deadline: float = math.inf, tenant: str = ""
    ) -> AsyncGenerator[Response, None]:
        """Run one request; the last response is final. Closing the generator cancels the request in the model.

        Args:
            deadline: on this scheduler's clock; the request never starts at or after it, nor after its own `timeout`,
                and ends at the deadline.

        Raises:
            ResourceExhausted: the queue is full. DeadlineExceeded: the request expired.
            Unavailable: the model is being unloaded, or its process restarted.
            Internal: the model's process died. An error of the model itself is a response.
        """
        arrived = self._clock()
        outer = OuterCall(deadline, tenant, request.parameters.priority)
        stream = await self._admit(request, arrived, outer)
        started = self._clock()
        try:
            self._start(stream, deadline)
        except BaseException:
            self._release(stream)
            raise
        try:
            is_first = True
            while True:
                event = await stream.events.get()
                response = self._response(event, request)
                if isinstance(event, Message) and not response.is_final:
                    _renew_credit(stream, event.tensor_bytes)
                if is_first and not response.is_empty:
                    self._statistics.responded_first(request.trace, self._clock() - arrived)
                    is_first = False
                yield response
                # The tensors exist until the caller has written the response, and asks for the next one.
                if isinstance(event, Message):
                    request.memory.release(event.tensor_bytes)
                if response.is_final:
                    break
                # Nothing of them is counted any more, and the next one may be far away.
                del event, response
        # The caller has left, or its deadline has passed while the request ran.
        except (asyncio.CancelledError, GeneratorExit, DeadlineExceeded):
            self._statistics.cancelled += 1
            raise
        finally:
            stream.is_abandoned = True
            stream.run.end()
            if stream in self._streams:
                stream.link.send_control(stream.number, "cancel")
                stream.timers.append(self._loop.call_later(_CANCEL_GRACE_S, self._kill_if_stuck, stream))
        self._count(request, arrived, started)

    def _unloading_error(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' is being unloaded")

    async def _admit(self, request: InferenceRequest, now: float, outer: OuterCall) -> _ActiveStream:
        await self._check_poison(request)
        if self._is_closing:
            raise self._unloading_error()
        timeout_us = request.parameters.timeout_us
        expires = min(outer.deadline, now + self._default_timeout_s, now + timeout_us / 1e6 if timeout_us else math.inf)
        if expires <= now:
            self._statistics.expired += 1
            raise self._expired_error()
        self._session.check_running()
        # Those that wait find no place now: all are taken, or left to others.
        tenant = outer.tenant
        if tenant not in self._waiting and (link := self._free_link()) and self._may_hold(tenant, self._held()[tenant]):
            return self._occupy(link, request, outer)
        return await self._wait_for_slot(request, outer, expires - now)

    async def _wait_for_slot(self, request: InferenceRequest, outer: OuterCall, at_most_s: float) -> _ActiveStream:
        self._make_room(request, outer.tenant)
        waiter = _Waiter(request, outer, self._loop.create_future())
        self._waiting.add(waiter, outer.tenant)
        timer = self._loop.call_later(at_most_s, self._expire, waiter) if at_most_s != math.inf else None
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            self._statistics.cancelled += 1
            if waiter.admitted.done() and not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
                # A slot was assigned at the same time.
                self._release(waiter.admitted.result())
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._remove(waiter)

    def _remove(self, waiter: _Waiter) -> None:
        """Remove a request from the waiting ones, if it is one."""
        if waiter.is_waiting:
            waiter.is_waiting = False
            self._waiting.remove(waiter)

    def _make_room(self, request: InferenceRequest, tenant: str) -> None:
        """Evict requests of another sender when the queue is full. Raises ResourceExhausted when none has more."""
        waiting, limits = self._waiting, self._limits
        excess_bytes = waiting.size_bytes + request.size_bytes - limits.size_bytes if waiting.count else 0
        if waiting.count < limits.calls and excess_bytes <= 0:
            return
        error = ResourceExhausted(
            f"Exceeds maximum queue size of model '{self._name}': {waiting.count} requests with {waiting.size_bytes} "
            f"bytes wait, at most {limits.calls} and {limits.size_bytes} may; retry after {_RETRY_MS} ms",
            retry_after_ms=_RETRY_MS,
        )
        victims = waiting.victims(request, tenant, calls=waiting.count + 1 - limits.calls, size_bytes=excess_bytes)
        self._statistics.shed_by[Shed.QUEUE_FULL] += len(victims) or 1
        if not victims:
            raise error
        for waiter in victims:
            self._reject(waiter, error)

    def _reject(self, waiter: _Waiter, error: ShoalError) -> None:
        self._remove(waiter)
        if not waiter.admitted.done():
            waiter.admitted.set_exception(type(error)(error.message, retry_after_ms=error.retry_after_ms))

    def _expire(self, waiter: _Waiter) -> None:
        if not waiter.admitted.done():
            self._statistics.expired += 1
            waiter.admitted.set_exception(self._expired_error())

    def _expired_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Request timeout expired in the queue of model '{self._name}': it was not executed")

    async def _check_poison(self, request: InferenceRequest) -> None:
        poison = self._session.poison
        if poison and (after_s := await self._fingerprinting(partial(poison.rejected_for_s, request), [request])):
            raise self._session.rejection(self._name, after_s)

    def _fingerprinting(self, work: Callable[[], T], requests: Sequence[InferenceRequest]) -> asyncio.Future[T]:
        """Do `work` that reads all bytes of some requests: on a thread, when they are large."""
        if sum(request.size_bytes for request in requests) > _LONG_BYTES:
            return self._loop.run_in_executor(None, work)
        done: asyncio.Future[T] = self._loop.create_future()
        done.set_result(work())
        return done

    def _free_link(self) -> DecoupledStreams | None:
        in_flight: dict[DecoupledStreams, int] = dict.fromkeys(self._session.streams(), 0)
        for stream in self._streams:
            if stream.link in in_flight:
                in_flight[stream.link] += 1
        free = min(in_flight, key=lambda link: in_flight[link], default=None)
        return free if free is not None and in_flight[free] < self._session.limits.streams else None

    def _may_hold(self, tenant: str, held: int) -> bool:
        """Return True when a tenant that holds `held` places may take a free one, and leaves enough to others."""
        free = len(self._session.streams()) * self._session.limits.streams - len(self._streams)
        return not tenant or not held or held + 1 <= _FREE_FACTOR * (free - 1)

    def _held(self) -> Counter[Hashable]:
        """Return the places that are held, by tenant, and by tenant and sender."""
        held: Counter[Hashable] = Counter()
        for stream in self._streams:
            held[stream.tenant] += 1
            held[stream.tenant, stream.request.memory.sender] += 1
        return held

    def _occupy(self, link: DecoupledStreams, request: InferenceRequest, outer: OuterCall) -> _ActiveStream:
        stream = _ActiveStream(link, request, outer.tenant, ModelRun(self._session, lambda: outer))
        self._streams.add(stream)
        return stream

    def _admit_waiting(self) -> None:
        """Assign free slots to waiting requests."""
        while self._waiting.count and (link := self._free_link()) is not None:
            waiter = self._next_waiter()
            if waiter is None:
                break
            if not waiter.admitted.done():
                waiter.admitted.set_result(self._occupy(link, waiter.request, waiter.outer))
        if self._waiting.count and not self._session.streams():
            try:
                self._session.check_running()
            except ShoalError as err:
                self._reject_waiting(err)

    def _next_waiter(self) -> _Waiter | None:
        held = self._held()
        waiter = self._waiting.pop_next(held, lambda tenant: self._may_hold(tenant, held[tenant]))
        if waiter is not None:
            waiter.is_waiting = False
        return waiter

    def _reject_waiting(self, error: ShoalError) -> None:
        for waiter in self._waiting.items():
            self._reject(waiter, error)

    def _start(self, stream: _ActiveStream, deadline: float) -> None:
        request, session = stream.request, self._session
        parts = [payload.part(name, session.datatypes[name], [array]) for name, array in request.tensors.items()]
        header: dict[str, Any] = {"outputs": [requested.spec.name for requested in request.outputs], "rows": []}
        header["credit"] = stream.credit = _FIRST_CREDIT
        if session.wants_requests:
            header["details"] = [request_info.of(request, self._name, self._version)]
        stream.number = stream.link.start(
            header, parts, stream.run, lambda message: self._from_thread(self._on_message, stream, message)
        )
        if deadline != math.inf:
            late = DeadlineExceeded("Deadline Exceeded: the responses did not end in time")
            stream.timers.append(self._loop.call_later(deadline - self._clock(), stream.events.put_nowait, late))
        if session.limits.execution_s != math.inf:
            stream.timers.append(self._loop.call_later(session.limits.execution_s, self._kill_overdue, stream))

    def _from_thread(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # The loop is closed: no caller waits.

    def _on_message(self, stream: _ActiveStream, message: Message | None) -> None:
        if message is None:
            self._blame(stream.link)
            end = stream.link.process.end
            stream.events.put_nowait(
                Internal(f"Failed to process the request(s) for model '{self._name}': the model's process died ({end})")
            )
        elif not stream.is_abandoned:
            try:
                stream.request.memory.hold(message.tensor_bytes)
                stream.events.put_nowait(message)
            except ResourceExhausted as err:
                stream.events.put_nowait(err)
        if message is None or message.op == "end" or message.header.get("final") is True:
            if message is not None:
                poison = self._session.poison
                if poison:
                    self._fingerprinting(partial(poison.record_success, [stream.request]), [stream.request])
            self._release(stream)

    def _release(self, stream: _ActiveStream) -> None:
        self._streams.discard(stream)
        for timer in stream.timers:
            timer.cancel()
        self._admit_waiting()

    def _blame(self, link: DecoupledStreams) -> None:
        """Report the active requests of a broken link as possible poison requests, once for each link."""
        if link.is_crash_recorded or self._is_closing:
            return
        link.is_crash_recorded = True
        requests = [stream.request for stream in self._streams if stream.link is link]
        is_confirmed = link.process.is_own_crash()
        self._fingerprinting(partial(self._session.poison.record_crash, requests, is_confirmed=is_confirmed), requests)

    def _kill_overdue(self, stream: _ActiveStream) -> None:
        ms = self._session.limits.execution_s * 1000
        stream.link.process.kill(f"killed: a request took longer than execution_timeout_ms, {ms:.0f}")

    def _kill_if_stuck(self, stream: _ActiveStream) -> None:
        if stream not in self._streams:
            return
        if all(other.is_abandoned for other in self._streams if other.link is stream.link):
            stream.link.process.kill(f"killed: it still ran {_CANCEL_GRACE_S:.0f} s after all callers had left")
        else:
            stream.timers.append(self._loop.call_later(_CANCEL_GRACE_S, self._kill_if_stuck, stream))

    def _response(self, event: Message | ShoalError, request: InferenceRequest) -> Response:
        if isinstance(event, ShoalError):
            raise event
        if event.op == "end":
            return Response(is_final=True, is_empty=True)
        is_final = event.header.get("final") is True
        if "error" in event.header:
            return Response(error=error_of(event.header, self._name), is_final=is_final)
        outputs = [self._session.textual(array) for _, _, array in event.tensors]
        try:
            check_outputs(request, outputs)
        except ModelFailed as err:
            error = Internal(f"Failed to process the request(s) for model '{self._name}': {err}")
            return Response(error=error, is_final=is_final)
        return Response(outputs, is_final=is_final)

    def _count(self, request: InferenceRequest, arrived: float, started: float) -> None:
        now = self._clock()
        times = ExecutionTimes(request.rows, 0, int((now - started) * 1e9), 0)
        self._statistics.executed(times, time.time_ns() // 1_000_000)
        self._statistics.succeeded(times, queue_ns=int((started - arrived) * 1e9), total_ns=int((now - arrived) * 1e9))
        if request.trace is not None:
            self._statistics.traced(request.trace, times, queue_s=started - arrived, total_s=now - arrived)


def _renew_credit(stream: _ActiveStream, response_bytes: int) -> None:
    """Return the credit of a response that the caller reads, up to what may be in flight of responses like it."""
    stream.credit -= 1
    most = min(max(_IN_FLIGHT_BYTES // max(response_bytes, 1), 1), CREDIT)
    if stream.credit <= most // 2:
        stream.link.send_control(stream.number, "credit", more=most - stream.credit)
        stream.credit = most
