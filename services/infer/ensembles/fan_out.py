"""Fan-out: one step whose model is called for each row. Rows of all requests batch together; results keep their order.

rows ──> a bounded number in flight ──> results ──> [first, second, ...]     no rows: no call, and an empty list
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.trace import SpanContext

from mesh.rpc.call_context import RequestMemory
from services.infer.ensembles import feeding
from services.infer.ensembles.feeding import StepInputs
from services.infer.ensembles.plan import PlannedStep
from services.infer.ensembles.step_call import StepCall, located
from services.infer.requests.outcome import ExecutionTimes, InferenceResult
from services.infer.requests.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, held_bytes
from services.infer.requests.tensors import Tensor
from shoal.inference.v2 import inference_pb2 as pb

# Rows of one request that are queued or executed at the same time, or twice the model's batch size. A request of a
# thousand rows must not fill the model's queue alone, and should fill its batches.
_MIN_IN_FLIGHT = 64


class RowsReceiver(Protocol):
    """Receiver of the results of all rows. A fan-out calls exactly one of these methods, once."""

    def rows_succeeded(self, fan: FanOut, outputs: list[Value]) -> None: ...

    def row_failed(self, fan: FanOut, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Values that all step calls of one ensemble request share."""

    parameters: Parameters
    source: pb.ModelInferRequest | None
    check: Callable[[str, InferenceRequest], Awaitable[InferenceRequest]] | None
    expires: float
    tenant: str
    memory: RequestMemory
    """Counts the outputs of steps: they are kept until the request ends."""
    trace: SpanContext | None


@dataclass(eq=False, slots=True)
class StepMeasurements:
    """Times of one step's calls. Calls run in parallel, so each time is that of the slowest call."""

    calls: int = 0
    rows: int = 0
    queue_ns: int = 0
    gather_ns: int = 0
    compute_ns: int = 0
    scatter_ns: int = 0
    fired: str = ""

    def add(self, result: InferenceResult) -> None:
        times: ExecutionTimes = result.times
        self.calls += 1
        self.rows = max(self.rows, times.rows)
        self.queue_ns = max(self.queue_ns, result.queue_ns)
        self.gather_ns = max(self.gather_ns, times.gather_ns)
        self.compute_ns = max(self.compute_ns, times.compute_ns)
        self.scatter_ns = max(self.scatter_ns, times.scatter_ns)
        self.fired = result.fired


@dataclass(eq=False, slots=True)
class FanOut:
    """All calls of one step for one request. Implements `step_call.StepReceiver`."""

    receiver: RowsReceiver
    index: int
    """Index of the step."""
    step: PlannedStep
    inputs: StepInputs
    """Inputs as `feeding.split_rows` returns them."""
    rows: int
    context: RequestContext
    max_in_flight: int
    """Largest number of rows in flight; 0: enough for full batches."""
    measurements: StepMeasurements = field(default_factory=StepMeasurements)
    _next_row: int = 0
    _rows_left: int = 0
    _in_flight: set[StepCall] = field(default_factory=set)
    _outputs_by_row: list[list[Tensor]] = field(default_factory=list)
    _is_over: bool = False

    def start(self) -> None:
        self._rows_left = self.rows
        self._outputs_by_row = [[]] * self.rows
        self.max_in_flight = self.max_in_flight or max(_MIN_IN_FLIGHT, 2 * self.step.max_rows)
        self._advance()

    def abandon(self) -> None:
        """Cancel all calls in flight; the receiver is not called any more."""
        self._is_over = True
        calls, self._in_flight = self._in_flight, set()
        for call in calls:
            call.abandon()

    @property
    def is_waiting(self) -> bool:
        """True while no row's execution has begun."""
        return not self.measurements.calls and all(call.is_waiting for call in self._in_flight)

    def _advance(self) -> None:
        """Start rows up to the limit; deliver the outputs after the last row."""
        while self._next_row < self.rows and len(self._in_flight) < self.max_in_flight and not self._is_over:
            row, self._next_row = self._next_row, self._next_row + 1
            self._start_row(row)
        if not self._rows_left and not self._is_over:
            self._is_over = True
            self.receiver.rows_succeeded(self, self._outputs())

    def _start_row(self, row: int) -> None:
        context = self.context
        try:
            request = feeding.row_request(self.step, self.inputs, row, context.parameters, context.source)
            request.memory, request.trace = context.memory, context.trace
            call = StepCall(self, row, self.step.version, request)
            call.start(context.expires, context.tenant, context.check)
        except Exception as err:
            self._fail(row, err)
        else:
            self._in_flight.add(call)

    def step_succeeded(self, call: StepCall, result: InferenceResult) -> None:
        self._in_flight.discard(call)
        try:
            self.context.memory.hold(held_bytes(result.outputs))
            self._outputs_by_row[call.index] = feeding.row_outputs(self.step, result.outputs)
        except Exception as err:
            self._fail(call.index, err)
            return
        self.measurements.add(result)
        self._rows_left -= 1
        self._advance()

    def step_failed(self, call: StepCall, error: BaseException) -> None:
        self._in_flight.discard(call)
        self._fail(call.index, error)

    def _fail(self, row: int, error: BaseException) -> None:
        if not self._is_over:
            self.abandon()
            self.receiver.row_failed(self, located(error, f"row {row} of {self.rows}"))

    def _outputs(self) -> list[Value]:
        """Return one list for each output, in the order of the rows."""
        return [[outputs[n] for outputs in self._outputs_by_row] for n in range(len(self.step.outputs))]
