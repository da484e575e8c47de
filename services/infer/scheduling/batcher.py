"""Batch policies: pure functions of the queued requests and the time that decide whether to run a batch now.

delay 0 (the default)    run what is queued: an idle server never waits, a busy one finds its batches in the queue
delay > 0                wait until the batch is full, has a preferred size, or its first request has waited that long
a goal (`slo_ms`)        `slo`: as late as the goal allows, where waiting pays
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


class BatchCandidate(Protocol):
    """A queued request as the policies see it."""

    @property
    def rows(self) -> int: ...

    @property
    def due(self) -> float:
        """Time by which the goal wants the request completed, in seconds on the clock of `now`; infinite: no goal."""
        ...


@dataclass(frozen=True)
class BatchPolicy:
    """Batching settings of a model."""

    max_rows: int
    """Bound of rows in one execution; a larger request runs alone. 1: no batching."""
    max_bytes: int
    """Bound of input bytes in one execution; a larger request runs alone."""
    delay_s: float = 0.0
    """Longest wait of a batch's first request for others."""
    preferred: frozenset[int] = frozenset()
    """Sizes in rows at which a batch stops waiting."""
    slo_s: float = math.inf
    """Time within which requests should be completed. Shapes the batches, unless a delay or preferred sizes are set."""

    @property
    def is_static(self) -> bool:
        """True when the configuration sets a delay or preferred sizes."""
        return self.delay_s > 0 or bool(self.preferred)

    @property
    def has_goal(self) -> bool:
        """True when batches are formed to meet `slo_s`."""
        return self.slo_s != math.inf and not self.is_static


@dataclass(frozen=True, slots=True)
class Run:
    """Run the first `count` requests now."""

    count: int
    fired: str
    """Reason for running now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Run nothing before `until`; None: nothing until another request arrives."""

    until: float | None


Decision: TypeAlias = Run | Wait

NOTHING = Wait(None)


def decide(
    front: Sequence[BatchCandidate], oldest: float, now: float, policy: BatchPolicy, *, is_full: bool
) -> Decision:
    """Decide about the requests of the next batch, with a static policy.

    Args:
        front: at least one request, and no more than may run together.
        oldest: arrival of the oldest queued request.
        is_full: no further row may join them: more requests are queued than fit, or their outputs fill a batch.
    """
    rows = 0
    preferred = 0
    for count, queued in enumerate(front, 1):
        rows += queued.rows
        if rows in policy.preferred:
            preferred = count
    if rows >= policy.max_rows:
        return Run(len(front), "full")
    if preferred:
        return Run(preferred, "preferred")
    if is_full:
        return Run(len(front), "full")
    due = oldest + policy.delay_s
    return Run(len(front), "delay") if now >= due else Wait(due)
