"""One request of a sequence, from its arrival to its answer; and the sequence that it is a step of.

Sequence    backlog ──a slot is free──> placed: waiting, running, idle ──END, idle too long, lost──> over
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from services.infer.requests.outcome import Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.queue import Receiver
from services.infer.sequences.rows import SequenceId


@dataclass(frozen=True)
class SequenceSlot:
    """Where a sequence runs."""

    instance: int
    slot: int
    """Its row, in an instance of a `direct` model."""


class SequenceStep:
    """One request. The loop's thread writes; a worker thread only reads, but for `after` and `is_lost`."""

    __slots__ = (
        "after",
        "arrived",
        "deadline",
        "ends",
        "expires",
        "is_abandoned",
        "is_dropped",
        "is_lost",
        "is_waiting",
        "outcome",
        "receiver",
        "request",
        "sequence",
        "slot",
        "starts",
    )

    def __init__(self, request: InferenceRequest, arrived: float, deadline: float, receiver: Receiver) -> None:
        self.request = request
        self.receiver = receiver
        self.arrived = arrived
        """Seconds, on the scheduler's clock."""
        self.deadline = deadline
        timeout_us = request.parameters.timeout_us
        self.expires = min(deadline, arrived + timeout_us / 1e6) if timeout_us else deadline
        """It is not started at or after that."""
        self.starts, self.ends = request.parameters.sequence_start, request.parameters.sequence_end
        self.sequence: Sequence
        self.slot = 0
        self.is_waiting = False
        self.is_abandoned = False
        """Nobody waits for the answer any more."""
        self.is_dropped = False
        """It is not run any more. It stays in line only to end its sequence in its turn."""
        self.outcome: Outcome | None = None
        """For a model whose answers wait for each other."""
        self.after: Mapping[str, Tensor] = {}
        """The states that it left, when it was run."""
        self.is_lost = False
        """What the model remembered of its sequences is gone."""

    @property
    def id(self) -> SequenceId:
        return self.request.parameters.sequence_id

    rows = 1
    """For the policies: a step has one row, and no time of its own to be done in."""
    due = math.inf


@dataclass(eq=False)
class Sequence:
    """The steps of one sequence id that are not answered yet, and what the last one left."""

    id: SequenceId
    tenant: str
    waiting: deque[SequenceStep] = field(default_factory=deque)
    running: SequenceStep | None = None
    position: SequenceSlot | None = None
    has_begun: bool = False
    """Its first step was run, and its last was not."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """What the last successful step left."""
    shapes: Hashable = ()
    """Of the states: steps can be stacked when theirs are equal."""

    @property
    def is_open(self) -> bool:
        """Whether a step without the START flag is one of it."""
        last = self.waiting[-1] if self.waiting else self.running
        return self.has_begun if last is None else not last.ends

    @property
    def head(self) -> SequenceStep | None:
        """The step that may run now."""
        return self.waiting[0] if self.waiting and self.running is None and self.position is not None else None
