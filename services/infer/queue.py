"""The calls that wait for one model version: bounded, in lanes of calls that can be stacked.

WAITING ──take──> RUNNING ──> answered
   └──expire, cancel──> gone: it is never executed
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from services.infer.batcher import BatchPolicy, Run, Wait, decide
from services.infer.execution import Outcome
from services.infer.request import Call
from shoal.errors import ResourceExhausted


@dataclass(eq=False)
class Pending:
    """One call from its arrival to its answer. The loop's thread writes; a worker thread only reads."""

    call: Call
    arrived: float
    """Seconds, on the scheduler's clock."""
    expires: float
    """Not to be started at or after this; infinite when nobody set a bound."""
    answer: asyncio.Future[Outcome]
    started: float = 0.0
    """When it was taken from the queue."""
    is_running: bool = False
    is_abandoned: bool = False
    """Nobody waits for the answer any more."""

    @property
    def rows(self) -> int:
        return self.call.rows

    @property
    def size_bytes(self) -> int:
        return self.call.size_bytes

    def is_dead(self, now: float) -> bool:
        """Whether running it would be work for nobody."""
        return self.is_abandoned or now >= self.expires


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of one model version's queue."""

    calls: int = 2048
    """About a second of what one process answers at its fastest: what would wait longer is better off elsewhere."""
    size_bytes: int = 256 << 20
    """Inputs that wait are memory held: two of the largest requests, or many small ones."""


@dataclass
class Queue:
    """Adds at the back, takes batches from the front."""

    model: str
    limits: QueueLimits
    policy: BatchPolicy
    size_bytes: int = 0
    rows: int = 0
    _lanes: dict[Hashable, deque[Pending]] = field(default_factory=dict)
    _calls: int = 0

    def __len__(self) -> int:
        return self._calls

    def add(self, pending: Pending, retry_after_ms: Callable[[], int]) -> None:
        """Puts a call at the back of its lane.

        Raises:
            ResourceExhausted: the queue is full, and may have room in `retry_after_ms()`. An empty one takes any call.
        """
        size = self.size_bytes + pending.size_bytes
        if self._calls >= self.limits.calls or (self._calls and size > self.limits.size_bytes):
            after_ms = retry_after_ms()
            raise ResourceExhausted(
                f"Exceeds maximum queue size of model '{self.model}': {self._calls} requests with {self.size_bytes} "
                f"bytes wait, at most {self.limits.calls} and {self.limits.size_bytes} may; "
                f"retry after {after_ms} ms",
                retry_after_ms=after_ms,
            )
        self._lanes.setdefault(pending.call.key, deque()).append(pending)
        self._count(pending, 1)

    def discard(self, pending: Pending) -> bool:
        """Takes one call out; False when it was not in (any more)."""
        if pending.is_running:
            return False
        lane = self._lanes.get(pending.call.key)
        if lane is None or pending not in lane:
            return False
        lane.remove(pending)
        self._drop_empty(pending.call.key)
        self._count(pending, -1)
        return True

    def holds(self, call: Call) -> bool:
        """Whether `call` waits here."""
        return any(pending.call is call for pending in self._lanes.get(call.key, ()))

    def take(self, now: float, *, is_late: bool = False) -> Sequence[Pending] | Wait:
        """The next batch, marked as running; or how long to wait for one. `is_late`: nothing is worth waiting for."""
        keys = list(self._lanes)
        decision = decide([self._lanes[key] for key in keys], math.inf if is_late else now, self.policy)
        if not isinstance(decision, Run):
            return decision
        lane = self._lanes[keys[decision.lane]]
        batch = [lane.popleft() for _ in range(decision.count)]
        self._drop_empty(keys[decision.lane])
        for pending in batch:
            pending.is_running, pending.started = True, now
            self._count(pending, -1)
        return batch

    def _drop_empty(self, key: Hashable) -> None:
        if not self._lanes[key]:
            del self._lanes[key]

    def _count(self, pending: Pending, sign: int) -> None:
        self._calls += sign
        self.rows += sign * pending.rows
        self.size_bytes += sign * pending.size_bytes
