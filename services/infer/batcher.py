"""Which waiting calls are run together, and when: a pure function of the queue and the time.

Calls wait in lanes; those of one lane can be stacked (same inputs, row shapes and outputs). A batch is the front of one
lane: the lane whose front has waited longest goes first.

    delay 0 (the default)    run what is there: an idle server never waits, a busy one finds its batches in the queue
    delay > 0                wait until a lane is full, has a preferred size, or its front has waited that long
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


class Waiting(Protocol):
    """What the policy sees of a waiting call."""

    @property
    def rows(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def arrived(self) -> float:
        """Seconds, on the clock that `now` is of."""
        ...


@dataclass(frozen=True)
class BatchPolicy:
    """How a model is batched."""

    max_rows: int
    """Rows at most in one execution; a call with more runs alone. 1: calls run one by one."""
    max_bytes: int
    """Bytes of inputs at most in one execution; a call with more runs alone."""
    delay_s: float = 0.0
    """How long the first call of a batch may wait for company."""
    preferred: frozenset[int] = frozenset()
    """Sizes in rows that are not worth waiting beyond."""


@dataclass(frozen=True)
class Run:
    """Run the first `count` calls of lane number `lane` now."""

    lane: int
    count: int


@dataclass(frozen=True)
class Wait:
    """Nothing is due before `until`; None: nothing at all until another call comes."""

    until: float | None


Decision: TypeAlias = Run | Wait


def decide(lanes: Iterable[Sequence[Waiting]], now: float, policy: BatchPolicy) -> Decision:
    """What to do now. No lane is empty; each is in order of arrival."""
    soonest: float | None = None
    best: Run | None = None
    oldest = float("inf")
    for number, lane in enumerate(lanes):
        front = lane[0].arrived
        if best is not None and front >= oldest:
            continue
        due = front + policy.delay_s
        count = _due(lane, is_late=now >= due, policy=policy)
        if count:
            best, oldest = Run(number, count), front
        elif soonest is None or due < soonest:
            soonest = due
    return best or Wait(soonest)


def _due(lane: Sequence[Waiting], *, is_late: bool, policy: BatchPolicy) -> int:
    """How many calls from the front of `lane` should run now; 0: none yet."""
    rows = size = count = preferred = 0
    is_full = False
    for call in lane:
        if count and (rows + call.rows > policy.max_rows or size + call.size_bytes > policy.max_bytes):
            is_full = True
            break
        rows, size, count = rows + call.rows, size + call.size_bytes, count + 1
        if rows in policy.preferred:
            preferred = count
        if rows >= policy.max_rows:
            is_full = True
            break
    if is_full and rows >= policy.max_rows:
        return count
    if preferred:
        return preferred
    return count if is_full or is_late else 0
