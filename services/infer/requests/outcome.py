"""Outcome of one inference request: its outputs with the times of its execution, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from services.infer.requests.ragged import Value


@dataclass(frozen=True, slots=True)
class ExecutionTimes:
    """How long the parts of an execution took, in nanoseconds; and how many rows it had."""

    rows: int = 0
    gather_ns: int = 0
    compute_ns: int = 0
    scatter_ns: int = 0
    waited_ns: int = 0
    """In the model's process, while it executed what others sent: not computing, but waiting in line."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What one step of an ensemble took; where its model was called for each row, the longest of its calls."""

    model: str
    version: int
    calls: int = 0
    """0: it was skipped, or there were no rows to call its model with."""
    rows: int = 0
    """In the execution; the most."""
    queue_ns: int = 0
    compute_ns: int = 0
    fired: str = ""


class InferenceResult:
    """What came back for one call."""

    __slots__ = ("fired", "outputs", "queue_ns", "steps", "times")

    def __init__(self, outputs: Sequence[Value], times: ExecutionTimes, queue_ns: int = 0, fired: str = "") -> None:
        self.outputs = outputs
        """In the order that the call asks for them; `Rows` only for an output that is ragged."""
        self.times = times
        self.queue_ns = queue_ns
        """How long it waited before its execution."""
        self.fired = fired
        """Why its batch was run when it was: idle, queued, full, preferred, delay, slots, slo, alone, closing."""
        self.steps: Sequence[StepTimes] = ()
        """Of an ensemble, when its request wants to know."""


Outcome: TypeAlias = InferenceResult | Exception
"""What became of one call."""
