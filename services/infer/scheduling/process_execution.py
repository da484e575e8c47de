"""An Execution whose model is in another process: rows are laid behind each other on their way there, not before.

refused (it killed its process before) <── calls ──> one message ──> answers, one by one or stacked ──> checked
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

from kernels.stack_rows import split_rows
from services.infer.model_process import request_info
from services.infer.model_process.checks import check_outputs
from services.infer.model_process.session import ModelDied, ProcessSession
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from services.infer.scheduling.execution import Execution, ExecutionItem
from shoal.errors import DeadlineExceeded, ShoalError

log = logging.getLogger(__name__)

_RESTART_WAIT_S = 30.0
# How long the batch-mates of a call that killed the process wait for the next one.


class ProcessExecution(Execution):
    """Runs batches of a ProcessSession."""

    def __init__(
        self, name: str, version: int, session: ProcessSession, signature: Signature, clock: Callable[[], float]
    ) -> None:
        super().__init__(name, session, signature, clock)
        self._version = version
        self._processes = session
        self._most_rows = signature.max_batch_size
        self._jobs: Sequence[ExecutionItem] = ()
        self._patient_until = 0.0
        self._is_apart = False
        self._waited_ns = 0

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        self._jobs = batch
        try:
            return super().run(batch)
        finally:
            self._jobs = ()
            self._patient_until = 0.0
            self._is_apart = False

    def _is_wanted(self, call: InferenceRequest | None = None) -> bool:
        """Whether somebody waits: for this call, or for any of the batch."""
        now = self._clock()
        jobs = self._jobs if call is None else [job for job in self._jobs if job.call is call]
        return any(not job.is_abandoned and now < job.expires for job in jobs)

    def _gathered(self, calls: Sequence[InferenceRequest]) -> tuple[Mapping[str, Any], int]:
        return {}, sum(call.rows for call in calls)

    def _computed(
        self, calls: Sequence[InferenceRequest], inputs: Mapping[str, Any], rows: int, start: int
    ) -> list[Outcome]:
        poison = self._processes.poison
        if not poison:
            return self._answers(calls, start)
        refused = {id(call): after_s for call in calls if (after_s := poison.refused_for_s(call))}
        answers = iter(self._answers([call for call in calls if id(call) not in refused], start))
        return [
            self._processes.refusal(self._name, refused[id(call)]) if id(call) in refused else next(answers)
            for call in calls
        ]

    def _answers(self, calls: Sequence[InferenceRequest], start: int) -> list[Outcome]:
        if not calls:
            return []
        gathered = perf_counter_ns()
        try:
            results = self._executed(calls)
        except ModelDied as err:
            self._processes.poison.blame(calls, is_sure=err.is_sure)
            if len(calls) == 1 and (err.is_alone or self._is_apart):
                raise
            return self._apart(calls, err)
        computed = perf_counter_ns()
        counts = [call.rows for call in calls]
        waited = min(self._waited_ns, computed - gathered)
        times = ExecutionTimes(sum(counts), gathered - start, computed - gathered - waited, 0, waited)
        if len(results) == len(calls):
            return [self._checked(call, result, times) for call, result in zip(calls, results, strict=True)]
        stacked = results[0] if len(results) == 1 else ModelFailed(f"{len(results)} answers for {len(calls)} requests")
        if isinstance(stacked, Exception):
            raise ModelFailed(str(stacked)) from stacked
        check_outputs(calls[0], stacked, sum(counts) if self._batched else None)
        parts = zip(*[split_rows(array, counts) for array in stacked], strict=True)
        return [InferenceResult(outputs, times) for outputs in parts]

    def _executed(self, calls: Sequence[InferenceRequest]) -> list[list[Tensor] | Exception]:
        session, first = self._processes, calls[0]
        said = [request_info.of(call, self._name, self._version) for call in calls] if session.wants_requests else ()
        return session.run_requests(
            {name: [call.tensors[name] for call in calls] for name in first.inputs},
            [output.spec.name for output in first.outputs],
            [call.rows for call in calls] if self._batched else (),
            said,
            is_wanted=self._is_wanted,
            patience_s=max(self._patient_until - self._clock(), 0.0),
            most_rows=self._most_rows if self._batched and not self._is_apart else 0,
            on_waited=self._waited,
        )

    def _waited(self, waited_ns: int) -> None:
        self._waited_ns = waited_ns

    def _apart(self, calls: Sequence[InferenceRequest], err: ModelDied) -> list[Outcome]:
        """Each call alone. Halving, as for a model that only fails, would have more processes die."""
        log.info("model %s: %d calls run alone, since their %s", self._name, len(calls), str(err).removeprefix("the "))
        self.tally.bisections += 1
        self._patient_until = self._clock() + _RESTART_WAIT_S
        self._is_apart = True
        return [self._alone(call) for call in calls]

    def _alone(self, call: InferenceRequest) -> Outcome:
        if not self._is_wanted(call):
            return DeadlineExceeded("Request timeout expired: its batch failed, and there was no time for another run")
        try:
            return self._answers([call], perf_counter_ns())[0]
        except ModelFailed as err:
            return self._failed(err)
        except ShoalError as err:
            return err

    def _checked(self, call: InferenceRequest, result: list[Tensor] | Exception, times: ExecutionTimes) -> Outcome:
        if isinstance(result, Exception):
            return result
        try:
            check_outputs(call, result, call.rows if self._batched else None)
        except ModelFailed as err:
            return self._failed(err)
        return InferenceResult(result, times)
