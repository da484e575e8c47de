"""An Execution whose model is in another process: rows are laid behind each other on their way there, not before.

refused (it killed its process before) <── calls ──> one message ──> answers, one by one or stacked ──> checked
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns

from kernels.stack_rows import split_rows
from services.infer.execution import Answer, Execution, Job, Outcome, Times
from services.infer.isolation import details
from services.infer.isolation.session import ModelDied, ProcessSession
from services.infer.request import Call
from services.infer.runtime import ModelFailed
from services.infer.signature import Signature, fits
from services.infer.tensors import Tensor
from services.infer.wording import written
from shoal.errors import Internal

_PATIENCE_S = 30.0
# How long the batch-mates of a call that killed the process wait for the next one.


class ProcessExecution(Execution):
    """Runs batches of a ProcessSession."""

    def __init__(
        self, name: str, version: int, session: ProcessSession, signature: Signature, clock: Callable[[], float]
    ) -> None:
        super().__init__(name, session, signature, clock)
        self._version = version
        self._processes = session
        self._jobs: Sequence[Job] = ()
        self._patient_until = 0.0

    def run(self, batch: Sequence[Job]) -> list[Outcome]:
        self._jobs = batch
        try:
            return super().run(batch)
        finally:
            self._jobs = ()
            self._patient_until = 0.0

    def _is_wanted(self) -> bool:
        now = self._clock()
        return any(not job.is_abandoned and now < job.expires for job in self._jobs)

    def _gathered(self, calls: Sequence[Call]) -> tuple[Mapping[str, Tensor], int]:
        return {}, sum(call.rows for call in calls)

    def _computed(self, calls: Sequence[Call], inputs: Mapping[str, Tensor], rows: int, start: int) -> list[Outcome]:
        poison = self._processes.poison
        if not poison:
            return self._answers(calls, start)
        refused = {id(call): after_s for call in calls if (after_s := poison.refused_for_s(call))}
        answers = iter(self._answers([call for call in calls if id(call) not in refused], start))
        return [self._refusal(refused[id(call)]) if id(call) in refused else next(answers) for call in calls]

    def _refusal(self, after_s: float) -> Internal:
        return Internal(
            f"Failed to process the request(s) for model '{self._name}': this request has ended the model's process "
            f"before; it is refused for {after_s:.0f} s"
        )

    def _answers(self, calls: Sequence[Call], start: int) -> list[Outcome]:
        if not calls:
            return []
        gathered = perf_counter_ns()
        results = self._executed(calls)
        computed = perf_counter_ns()
        counts = [call.rows for call in calls]
        times = Times(sum(counts), gathered - start, computed - gathered, 0)
        if len(results) == len(calls):
            return [self._checked(call, result, times) for call, result in zip(calls, results, strict=True)]
        (stacked,) = results
        if isinstance(stacked, Exception):
            raise ModelFailed(str(stacked)) from stacked
        self._check(calls[0], stacked, sum(counts))
        parts = zip(*[split_rows(array, counts) for array in stacked], strict=True)
        return [Answer(outputs, times) for outputs in parts]

    def _executed(self, calls: Sequence[Call]) -> list[list[Tensor] | Exception]:
        session, first = self._processes, calls[0]
        said = [details.of(call, self._name, self._version) for call in calls] if session.wants_requests else ()
        try:
            return session.run_requests(
                {name: [call.inputs[name] for call in calls] for name in first.inputs},
                [output.spec.name for output in first.outputs],
                [call.rows for call in calls] if self._batched else (),
                said,
                is_wanted=self._is_wanted,
                patience_s=max(self._patient_until - self._clock(), 0.0),
            )
        except ModelDied as err:
            session.poison.blame(calls, is_sure=err.is_sure)
            if len(self._jobs) > 1:
                self._patient_until = self._clock() + _PATIENCE_S
            raise

    def _checked(self, call: Call, result: list[Tensor] | Exception, times: Times) -> Outcome:
        if isinstance(result, Exception):
            return result
        try:
            self._check(call, result, call.rows)
        except ModelFailed as err:
            return self._failed(err)
        return Answer(result, times)

    def _check(self, call: Call, outputs: Sequence[Tensor], rows: int) -> None:
        """Raises ModelFailed when the outputs are not what the model said they would be."""
        if len(outputs) != len(call.outputs):
            raise ModelFailed(f"the model process sent {len(outputs)} outputs, expected {len(call.outputs)}")
        names = [wanted.spec.name for wanted in call.outputs]
        for name, wanted, output in zip(names, call.outputs, outputs, strict=True):
            spec = wanted.spec
            if output.dtype != spec.datatype.dtype:
                raise ModelFailed(f"output '{name}' is {output.dtype}, expected {spec.datatype.name}")
            if self._batched and output.shape[:1] != (rows,):
                raise ModelFailed(f"output '{name}' has shape {written(output.shape)} for {rows} rows")
            if spec.shape and not fits(output.shape, spec.shape):
                raise ModelFailed(f"output '{name}' has shape {written(output.shape)}, expected {written(spec.shape)}")
