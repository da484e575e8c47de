"""Interface of the schedulers of one model version, as core, fast path and response cache use it.

There are several kinds; `models.scheduling` chooses one for each model. All keep the same promises: a cancelled or
expired request does not begin, the statistics count each request once, and a full queue rejects immediately.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.delivery import Receiver

Ticket: TypeAlias = Any
"""Result of `start`, for `abandon`: a `delivery.PendingRequest` of the scheduler's own type."""


class RequestScheduler(Protocol):
    """Runs requests that have one result each. Use as `async with`: leaving runs the queued requests, then stops.

    Only the event loop's thread uses a scheduler.
    """

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Run one request and return its result. Cancelled, it abandons the request.

        Args:
            deadline: on the server's clock; the request never starts at or after it, nor after its own `timeout`.
            tenant: the request's tenant.

        Raises:
            ResourceExhausted: the queue is full, or too long for the request's deadline.
            DeadlineExceeded: the request could not be started in time, and was not.
            Internal: the model cannot process this request.
            Unavailable: the model is being unloaded.
        """

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> Ticket:
        """Enqueue a request without waiting. Raises the errors that are known immediately.

        `receiver` is called at the end of an iteration of the event loop. Only a receiver with `is_direct` may be
        called before `start` returns.
        """

    def abandon(self, ticket: Ticket) -> bool:
        """Drop a request whose caller has left: its receiver is not called.

        Return False, without an effect, once the outcome is delivered or the request was abandoned.
        """

    def age_ns(self, ticket: Ticket) -> int:
        """Return the nanoseconds since a request arrived."""

    def end_all(self) -> None:
        """End all requests that are queued or running, with UNAVAILABLE; leaving then waits for none of them."""

    def is_waiting(self, request: InferenceRequest) -> bool:
        """Return True while the execution of `request` has not begun; `request` was started here and has no outcome."""
