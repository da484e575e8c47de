"""Runs requests of decoupled models: each by itself, any number of responses, no faster than its caller reads them.

    stream ──> admission (bounded, first come first served) ──> link of an instance ──responses──> caller
                                                                      ^──credit, cancel──┘

A response costs credit, which comes back as the caller takes it: a model that is faster than its caller is paused. A
caller that goes away cancels its request inside the model; its place is free when the model has let go of it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from services.infer.model_process import payload, request_info
from services.infer.model_process.channel import Message
from services.infer.model_process.checks import check_outputs
from services.infer.model_process.decoupled_streams import DecoupledStreams
from services.infer.model_process.session import ProcessSession, error_of
from services.infer.requests.outcome import ExecutionTimes
from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.statistics import Statistics
from shoal.errors import DeadlineExceeded, Internal, ResourceExhausted, ShoalError, Unavailable

CREDIT = 16
"""Responses of one request that may be on their way: enough to hide the hops, few enough to hold little memory."""

_RETRY_MS = 100
_UNWANTED_S = 30.0
# A request that the model has not let go of for so long after its caller has gone: the process is ended, unless others
# are being served by it.


@dataclass(frozen=True)
class Response:
    """One response of a decoupled model."""

    outputs: Sequence[Tensor] = ()
    error: ShoalError | None = None
    is_final: bool = False
    is_empty: bool = False
    """It carries nothing: it only says that there are no more."""


@dataclass(eq=False)
class _Place:
    """What a request holds until the model has let go of it."""

    link: DecoupledStreams
    call: InferenceRequest
    events: asyncio.Queue[Message | ShoalError] = field(default_factory=asyncio.Queue)  # Bounded by the credit.
    number: int = 0
    is_left: bool = False
    """Its caller has gone."""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


@dataclass(eq=False)
class _Waiter:
    call: InferenceRequest
    place: asyncio.Future[_Place]


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
        """`clock` gives seconds; it is the one that deadlines are on."""
        self._name, self._version = name, version
        self._session, self._limits = session, limits
        self._default_timeout_s = default_timeout_s
        self._statistics, self._clock = statistics, clock
        self._waiting: deque[_Waiter] = deque()
        self._places: set[_Place] = set()
        self._is_closing = False

    async def __aenter__(self) -> DecoupledScheduler:
        self._loop = asyncio.get_running_loop()
        self._session.on_streams_started = lambda: self._from_thread(self._seat)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._turn_away(self._unloading())
        for place in list(self._places):
            place.events.put_nowait(self._unloading())
            self._leave(place)

    async def stream(
        self, call: InferenceRequest, deadline: float = math.inf, tenant: str = ""
    ) -> AsyncGenerator[Response, None]:
        """Runs one request; the last response is final. Closing the generator cancels the request in the model.

        Args:
            deadline: on this scheduler's clock; it is not started at or after it, nor after its own `timeout`, and
                ends at it.

        Raises:
            ResourceExhausted: too many wait. DeadlineExceeded: its time was over.
            Unavailable: the model is being unloaded, or its process started again.
            Internal: the model's process died. What the model itself fails with is a response.
        """
        arrived = self._clock()
        place = await self._admitted(call, arrived, deadline)
        started = self._clock()
        self._begin(place, deadline)
        try:
            taken = 0
            while True:
                response = self._response(await place.events.get(), call)
                yield response
                if response.is_final:
                    break
                taken += 1
                if taken % (CREDIT // 2) == 0:
                    place.link.send_control(place.number, "credit", more=CREDIT // 2)
        finally:
            place.is_left = True
            if place in self._places:
                place.link.send_control(place.number, "cancel")
                place.timers.append(self._loop.call_later(_UNWANTED_S, self._is_stuck, place))
        self._count(call, arrived, started)

    def _unloading(self) -> Unavailable:
        return Unavailable(f"model '{self._name}' is being unloaded")

    async def _admitted(self, call: InferenceRequest, now: float, deadline: float) -> _Place:
        if self._is_closing:
            raise self._unloading()
        self._check_poison(call)
        timeout_us = call.parameters.timeout_us
        expires = min(deadline, now + self._default_timeout_s, now + timeout_us / 1e6 if timeout_us else math.inf)
        if expires <= now:
            self._statistics.expired += 1
            raise self._too_late()
        self._session.check_running()
        if not self._waiting and (link := self._free_link()) is not None:
            return self._taken(link, call)
        return await self._waited(call, expires - now)

    async def _waited(self, call: InferenceRequest, at_most_s: float) -> _Place:
        self._check_room(call)
        waiter = _Waiter(call, self._loop.create_future())
        self._waiting.append(waiter)
        timer = self._loop.call_later(at_most_s, self._expire, waiter) if at_most_s != math.inf else None
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
                self._leave(waiter.place.result())  # It was given a place just now.
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _check_room(self, call: InferenceRequest) -> None:
        waiting = sum(waiter.call.size_bytes for waiter in self._waiting)
        if len(self._waiting) >= self._limits.calls or (
            self._waiting and waiting + call.size_bytes > self._limits.size_bytes
        ):
            self._statistics.shed += 1
            raise ResourceExhausted(
                f"Exceeds maximum queue size of model '{self._name}': {len(self._waiting)} requests with {waiting} "
                f"bytes wait, at most {self._limits.calls} and {self._limits.size_bytes} may; "
                f"retry after {_RETRY_MS} ms",
                retry_after_ms=_RETRY_MS,
            )

    def _expire(self, waiter: _Waiter) -> None:
        if not waiter.place.done():
            self._statistics.expired += 1
            waiter.place.set_exception(self._too_late())

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Request timeout expired in the queue of model '{self._name}': it was not executed")

    def _check_poison(self, call: InferenceRequest) -> None:
        after_s = self._session.poison.rejected_for_s(call) if self._session.poison else 0.0
        if after_s:
            raise self._session.rejection(self._name, after_s)

    def _free_link(self) -> DecoupledStreams | None:
        at_work: dict[DecoupledStreams, int] = dict.fromkeys(self._session.streams(), 0)
        for place in self._places:
            if place.link in at_work:
                at_work[place.link] += 1
        free = min(at_work, key=lambda link: at_work[link], default=None)
        return free if free is not None and at_work[free] < self._session.limits.streams else None

    def _taken(self, link: DecoupledStreams, call: InferenceRequest) -> _Place:
        place = _Place(link, call)
        self._places.add(place)
        return place

    def _seat(self) -> None:
        """Gives free places to those that wait."""
        while self._waiting and (link := self._free_link()) is not None:
            waiter = self._waiting.popleft()
            if not waiter.place.done():
                waiter.place.set_result(self._taken(link, waiter.call))
        if self._waiting and not self._session.streams():
            try:
                self._session.check_running()
            except ShoalError as err:
                self._turn_away(err)

    def _turn_away(self, error: ShoalError) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.place.done():
                waiter.place.set_exception(type(error)(error.message, retry_after_ms=error.retry_after_ms))

    def _begin(self, place: _Place, deadline: float) -> None:
        call, session = place.call, self._session
        parts = [payload.part(name, session.datatypes[name], [array]) for name, array in call.tensors.items()]
        header: dict[str, Any] = {"outputs": [wanted.spec.name for wanted in call.outputs], "rows": []}
        header["credit"] = CREDIT
        if session.wants_requests:
            header["details"] = [request_info.of(call, self._name, self._version)]
        place.number = place.link.start(header, parts, lambda message: self._from_thread(self._arrived, place, message))
        if deadline != math.inf:
            late = DeadlineExceeded("Deadline Exceeded: the responses did not end in time")
            place.timers.append(self._loop.call_later(deadline - self._clock(), place.events.put_nowait, late))
        if session.limits.execution_s != math.inf:
            place.timers.append(self._loop.call_later(session.limits.execution_s, self._takes_too_long, place))

    def _from_thread(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            pass  # The loop is gone, and so is everybody who waited.

    def _arrived(self, place: _Place, message: Message | None) -> None:
        if message is None:
            self._blame(place.link)
            end = place.link.process.end
            place.events.put_nowait(
                Internal(f"Failed to process the request(s) for model '{self._name}': the model's process died ({end})")
            )
        elif not place.is_left:
            place.events.put_nowait(message)
        if message is None or message.op == "end" or message.header.get("final") is True:
            self._leave(place)

    def _leave(self, place: _Place) -> None:
        self._places.discard(place)
        for timer in place.timers:
            timer.cancel()
        self._seat()

    def _blame(self, link: DecoupledStreams) -> None:
        """Once for each link that breaks: whoever it was at work for may have been the cause."""
        if link.is_crash_recorded or self._is_closing:
            return
        link.is_crash_recorded = True
        calls = [place.call for place in self._places if place.link is link]
        self._session.poison.record_crash(calls, is_confirmed=link.process.is_own_crash())

    def _takes_too_long(self, place: _Place) -> None:
        ms = self._session.limits.execution_s * 1000
        place.link.process.kill(f"killed: a request took longer than execution_timeout_ms, {ms:.0f}")

    def _is_stuck(self, place: _Place) -> None:
        if place not in self._places:
            return
        if all(other.is_left for other in self._places if other.link is place.link):
            place.link.process.kill(f"killed: it went on for {_UNWANTED_S:.0f} s after everybody had gone")
        else:
            place.timers.append(self._loop.call_later(_UNWANTED_S, self._is_stuck, place))

    def _response(self, event: Message | ShoalError, call: InferenceRequest) -> Response:
        if isinstance(event, ShoalError):
            raise event
        if event.op == "end":
            return Response(is_final=True, is_empty=True)
        is_final = event.header.get("final") is True
        if "error" in event.header:
            return Response(error=error_of(event.header, self._name), is_final=is_final)
        outputs = [self._session.textual(array) for _, _, array in event.tensors]
        try:
            check_outputs(call, outputs)
        except ModelFailed as err:
            error = Internal(f"Failed to process the request(s) for model '{self._name}': {err}")
            return Response(error=error, is_final=is_final)
        return Response(outputs, is_final=is_final)

    def _count(self, call: InferenceRequest, arrived: float, started: float) -> None:
        now = self._clock()
        times = ExecutionTimes(call.rows, 0, int((now - started) * 1e9), 0)
        self._statistics.executed(times, time.time_ns() // 1_000_000)
        self._statistics.answered(times, queue_ns=int((started - arrived) * 1e9), total_ns=int((now - arrived) * 1e9))
