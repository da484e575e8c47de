"""What brings the requests of one model version to execution, as those see it who have requests: core, short way, cache.

There are several kinds; `models.scheduling` says which one a model gets. One kind keeps all promises of the others:
what was cancelled or is too late does not begin, the statistics count each request once, a full queue refuses at once.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.queue import Receiver

Ticket: TypeAlias = Any
"""What `start` gives for `abandon`: each kind's own."""


class RequestScheduler(Protocol):
    """Runs requests that have one answer each. Use as `async with`: leaving runs what still waits, then stops.

    Only the event loop's thread touches it.
    """

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    async def submit(self, request: InferenceRequest, deadline: float = math.inf, tenant: str = "") -> InferenceResult:
        """Runs one request. Cancelled, it abandons it.

        Args:
            deadline: on the server's clock; the request is not started at or after it, nor after its own `timeout`.
            tenant: whose request it is.

        Raises:
            ResourceExhausted: the queue is full, or too long for the request to be done in time.
            DeadlineExceeded: it could not be started in time, and was not.
            Internal: the model cannot process this request.
            Unavailable: the model is being unloaded.
        """

    def start(self, request: InferenceRequest, deadline: float, tenant: str, receiver: Receiver) -> Ticket:
        """As `submit`, without waiting: `receiver` is told, maybe before this returns. Raises what is clear at once."""

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for this answer any more: its receiver will not be called. Nothing happens when it was."""

    def is_waiting(self, request: InferenceRequest) -> bool:
        """Whether the execution of `request`, which was started here and is not answered yet, has not begun."""
