"""Execution of a session that takes rows of any shapes, and reports the rows that it cannot process.

inputs of each request ──stacked; a list of rows where ragged──> run_rows ──> values, split by requests
                                                                        └──> unfit rows: their requests fail
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from time import perf_counter_ns
from typing import Any

from services.infer.requests import ragged
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.execution import Execution, gpu_resident_outputs
from shoal.errors import InvalidArgument


class RowsExecution(Execution):
    """Runs batches of a session that `takes_rows`."""

    def __init__(self, name: str, session: Session, signature: Signature, clock: Callable[[], float]) -> None:
        super().__init__(name, session, signature, clock)
        self._rows_session = session
        self._ragged = signature.ragged

    def _gather(self, requests: Sequence[InferenceRequest]) -> tuple[Mapping[str, Any], int]:
        names = requests[0].inputs.keys()
        stacked, rows = self._stack(requests, names - self._ragged)
        joined = {name: ragged.joined(request.inputs[name] for request in requests) for name in names & self._ragged}
        return {**stacked, **joined}, rows

    def _compute_outcomes(
        self, requests: Sequence[InferenceRequest], inputs: Mapping[str, Any], rows: int, start: int
    ) -> list[Outcome]:
        gathered = perf_counter_ns()
        names = [output.spec.name for output in requests[0].outputs]
        results = self._rows_session.run_rows(inputs, names, gpu_resident_outputs(requests[0]))
        computed = perf_counter_ns()
        times = ExecutionTimes(rows, gathered - start, computed - gathered, 0)
        if not self._batched:
            return [self._outcome(requests[0], list(results.values), times, results.unfit, 0)]
        for name, value in zip(names, results.values, strict=True):
            if len(value) != rows:
                raise ModelFailed(f"output '{name}' has {len(value)} rows for {rows}")
        counts = [request.rows for request in requests]
        parts = zip(*[ragged.parted(value, counts) for value in results.values], strict=True)
        starts = [0, *accumulate(counts)]
        return [
            self._outcome(request, outputs, times, results.unfit, start)
            for request, outputs, start in zip(requests, parts, starts, strict=False)
        ]

    def _outcome(
        self,
        request: InferenceRequest,
        outputs: Sequence[ragged.Value],
        times: ExecutionTimes,
        unfit: Mapping[int, str],
        start: int,
    ) -> Outcome:
        wrong = next((n for n in range(start, start + request.rows) if n in unfit), None) if unfit else None
        if wrong is None:
            return InferenceResult(outputs, times)
        row = f", row {wrong - start}" if request.rows > 1 else ""
        return InvalidArgument(f"model '{self._name}'{row}: {unfit[wrong]}")
