"""Execution of a model on another server: the rows of the requests become one remote request, which is awaited."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import cast

from kernels.stack_rows import split_rows
from services.infer.model_process.checks import check_outputs
from services.infer.remote.errors import BatchFailed
from services.infer.remote.session import RemoteBatch, RemoteSession
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.bisection import Bisection
from services.infer.scheduling.execution import Execution, ExecutionItem, expired

log = logging.getLogger(__name__)


class RemoteExecution(Execution):
    """A task_worker.AsyncExecutor. Rows are copied into the remote request, without a staging buffer."""

    def __init__(self, name: str, session: RemoteSession, signature: Signature, clock: Callable[[], float]) -> None:
        super().__init__(name, session, signature, clock)
        self._remote = session

    async def outcomes(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        """Return one outcome for each item, in order. Raises only CancelledError, which cancels the remote request."""
        try:
            return await self._attempt(batch)
        except Exception as err:
            return await self._bisect_async(batch, err) if len(batch) > 1 else [self._outcome_of_error(err)]

    async def _bisect_async(self, batch: Sequence[ExecutionItem], err: Exception) -> list[Outcome]:
        log.info(
            "model %(model)s failed for a batch of %(requests)d requests, which is bisected: %(error)s",
            {"event": "model.batch_bisected", "model": self._name, "requests": len(batch), "error": err},
        )
        bisection: Bisection[ExecutionItem, Outcome] = Bisection(self._outcome_of_error)
        outcomes = await bisection.outcomes_async(batch, self._attempt)
        self.tally.bisections += bisection.cuts
        return outcomes

    async def _attempt(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        """Run the items that are not expired or abandoned as one. Raises an error that one of them may have caused."""
        alive = self._alive(batch, self._clock())
        if not alive:
            return [expired() for _ in batch]
        try:
            outcomes: Sequence[Outcome] = await self._run_remote(alive)
        except BatchFailed as err:
            outcomes = [err.error] * len(alive)
        found = dict(zip(map(id, alive), outcomes, strict=True))
        return [found[id(item)] if id(item) in found else expired() for item in batch]

    async def _run_remote(self, alive: Sequence[ExecutionItem]) -> list[Outcome]:
        start = perf_counter_ns()
        requests = [item.request for item in alive]
        remote_request = RemoteBatch(
            {name: [cast("Tensor", request.inputs[name]) for request in requests] for name in requests[0].inputs},
            [output.spec.name for output in requests[0].outputs],
        )
        results = await self._remote.execute(remote_request, max(item.deadline for item in alive))
        return self._split(requests, results, start, perf_counter_ns())

    def _split(
        self, requests: Sequence[InferenceRequest], results: Sequence[Tensor], start: int, computed: int
    ) -> list[Outcome]:
        counts = [request.rows for request in requests]
        rows = sum(counts)
        check_outputs(requests[0], results, rows if self._batched else None)
        if len(requests) == 1:
            return [InferenceResult(results, ExecutionTimes(rows, 0, computed - start, 0))]
        parts = zip(*[split_rows(result, counts) for result in results], strict=True)
        times = ExecutionTimes(rows, 0, computed - start, perf_counter_ns() - computed)
        return [InferenceResult(outputs, times) for outputs in parts]
