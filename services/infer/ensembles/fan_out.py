"""A step whose model is called for each row: calls of all requests batch with each other, answers go back in order.

rows ──> at most so many in flight ──> answers ──> [first, second, ...]     no rows: no call, and an empty list
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from services.infer.ensembles import feeding
from services.infer.ensembles.feeding import Given
from services.infer.ensembles.plan import PlannedStep
from services.infer.ensembles.step_call import StepCall, named
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.requests.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from shoal.inference.v2 import inference_pb2 as pb

_LEAST_IN_FLIGHT = 64
# Rows of one request that wait or run at once, or twice the model's batches: a request of a thousand rows must not
# fill the model's queue by itself, and should fill its batches.


class Gathered(Protocol):
    """Who waits for all rows. Exactly one of these is called, once."""

    def gathered(self, fan: FanOut, outputs: list[Value]) -> None: ...

    def row_failed(self, fan: FanOut, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What all calls of one request say."""

    parameters: Parameters
    source: pb.ModelInferRequest | None
    check: Callable[[str, InferenceRequest], Awaitable[InferenceRequest]] | None
    expires: float
    tenant: str


@dataclass(eq=False, slots=True)
class Seen:
    """What the calls of one step took: of those that were run together, the longest."""

    calls: int = 0
    rows: int = 0
    queue_ns: int = 0
    gather_ns: int = 0
    compute_ns: int = 0
    scatter_ns: int = 0
    fired: str = ""

    def add(self, answer: InferenceResult) -> None:
        times: ExecutionTimes = answer.times
        self.calls += 1
        self.rows = max(self.rows, times.rows)
        self.queue_ns = max(self.queue_ns, answer.queue_ns)
        self.gather_ns = max(self.gather_ns, times.gather_ns)
        self.compute_ns = max(self.compute_ns, times.compute_ns)
        self.scatter_ns = max(self.scatter_ns, times.scatter_ns)
        self.fired = answer.fired


@dataclass(eq=False, slots=True)
class FanOut:
    """The calls of one step for one request. A `step_call.Told`."""

    told: Gathered
    index: int
    """The step's."""
    step: PlannedStep
    given: Given
    """As `feeding.by_row` makes it."""
    rows: int
    asked: Asked
    at_once: int
    """Rows in flight; 0: enough for full batches."""
    seen: Seen = field(default_factory=Seen)
    _next: int = 0
    _left: int = 0
    _out: set[StepCall] = field(default_factory=set)
    _parts: list[list[Tensor]] = field(default_factory=list)
    _is_starting: bool = False
    _is_over: bool = False

    def start(self) -> None:
        self._left = self.rows
        self._parts = [[]] * self.rows
        self.at_once = self.at_once or max(_LEAST_IN_FLIGHT, 2 * self.step.max_rows)
        self._go_on()

    def abandon(self) -> None:
        """Nobody waits any more."""
        self._is_over = True
        for call in self._out:
            call.abandon()
        self._out.clear()

    @property
    def is_waiting(self) -> bool:
        """Whether no row's execution has begun."""
        return not self.seen.calls and all(call.is_waiting for call in self._out)

    def _go_on(self) -> None:
        if self._is_starting:  # A call that is answered at once: the loop below goes on.
            return
        self._is_starting = True
        try:
            while self._next < self.rows and len(self._out) < self.at_once and not self._is_over:
                row, self._next = self._next, self._next + 1
                self._begin(row)
        finally:
            self._is_starting = False
        if not self._left and not self._is_over:
            self._is_over = True
            self.told.gathered(self, self._outputs())

    def _begin(self, row: int) -> None:
        asked = self.asked
        try:
            made = feeding.row_call(self.step, self.given, row, asked.parameters, asked.source)
        except Exception as err:
            self._fail(row, err)
            return
        call = StepCall(self, row, self.step.version, made)
        self._out.add(call)
        call.start(asked.expires, asked.tenant, asked.check)

    def came(self, call: StepCall, answer: InferenceResult) -> None:
        self._out.discard(call)
        try:
            self._parts[call.index] = feeding.row_checked(self.step, answer.outputs)
        except Exception as err:
            self._fail(call.index, err)
            return
        self.seen.add(answer)
        self._left -= 1
        self._go_on()

    def failed(self, call: StepCall, error: BaseException) -> None:
        self._out.discard(call)
        self._fail(call.index, error)

    def _fail(self, row: int, error: BaseException) -> None:
        if not self._is_over:
            self.abandon()
            self.told.row_failed(self, named(error, f"row {row} of {self.rows}"))

    def _outputs(self) -> list[Value]:
        """One list for each output, in the order of the rows."""
        return [[parts[n] for parts in self._parts] for n in range(len(self.step.wanted))]
