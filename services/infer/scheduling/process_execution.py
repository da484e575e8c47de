"""Execution of a model in another process: rows are stacked while they are written to its memory.

rejected poison requests <── requests ──> one message ──> outputs, one by one or stacked ──> checked
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

from kernels.stack_rows import split_rows
from services.infer.model_process import request_info
from services.infer.model_process.checks import check_outputs
from services.infer.model_process.inner_calls import outer_of
from services.infer.model_process.session import ModelDied, ProcessSession
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed
from services.infer.scheduling.execution import Execution, ExecutionItem
from shoal.errors import DeadlineExceeded, ShoalError

log = logging.getLogger(__name__)

# Longest wait of a dead batch's requests for the next process.
_RESTART_WAIT_S = 30.0


class ProcessExecution(Execution):
    """Runs batches of a ProcessSession."""

    def __init__(
        self, name: str, version: int, session: ProcessSession, signature: Signature, clock: Callable[[], float]
    ) -> None:
        super().__init__(name, session, signature, clock)
        self._version = version
        self._processes = session
        self._most_rows = signature.max_batch_size
        self._items: Sequence[ExecutionItem] = ()
        self._restart_deadline = 0.0
        self._runs_one_by_one = False
        self._waited_ns = 0

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        self._items = batch
        try:
            return super().run(batch)
        finally:
            self._items = ()
            self._restart_deadline = 0.0
            self._runs_one_by_one = False

    def _has_waiting_caller(self, request: InferenceRequest | None = None) -> bool:
        """Return True while a caller waits: that of `request`, or any of the batch."""
        now = self._clock()
        items = self._items if request is None else [item for item in self._items if item.request is request]
        return any(not item.is_abandoned and now < item.expires for item in items)

    def _gather(self, requests: Sequence[InferenceRequest]) -> tuple[Mapping[str, Any], int]:
        return {}, sum(request.rows for request in requests)

    def _compute_outcomes(
        self, requests: Sequence[InferenceRequest], inputs: Mapping[str, Any], rows: int, start: int
    ) -> list[Outcome]:
        poison = self._processes.poison
        if not poison:
            return self._execute(requests, start)
        rejected = {id(request): after_s for request in requests if (after_s := poison.rejected_for_s(request))}
        outcomes = iter(self._execute([request for request in requests if id(request) not in rejected], start))
        return [
            self._processes.rejection(self._name, rejected[id(request)]) if id(request) in rejected else next(outcomes)
            for request in requests
        ]

    def _execute(self, requests: Sequence[InferenceRequest], start: int) -> list[Outcome]:
        if not requests:
            return []
        gathered = perf_counter_ns()
        try:
            results = self._call_process(requests)
        except ModelDied as err:
            # Of several requests each runs alone next, which shows the one to blame.
            if len(requests) == 1:
                self._processes.poison.record_crash(requests, is_confirmed=err.is_confirmed)
                if err.is_alone or self._runs_one_by_one:
                    raise
            return self._run_one_by_one(requests, err)
        computed = perf_counter_ns()
        counts = [request.rows for request in requests]
        waited = min(self._waited_ns, computed - gathered)
        times = ExecutionTimes(sum(counts), gathered - start, computed - gathered - waited, 0, waited)
        if len(results) == len(requests):
            return [self._checked(request, result, times) for request, result in zip(requests, results, strict=True)]
        stacked = (
            results[0] if len(results) == 1 else ModelFailed(f"{len(results)} results for {len(requests)} requests")
        )
        if isinstance(stacked, Exception):
            raise ModelFailed(str(stacked)) from stacked
        check_outputs(requests[0], stacked, sum(counts) if self._batched else None)
        parts = zip(*[split_rows(array, counts) for array in stacked], strict=True)
        return [InferenceResult(outputs, times) for outputs in parts]

    def _call_process(self, requests: Sequence[InferenceRequest]) -> list[list[Tensor] | Exception]:
        session, first = self._processes, requests[0]
        request_infos = (
            [request_info.of(request, self._name, self._version) for request in requests]
            if session.wants_requests
            else ()
        )
        return session.run_requests(
            {name: [request.tensors[name] for request in requests] for name in first.inputs},
            [output.spec.name for output in first.outputs],
            [request.rows for request in requests] if self._batched else (),
            request_infos,
            is_wanted=self._has_waiting_caller,
            patience_s=max(self._restart_deadline - self._clock(), 0.0),
            most_rows=self._most_rows if self._batched and not self._runs_one_by_one else 0,
            outer=lambda: outer_of(self._items),
            on_waited=self._record_wait,
        )

    def _record_wait(self, waited_ns: int) -> None:
        self._waited_ns = waited_ns

    def _run_one_by_one(self, requests: Sequence[InferenceRequest], err: ModelDied) -> list[Outcome]:
        """Run each request alone. Bisection would have more processes die."""
        log.info(
            "model %(model)s: %(requests)d requests run one by one after a crash: their %(reason)s",
            {
                "event": "model.run_one_by_one",
                "model": self._name,
                "requests": len(requests),
                "reason": str(err).removeprefix("the "),
            },
        )
        self.tally.bisections += 1
        self._restart_deadline = self._clock() + _RESTART_WAIT_S
        self._runs_one_by_one = True
        return [self._run_alone(request) for request in requests]

    def _run_alone(self, request: InferenceRequest) -> Outcome:
        if not self._has_waiting_caller(request):
            return DeadlineExceeded("Request timeout expired: its batch failed, and there was no time for another run")
        try:
            return self._execute([request], perf_counter_ns())[0]
        except ModelFailed as err:
            return self._model_error(err)
        except ShoalError as err:
            return err

    def _checked(self, request: InferenceRequest, result: list[Tensor] | Exception, times: ExecutionTimes) -> Outcome:
        if isinstance(result, Exception):
            return result
        try:
            check_outputs(request, result, request.rows if self._batched else None)
        except ModelFailed as err:
            return self._model_error(err)
        return InferenceResult(result, times)
