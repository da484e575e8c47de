"""Outcome of one inference request: its result or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from services.infer.requests.ragged import Value


@dataclass(frozen=True, slots=True)
class ExecutionTimes:
    """Times of one execution in nanoseconds, and its number of rows."""

    rows: int = 0
    gather_ns: int = 0
    compute_ns: int = 0
    scatter_ns: int = 0
    waited_ns: int = 0
    """Wait in the model's process while it executed the requests of others."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of one step of an ensemble; for a step with a call per row, those of the longest call."""

    model: str
    version: int
    calls: int = 0
    """Calls of the step's model; 0: the step was skipped, or had no rows."""
    rows: int = 0
    """Rows of the execution; the most of any call."""
    queue_ns: int = 0
    compute_ns: int = 0
    fired: str = ""


class InferenceResult:
    """Result of one request: its outputs before they become a response, and the times of its execution."""

    __slots__ = ("fired", "outputs", "queue_ns", "steps", "times")

    def __init__(self, outputs: Sequence[Value], times: ExecutionTimes, queue_ns: int = 0, fired: str = "") -> None:
        self.outputs = outputs
        """In the order that the request names them; `Rows` only for a ragged output."""
        self.times = times
        self.queue_ns = queue_ns
        """Wait before the execution."""
        self.fired = fired
        """Reason for running the batch: idle, queued, full, preferred, delay, slots, slo, alone, closing."""
        self.steps: Sequence[StepTimes] = ()
        """Times of an ensemble's steps, when the request asks for an explanation."""


Outcome: TypeAlias = InferenceResult | Exception
"""End of one request: its result or an error. The word has no other meaning in infer."""
