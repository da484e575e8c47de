"""Whether requests that can be run together should be run now: pure functions of what waits, and of the time.

delay 0 (the default)    run what is there: an idle server never waits, a busy one finds its batches in the queue
delay > 0                wait until the batch is full, has a preferred size, or its first request has waited that long
a goal (`slo_ms`)        `slo`: as late as the goal allows, where waiting pays
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


class BatchCandidate(Protocol):
    """What the policies see of a waiting request."""

    @property
    def rows(self) -> int: ...

    @property
    def due(self) -> float:
        """When it should have been answered, in seconds on the clock that `now` is of; infinite for no goal."""
        ...


@dataclass(frozen=True)
class BatchPolicy:
    """How a model is batched."""

    max_rows: int
    """Rows at most in one execution; a request with more runs alone. 1: requests run one by one."""
    max_bytes: int
    """Bytes of inputs at most in one execution; a request with more runs alone."""
    delay_s: float = 0.0
    """How long the first request of a batch may wait for company."""
    preferred: frozenset[int] = frozenset()
    """Sizes in rows that are not worth waiting beyond."""
    slo_s: float = math.inf
    """Within how long requests should be answered. It forms the batches unless delay or preferred sizes are given."""

    @property
    def is_static(self) -> bool:
        """Whether the operator has said how to wait."""
        return self.delay_s > 0 or bool(self.preferred)

    @property
    def has_goal(self) -> bool:
        """Whether batches are formed so that `slo_s` is met."""
        return self.slo_s != math.inf and not self.is_static


@dataclass(frozen=True, slots=True)
class Run:
    """Run the first `count` requests now."""

    count: int
    fired: str
    """Why now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is due before `until`; None: nothing at all until another request comes."""

    until: float | None


Decision: TypeAlias = Run | Wait

NOTHING = Wait(None)


def decide(
    front: Sequence[BatchCandidate], oldest: float, now: float, policy: BatchPolicy, *, is_cut: bool
) -> Decision:
    """What to do with the requests that make the next batch, with a static policy.

    Args:
        front: at least one request, and no more than may run together.
        oldest: when the first of those that wait came.
        is_cut: more wait, and do not fit in.
    """
    rows = 0
    preferred = 0
    for count, request in enumerate(front, 1):
        rows += request.rows
        if rows in policy.preferred:
            preferred = count
    if rows >= policy.max_rows:
        return Run(len(front), "full")
    if preferred:
        return Run(preferred, "preferred")
    if is_cut:
        return Run(len(front), "full")
    due = oldest + policy.delay_s
    return Run(len(front), "delay") if now >= due else Wait(due)
