"""One ensemble request in execution. Driven by callbacks, without a task: each result starts the steps that need it.

    inputs ──> steps with all inputs present ──start──> results ──> tensors ──> steps ... ──> outputs
                 └── skipped: the outputs are skipped, too

Where several steps may produce a tensor, the first step in order that was not skipped provides the value. When one step
fails, the request fails: calls in flight are abandoned, and no further step starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Protocol

from services.infer.ensembles import feeding
from services.infer.ensembles.conditions import Undecided
from services.infer.ensembles.ensemble_result import ensemble_result, output_tensor
from services.infer.ensembles.fan_out import FanOut, RequestContext, StepMeasurements
from services.infer.ensembles.plan import EnsemblePlan, Feed, PlannedStep
from services.infer.ensembles.step_call import StepCall, located
from services.infer.ensembles.values import SKIPPED, Skipped
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.parameters import NONE
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest, held_bytes
from services.infer.scheduling.delivery import PendingRequest, Receiver
from shoal.errors import InvalidArgument


class RunOwner(Protocol):
    """Owner of the runs: admits requests, and counts and releases their runs."""

    def record(self, run: EnsembleRun, result: InferenceResult) -> None:
        """Record a successful result in the statistics."""

    def end(self, run: EnsembleRun) -> None:
        """Release all that a concluded run holds, and deliver its outcome."""


class EnsembleRun(PendingRequest):
    """One request in execution. Implements `step_call.StepReceiver` and `fan_out.RowsReceiver`."""

    __slots__ = (
        "_candidates",
        "_context",
        "_in_flight",
        "_measurements",
        "_missing",
        "_outputs_left",
        "_owner",
        "_ready",
        "_route",
        "_values",
        "arrived",
        "plan",
        "request",
        "sender",
    )

    def __init__(
        self,
        owner: RunOwner,
        plan: EnsemblePlan,
        request: InferenceRequest,
        receiver: Receiver,
        *,
        arrived: float,
        expires: float,
        tenant: str,
    ) -> None:
        super().__init__(receiver)
        self._owner = owner
        self.plan = plan
        self.request = request
        self.sender: tuple[str, Hashable] = (tenant, None)
        """Tenant of the request and sender of its call."""
        self.arrived = arrived
        parameters = request.parameters
        # `expires` includes `timeout`, and holds for all steps together.
        step_parameters = NONE if parameters is NONE else replace(parameters, timeout_us=0, explain=False)
        self._context = RequestContext(
            step_parameters, request.source, request.check, expires, tenant, request.memory, request.trace
        )
        self._route = plan.route(request.outputs)
        self._outputs_left = len(self._route.targets)
        self._missing = list(self._route.missing)
        # By slot.
        self._values: list[Value | Skipped | None] = [None] * len(plan.specs)
        # By slot, where several steps may produce the tensor: the value of each producer.
        self._candidates: dict[int, list[Value | Skipped | None]] = {}
        self._ready: deque[int] = deque()
        self._in_flight: set[StepCall | FanOut] = set()
        self._measurements: dict[int, StepMeasurements] = {}

    def begin(self) -> None:
        """Start the steps that need inputs only. The run may be concluded before this method returns."""
        plan, inputs = self.plan, self.request.inputs
        for spec in plan.completed.signature.inputs:
            self._store(plan.slots[spec.name], inputs.get(spec.name, SKIPPED))
        self._advance()

    def cancel_steps(self) -> None:
        """Cancel all step calls in flight. Called once the run is over."""
        in_flight, self._in_flight = self._in_flight, set()
        for work in in_flight:
            work.abandon()

    def fail(self, error: Exception) -> None:
        """End the run with an error. Does nothing when the run is over."""
        self._end(error)

    @property
    def is_waiting(self) -> bool:
        """True while no step's execution has begun."""
        return not self._measurements and all(work.is_waiting for work in self._in_flight)

    # Start steps and store their outputs

    def _advance(self) -> None:
        """Start all ready steps; finish when all requested outputs are known."""
        while self._ready and not self.is_over:
            index = self._ready.popleft()
            step = self.plan.steps[index]
            try:
                self._start_step(index, step)
            except Exception as err:
                self._fail(step, err)
        if not self._outputs_left and not self.is_over:
            self._finish()

    def _start_step(self, index: int, step: PlannedStep) -> None:
        """Call the step's model, or skip the step: its condition is false, or a required input was skipped."""
        if step.step.when and not self._holds(step):
            self._skip(index, step)
            return
        inputs: list[tuple[Feed, Value]] = []
        for feed in step.feeds:
            value = self._values[feed.slot]
            if isinstance(value, Skipped) or value is None:
                if feed.spec.is_optional and not feed.by_row:
                    continue
                self._skip(index, step)
                return
            inputs.append((feed, value))
        if step.step.each:
            self._start_rows(index, step, inputs)
            return
        request = feeding.whole_request(step, inputs, self._context.parameters, self._context.source)
        if request is None:
            self._store_outputs(index, step, feeding.outputs_without_rows(step))
            return
        request.memory, request.trace = self._context.memory, self._context.trace
        call = StepCall(self, index, step.version, request)
        call.start(self._context.expires, self._context.tenant, self._context.check)
        self._in_flight.add(call)

    def _start_rows(self, index: int, step: PlannedStep, inputs: feeding.StepInputs) -> None:
        split, rows = feeding.split_rows(inputs)
        if not rows:
            self._store_outputs(index, step, feeding.outputs_without_rows(step))
            return
        fan = FanOut(self, index, step, split, rows, self._context, self.plan.graph.rows_in_flight)
        self._in_flight.add(fan)
        fan.start()

    def _holds(self, step: PlannedStep) -> bool:
        """Return True when the step's condition holds; False when one of its tensors was skipped."""
        for comparison in step.step.when:
            slot = step.condition_slots[comparison.tensor]
            value = self._values[slot]
            if value is None or isinstance(value, Skipped):
                return False
            try:
                if not comparison.holds(value, self.plan.specs[slot].datatype):
                    return False
            except Undecided as err:
                raise InvalidArgument(f"{err}: send these rows in separate requests") from err
        return True

    def _skip(self, index: int, step: PlannedStep) -> None:
        self._store_outputs(index, step, [SKIPPED] * len(step.outputs))

    def _store_outputs(self, index: int, step: PlannedStep, outputs: Sequence[Value | Skipped]) -> None:
        for slot, value in zip(step.output_slots, outputs, strict=True):
            producers = self.plan.producers[slot]
            if len(producers) == 1:
                self._store(slot, value)
            else:
                self._store_candidate(slot, producers, index, value)

    def _store_candidate(self, slot: int, producers: tuple[int, ...], index: int, value: Value | Skipped) -> None:
        """Store the value of the first producer that was not skipped, once all producers before it were skipped."""
        candidates = self._candidates.setdefault(slot, [None] * len(producers))
        candidates[producers.index(index)] = value
        if self._values[slot] is not None:
            return
        for candidate in candidates:
            if candidate is None:
                return
            if not isinstance(candidate, Skipped):
                self._store(slot, candidate)
                return
        self._store(slot, SKIPPED)

    def _store(self, slot: int, value: Value | Skipped) -> None:
        """Store a tensor; steps whose last missing tensor it is become ready."""
        self._values[slot] = value
        if slot in self._route.targets:
            self._outputs_left -= 1
        missing, steps = self._missing, self._route.steps
        for index in self.plan.consumers[slot]:
            missing[index] -= 1
            if not missing[index] and index in steps:
                self._ready.append(index)

    # Receive results

    def step_succeeded(self, call: StepCall, result: InferenceResult) -> None:
        self._in_flight.discard(call)
        index, step = call.index, self.plan.steps[call.index]
        try:
            self._context.memory.hold(held_bytes(result.outputs))
            feeding.check_outputs(step, result.outputs)
        except Exception as err:
            self._fail(step, err)
            return
        measured = self._measurements[index] = StepMeasurements()
        measured.add(result)
        self._store_outputs(index, step, list(result.outputs))
        self._advance()

    def step_failed(self, call: StepCall, error: BaseException) -> None:
        self._in_flight.discard(call)
        self._fail(self.plan.steps[call.index], error)

    def rows_succeeded(self, fan: FanOut, outputs: list[Value]) -> None:
        self._in_flight.discard(fan)
        self._measurements[fan.index] = fan.measurements
        self._store_outputs(fan.index, fan.step, outputs)
        self._advance()

    def row_failed(self, fan: FanOut, error: BaseException) -> None:
        self._in_flight.discard(fan)
        self._fail(fan.step, error)

    # End

    def _finish(self) -> None:
        request = self.request
        try:
            outputs = [output_tensor(self.plan, request, self._values, requested) for requested in request.outputs]
        except Exception as err:
            self._end(located(err, f"in ensemble '{self.plan.graph.name}'"))
            return
        result = ensemble_result(self.plan, request, outputs, self._measurements)
        self._owner.record(self, result)
        self._end(result)

    def _fail(self, step: PlannedStep, error: BaseException) -> None:
        if not self.is_over:
            self._end(located(error, f"in ensemble '{self.plan.graph.name}', {step.title}"))

    def _end(self, outcome: InferenceResult | BaseException) -> None:
        if self.conclude(outcome):
            self.cancel_steps()
            self._owner.end(self)
