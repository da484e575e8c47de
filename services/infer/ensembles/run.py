"""One request's way through the steps of an ensemble. No task and no coroutine: what comes back starts what waited.

    inputs ──> steps that have all they wait for ──start──> answers ──> tensors ──> steps ... ──> outputs
                 └── skipped: what they give is skipped, too

A tensor that several steps may give is that of the first of them, in their order, that was not skipped. When one step
fails the request fails: what waits is abandoned, and nothing more is started.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from services.infer.ensembles import answering, feeding
from services.infer.ensembles.conditions import Undecided
from services.infer.ensembles.fan_out import Asked, FanOut, Seen
from services.infer.ensembles.plan import EnsemblePlan, Feed, PlannedStep
from services.infer.ensembles.step_call import StepCall, named
from services.infer.ensembles.values import SKIPPED, Skipped
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.parameters import NONE
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.queue import Receiver
from shoal.errors import InvalidArgument

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Who admitted a request, and is told what became of it."""

    def count(self, run: Run, answer: InferenceResult) -> None:
        """It was answered."""

    def forget(self, run: Run) -> None:
        """It is over: whatever it held is free."""


class Run:
    """One request. A `step_call.Told` and a `fan_out.Gathered`."""

    __slots__ = (
        "_asked",
        "_is_going",
        "_left",
        "_missing",
        "_out",
        "_owner",
        "_ready",
        "_receiver",
        "_route",
        "_seen",
        "_settled",
        "_values",
        "arrived",
        "call",
        "is_over",
        "plan",
    )

    def __init__(
        self,
        owner: Owner,
        plan: EnsemblePlan,
        call: InferenceRequest,
        receiver: Receiver,
        *,
        arrived: float,
        expires: float,
        tenant: str,
    ) -> None:
        self._owner = owner
        self.plan = plan
        self.call = call
        self.arrived = arrived
        self._receiver = receiver
        asked = call.parameters
        # `timeout` is in `expires`, which holds for all steps together.
        said = NONE if asked is NONE else replace(asked, timeout_us=0, explain=False)
        self._asked = Asked(said, call.source, call.check, expires, tenant)
        self._route = plan.route(call.outputs)
        self._left = len(self._route.targets)
        self._missing = list(self._route.missing)
        self._values: list[Value | Skipped | None] = [None] * len(plan.specs)
        self._settled: dict[
            int, list[Value | Skipped | None]
        ] = {}  # What each step gave, where several may give a tensor.
        self._ready: deque[int] = deque()
        self._out: set[StepCall | FanOut] = set()
        self._seen: dict[int, Seen] = {}
        self._is_going = False
        self.is_over = False

    def begin(self) -> None:
        """Starts. The receiver may be told before this returns."""
        plan, given = self.plan, self.call.inputs
        self._is_going = True
        for spec in plan.completed.signature.inputs:
            self._put(plan.places[spec.name], given.get(spec.name, SKIPPED))
        self._is_going = False
        self._go_on()

    def abandon(self) -> None:
        """Nobody waits for the answer any more."""
        self.is_over = True
        for work in self._out:
            work.abandon()
        self._out.clear()

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of it was executed, and nothing is."""
        return not self._seen and all(work.is_waiting for work in self._out)

    # Forward

    def _go_on(self) -> None:
        if self._is_going:  # Something was answered at once: the loop below goes on.
            return
        self._is_going = True
        try:
            while self._ready and not self.is_over:
                self._take(self._ready.popleft())
        finally:
            self._is_going = False
        if not self._left and not self.is_over:
            self._finish()

    def _take(self, index: int) -> None:
        step = self.plan.steps[index]
        try:
            self._start(index, step)
        except Exception as err:
            self._fail(step, err)

    def _start(self, index: int, step: PlannedStep) -> None:
        if step.step.when and not self._holds(step):
            self._skip(index, step)
            return
        given: list[tuple[Feed, Value]] = []
        for feed in step.feeds:
            value = self._values[feed.place]
            if isinstance(value, Skipped) or value is None:
                if feed.spec.is_optional and not feed.by_row:
                    continue
                self._skip(index, step)
                return
            given.append((feed, value))
        if step.step.each:
            self._start_rows(index, step, given)
            return
        call = feeding.whole_call(step, given, self._asked.parameters, self._asked.source)
        if call is None:
            self._give(index, step, feeding.none(step))
            return
        work = StepCall(self, index, step.version, call)
        self._out.add(work)
        work.start(self._asked.expires, self._asked.tenant, self._asked.check)

    def _start_rows(self, index: int, step: PlannedStep, given: feeding.Given) -> None:
        split, rows = feeding.by_row(given)
        if not rows:
            self._give(index, step, feeding.none(step))
            return
        fan = FanOut(self, index, step, split, rows, self._asked, self.plan.graph.rows_in_flight)
        self._out.add(fan)
        fan.start()

    def _holds(self, step: PlannedStep) -> bool:
        for comparison in step.step.when:
            place = step.looks_at[comparison.tensor]
            value = self._values[place]
            if value is None or isinstance(value, Skipped):
                return False
            try:
                if not comparison.holds(value, self.plan.specs[place].datatype):
                    return False
            except Undecided as err:
                raise InvalidArgument(f"{err}: send these rows apart") from err
        return True

    def _skip(self, index: int, step: PlannedStep) -> None:
        self._give(index, step, [SKIPPED] * len(step.wanted))

    def _give(self, index: int, step: PlannedStep, outputs: Sequence[Value | Skipped]) -> None:
        for place, value in zip(step.places, outputs, strict=True):
            givers = self.plan.givers[place]
            if len(givers) == 1:
                self._put(place, value)
            else:
                self._put_first(place, givers, index, value)

    def _put_first(self, place: int, givers: tuple[int, ...], index: int, value: Value | Skipped) -> None:
        """What the first giver gave that was not skipped, as soon as that is known."""
        settled = self._settled.setdefault(place, [None] * len(givers))
        settled[givers.index(index)] = value
        if self._values[place] is not None:
            return
        for found in settled:
            if found is None:
                return
            if not isinstance(found, Skipped):
                self._put(place, found)
                return
        self._put(place, SKIPPED)

    def _put(self, place: int, value: Value | Skipped) -> None:
        self._values[place] = value
        if place in self._route.targets:
            self._left -= 1
        missing, steps = self._missing, self._route.steps
        for index in self.plan.takers[place]:
            missing[index] -= 1
            if not missing[index] and index in steps:
                self._ready.append(index)

    # Back

    def came(self, call: StepCall, answer: InferenceResult) -> None:
        self._out.discard(call)
        index, step = call.index, self.plan.steps[call.index]
        try:
            feeding.checked(step, answer.outputs)
        except Exception as err:
            self._fail(step, err)
            return
        seen = self._seen[index] = Seen()
        seen.add(answer)
        self._give(index, step, list(answer.outputs))
        self._go_on()

    def failed(self, call: StepCall, error: BaseException) -> None:
        self._out.discard(call)
        self._fail(self.plan.steps[call.index], error)

    def gathered(self, fan: FanOut, outputs: list[Value]) -> None:
        self._out.discard(fan)
        self._seen[fan.index] = fan.seen
        self._give(fan.index, fan.step, outputs)
        self._go_on()

    def row_failed(self, fan: FanOut, error: BaseException) -> None:
        self._out.discard(fan)
        self._fail(fan.step, error)

    # End

    def _finish(self) -> None:
        try:
            outputs = [answering.output(self.plan, self.call, self._values, wanted) for wanted in self.call.outputs]
        except Exception as err:
            self._end(named(err, f"in ensemble '{self.plan.graph.name}'"))
            return
        answer = answering.answer(self.plan, self.call, outputs, self._seen)
        self._owner.count(self, answer)
        self._end(answer)

    def _fail(self, step: PlannedStep, error: BaseException) -> None:
        if not self.is_over:
            self._end(named(error, f"in ensemble '{self.plan.graph.name}', {step.title}"))

    def _end(self, outcome: InferenceResult | BaseException) -> None:
        self.abandon()
        self._owner.forget(self)
        try:
            if isinstance(outcome, InferenceResult):
                self._receiver.answered(outcome)
            else:
                self._receiver.failed(outcome)
        except Exception:  # One caller's trouble is no other's.
            log.exception("ensemble %s: an answer could not be given", self.plan.graph.name)
