"""One request of a sequence, from its arrival to its outcome; and the sequence that it is a step of.

Sequence    backlog ──a slot is free──> assigned: waiting, running, idle ──END, idle too long, lost──> closed
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.delivery import PendingRequest, Receiver
from services.infer.sequences.rows import SequenceId


@dataclass(frozen=True)
class SequenceSlot:
    """Instance and slot in which a sequence runs."""

    instance: int
    slot: int
    """Row of the sequence, in an instance of a `direct` model."""


class SequenceStep(PendingRequest):
    """One request of a sequence. The loop's thread writes; a worker thread writes only `after...` and `is_lost`."""

    __slots__ = (
        "after",
        "after_bytes",
        "arrived",
        "deadline",
        "ends",
        "expires",
        "is_dropped",
        "is_lost",
        "is_ordered",
        "is_waiting",
        "request",
        "sender",
        "sequence",
        "slot",
        "starts",
    )

    def __init__(self, request: InferenceRequest, arrived: float, deadline: float, receiver: Receiver) -> None:
        super().__init__(receiver)
        self.request = request
        self.arrived = arrived
        """Seconds, on the scheduler's clock."""
        self.deadline = deadline
        timeout_us = request.parameters.timeout_us
        self.expires = min(deadline, arrived + timeout_us / 1e6) if timeout_us else deadline
        """The step never starts at or after this time."""
        self.starts, self.ends = request.parameters.sequence_start, request.parameters.sequence_end
        self.sequence: Sequence
        self.sender: tuple[str, Hashable] = ("", None)
        """Tenant of the request and sender of its call, while the step is queued."""
        self.slot = 0
        self.is_waiting = False
        self.is_ordered = False
        """True while the step has a place in the order of delivery, of a model that preserves order."""
        self.is_dropped = False
        """True: the step will not run, and stays queued only to end its sequence in order."""
        self.after: Mapping[str, Tensor] = {}
        """States after the step, once it has run."""
        self.after_bytes = 0
        """Memory of these states."""
        self.is_lost = False
        """True when the model's memory of its sequences is lost."""

    @property
    def id(self) -> SequenceId:
        return self.request.parameters.sequence_id

    @property
    def tenant(self) -> str:
        return self.sequence.tenant

    @property
    def waits_for_slot(self) -> bool:
        """True when the step cannot run before another sequence ends."""
        return self.is_waiting and self.sequence.position is None

    rows = 1
    """For the policies: a step has one row, and no due time."""
    due = math.inf


@dataclass(eq=False)
class Sequence:
    """The steps of one sequence id that have no outcome, and the states that the last step left."""

    id: SequenceId
    owner: str
    """Tenant within which the id is unique; empty for the sequences of calling models."""
    tenant: str
    """Tenant whose share the sequence counts in."""
    waiting: deque[SequenceStep] = field(default_factory=deque)
    running: SequenceStep | None = None
    position: SequenceSlot | None = None
    has_begun: bool = False
    """True after the first step has run, until the last one has."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """States after the last successful step."""
    state_bytes: int = 0
    """Memory of the states, which counts in the tenant's share."""
    shapes: Hashable = ()
    """Shapes of the states: steps with equal shapes can be stacked."""

    @property
    def is_open(self) -> bool:
        """True when a step without the START flag belongs to this sequence."""
        last = self.waiting[-1] if self.waiting else self.running
        return self.has_begun if last is None else not last.ends

    @property
    def head(self) -> SequenceStep | None:
        """The step that may run now."""
        return self.waiting[0] if self.waiting and self.running is None and self.position is not None else None
