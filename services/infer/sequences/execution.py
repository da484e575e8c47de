"""Execution of a batch of steps: an `execution.Executor` whose items are steps of several sequences. Blocks.

A step that fails leaves its sequence as it was. Where the model only computes, a failed batch is bisected, as without
sequences. A model in its own process may remember what it has seen, and is not given the same step twice: then all of
the batch fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import cast

from services.infer.model_process import request_info
from services.infer.model_process.checks import check_outputs
from services.infer.model_process.inner_calls import outer_of
from services.infer.model_process.instance import Instance, Runner
from services.infer.model_process.session import ModelDied, ProcessSession
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import held_bytes
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.execution import Execution, ExecutionItem, expired
from services.infer.sequences import rejections, step_runners
from services.infer.sequences.rows import Row
from services.infer.sequences.settings import SequenceSettings
from services.infer.sequences.step import SequenceStep
from services.infer.sequences.step_runners import ProcessSteps, Results, SessionSteps, StepResult
from shoal.errors import ShoalError, Unavailable

# A process is restarted after about this time.
_RETRY_MS = 100


class SequenceExecution(Execution):
    """Runs batches of steps of one model version, one at a time."""

    def __init__(
        self,
        name: str,
        session: Session,
        signature: Signature,
        settings: SequenceSettings,
        initial: Mapping[str, Tensor],
        clock: Callable[[], float],
    ) -> None:
        """Run steps in `session`; `initial` are the states that a sequence begins with."""
        super().__init__(name, session, signature, clock)
        self._settings, self._initial = settings, initial
        self._steps: SessionSteps | ProcessSteps = step_runners.runner_of(session, settings, batched=self._batched)

    def _run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        alive = cast("Sequence[SequenceStep]", self._alive(batch, self._clock()))
        found = dict(zip(map(id, alive), self._execute(alive), strict=True)) if alive else {}
        return [found[id(item)] if id(item) in found else expired() for item in batch]

    def _execute(self, alive: Sequence[SequenceStep]) -> list[Outcome]:
        start = perf_counter_ns()
        self._count_expired(alive, self._clock())
        rows, outputs = self._rows_in_slots(alive), [output.spec.name for output in alive[0].request.outputs]
        gathered = perf_counter_ns()
        results = self._steps.run(rows, outputs)
        times = ExecutionTimes(len(alive), gathered - start, perf_counter_ns() - gathered, 0)
        return self._outcomes(alive, results, times)

    def _outcomes(self, alive: Sequence[SequenceStep], results: Results, times: ExecutionTimes) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for step, result in zip(alive, results, strict=True):
            if isinstance(result, StepResult):
                step.after = result.states
                step.after_bytes = held_bytes(list(result.states.values()))
                outcomes.append(InferenceResult(result.outputs, times))
            else:
                outcomes.append(self._outcome_of_error(result))
        return outcomes

    def _rows_in_slots(self, alive: Sequence[SequenceStep]) -> list[Row | None]:
        """Return the rows as the model is given them: with `direct`, each in its slot, with None between them."""
        if not self._settings.is_direct:
            return [self._row(step) for step in alive]
        rows: list[Row | None] = [None] * (max(step.slot for step in alive) + 1)
        for step in alive:
            rows[step.slot] = self._row(step)
        return rows

    def _row(self, step: SequenceStep) -> Row:
        states = self._initial if step.starts else step.sequence.states
        return Row(step.request.tensors, step.starts, step.ends, step.id, states)


class ProcessSequenceExecution(SequenceExecution):
    """Runs the steps of one instance of a model in its own process: always the same process.

    When the process ends, the model's sequences are lost with it: their steps are marked, and only those that start a
    sequence run in the next process.
    """

    def __init__(
        self,
        name: str,
        version: int,
        session: ProcessSession,
        number: int,
        signature: Signature,
        settings: SequenceSettings,
        initial: Mapping[str, Tensor],
        clock: Callable[[], float],
    ) -> None:
        """Run steps in instance `number` of `session`."""
        super().__init__(name, session, signature, settings, initial, clock)
        self._version = version
        self._processes = session
        self._instance: Instance = session.instances[number]
        self._process: Runner | None = None
        self._batch: Sequence[SequenceStep] = ()

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        self._batch = cast("Sequence[SequenceStep]", batch)
        try:
            return super().run(batch)
        finally:
            self._batch = ()

    def _bisect(self, batch: Sequence[ExecutionItem], err: Exception) -> list[Outcome]:
        return [self._outcome_of_error(err) for _ in batch]

    def _has_waiting_caller(self) -> bool:
        now = self._clock()
        return any(not step.is_abandoned and now < step.expires for step in self._batch)

    def _execute(self, alive: Sequence[SequenceStep]) -> list[Outcome]:
        found = self._outcomes_without_run(alive)
        to_run = [step for step in alive if id(step) not in found]
        if to_run:
            found.update(zip(map(id, to_run), self._run_in_process(to_run), strict=True))
        return [found[id(step)] for step in alive]

    def _outcomes_without_run(self, alive: Sequence[SequenceStep]) -> dict[int, Outcome]:
        found: dict[int, Outcome] = {}
        before, is_down = self._process, False
        try:
            self._process = self._instance.running()
        except Unavailable:
            is_down = True
        if is_down or (before is not None and before is not self._process):
            for step in alive:
                step.is_lost = True
                if is_down or not step.starts:
                    found[id(step)] = self._not_run_error(step)
        poison = self._processes.poison
        for step in alive:
            if poison and (after_s := poison.rejected_for_s(step.request)):
                found[id(step)] = self._processes.rejection(self._name, after_s)
        return found

    def _run_in_process(self, to_run: Sequence[SequenceStep]) -> list[Outcome]:
        assert isinstance(self._steps, ProcessSteps), "made for a ProcessSession"
        self._steps.on, self._steps.is_wanted = self._process, self._has_waiting_caller
        self._steps.outer = lambda: outer_of(self._batch)
        try:
            outcomes = super()._execute(to_run)
        except ModelDied as err:
            for step in self._batch:
                step.is_lost = True
            if err.is_unread:
                return [self._not_run_error(step) for step in to_run]
            self._processes.poison.record_crash([step.request for step in to_run], is_confirmed=err.is_confirmed)
            raise
        self._processes.poison.record_success([step.request for step in to_run])
        return outcomes

    def _not_run_error(self, step: SequenceStep) -> ShoalError:
        """Return the error of a step whose process ended: only a step that starts a sequence may be sent again."""
        if not step.starts:
            return rejections.unknown(self._name, step.id, self._settings.idle_s)
        return Unavailable(
            f"the process of model '{self._name}' is being started again; retry after {_RETRY_MS} ms",
            retry_after_ms=_RETRY_MS,
        )

    def _outcomes(self, alive: Sequence[SequenceStep], results: Results, times: ExecutionTimes) -> list[Outcome]:
        outcomes = super()._outcomes(alive, results, times)
        pairs = zip(alive, outcomes, strict=True)
        return [self._checked(step, got) if isinstance(got, InferenceResult) else got for step, got in pairs]

    def _checked(self, step: SequenceStep, result: InferenceResult) -> Outcome:
        try:
            check_outputs(step.request, cast("Sequence[Tensor]", result.outputs), 1 if self._batched else None)
        except ModelFailed as err:
            return self._model_error(err)
        return result

    def _row(self, step: SequenceStep) -> Row:
        row = super()._row(step)
        if self._processes.wants_requests:
            row.request_info = request_info.of(step.request, self._name, self._version)
        return row
