"""Delivery of outcomes: a request ends exactly once, and its receiver never runs inside another component's iteration.

    OPEN ──conclude──> CONCLUDED ──OutcomeQueue, end of the loop's iteration──> DELIVERED: its receiver was called
      └───abandon─────────┴───────────────────────────────────────────────────> ABANDONED: its receiver is dropped

A receiver may start, abandon or fail other requests. Schedulers, ensembles and sweeps of deadlines iterate over their
requests: a receiver that runs meanwhile would change what they iterate over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Protocol, TypeAlias

from services.infer.requests.outcome import InferenceResult

log = logging.getLogger(__name__)

Written: TypeAlias = Callable[[int], None]
"""Called with the nanoseconds in which the responses of an execution were written."""


class Receiver(Protocol):
    """Receives the outcome of one request: exactly one method is called, once, on the event loop."""

    @property
    def is_direct(self) -> bool:
        """True when the receiver starts and ends no other request, and may get a result inside `start`."""

    @property
    def writes(self) -> bool:
        """True when `succeeded` writes the response."""

    def succeeded(self, result: InferenceResult) -> None: ...

    def failed(self, error: BaseException) -> None: ...


class PendingRequest:
    """A request until its end, which it records exactly once: the first of its outcome and its abandonment counts."""

    __slots__ = ("is_abandoned", "outcome", "receiver")

    def __init__(self, receiver: Receiver) -> None:
        self.receiver: Receiver | None = receiver
        """None once the outcome is delivered, or the caller has left."""
        self.outcome: InferenceResult | BaseException | None = None
        """Set from the outcome until its delivery."""
        self.is_abandoned = False
        """True once no caller waits for a run of the request."""

    @property
    def is_over(self) -> bool:
        """True once the request has an outcome, or its caller has left."""
        return self.receiver is None or self.outcome is not None

    def conclude(self, outcome: InferenceResult | BaseException) -> bool:
        """Record the outcome. Return False, and change nothing, when the request is over."""
        if self.receiver is None or self.outcome is not None:
            return False
        self.outcome = outcome
        return True

    def abandon(self) -> bool:
        """Record that the caller has left. Return False once the outcome is delivered, and after a first call."""
        if self.receiver is None:
            return False
        self.receiver, self.is_abandoned = None, True
        return True

    def deliver(self) -> None:
        """Call the receiver with the recorded outcome, unless the caller has left."""
        receiver, outcome = self.receiver, self.outcome
        # The outcome is dropped, too: its arrays may be views of a large batch.
        self.receiver = self.outcome = None
        if receiver is None or outcome is None:
            return
        try:
            if isinstance(outcome, InferenceResult):
                receiver.succeeded(outcome)
            else:
                receiver.failed(outcome)
        # An error of one receiver must not affect the others.
        except Exception:
            log.exception("the receiver of an outcome failed", {"event": "model.receiver_failed"})


class _WriteTimer:
    """Stands before and behind the requests of an execution in the queue: two looks at the clock, however many."""

    __slots__ = ("_began_ns", "_written")

    def __init__(self, written: Written) -> None:
        self._written = written
        self._began_ns = 0

    def deliver(self) -> None:
        now = perf_counter_ns()
        if self._began_ns:
            self._written(now - self._began_ns)
        else:
            self._began_ns = now


def _writes(request: PendingRequest) -> bool:
    receiver = request.receiver
    return receiver is not None and receiver.writes and isinstance(request.outcome, InferenceResult)


class OutcomeQueue:
    """Concluded requests, delivered in order at the end of this iteration of the event loop.

    One queue serves all schedulers of a process. Only the event loop's thread uses it.
    """

    def __init__(self) -> None:
        # Bounded by the requests that the schedulers have admitted.
        self._concluded: deque[PendingRequest | _WriteTimer] = deque()
        self._will_deliver = False

    def add(self, request: PendingRequest) -> None:
        """Deliver a concluded request soon."""
        self._concluded.append(request)
        if not self._will_deliver:
            self._deliver_soon()

    def extend(self, requests: Sequence[PendingRequest], written: Written) -> None:
        """Deliver the concluded requests of an execution soon, in order. Receivers that write are timed for `written`.

        The first request decides for all: mostly, all receivers are of one kind.
        """
        if not requests:
            return
        if _writes(requests[0]):
            timer = _WriteTimer(written)
            self._concluded.append(timer)
            self._concluded.extend(requests)
            self._concluded.append(timer)
        else:
            self._concluded.extend(requests)
        if not self._will_deliver:
            self._deliver_soon()

    def add_direct(self, request: PendingRequest, written: Written) -> None:
        """Deliver a result now when its receiver allows that and no other outcome waits; else as `extend` does.

        Called last by a scheduler that iterates over nothing.
        """
        receiver = request.receiver
        if (
            self._concluded
            or self._will_deliver
            or receiver is None
            or not receiver.is_direct
            or not isinstance(request.outcome, InferenceResult)
        ):
            self.extend((request,), written)
        elif receiver.writes:
            began = perf_counter_ns()
            request.deliver()
            written(perf_counter_ns() - began)
        else:
            request.deliver()

    def _deliver_soon(self) -> None:
        self._will_deliver = True
        asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        concluded = self._concluded
        try:
            # Outcomes that receivers cause are delivered in the same pass, after the earlier ones.
            while concluded:
                concluded.popleft().deliver()
        finally:
            self._will_deliver = False
            # After an exception that stops the process, the loop may still run for a while.
            if concluded:
                self._deliver_soon()
