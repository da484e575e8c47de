"""Execution of one batch: rows of several requests gathered, the model run once, the outputs split. Blocks.

    inputs of each request ──stack_rows──> staging buffers ──session.run──> outputs ──slices──> views for each request

Abandoned and expired requests are left out up to the moment of the run. A batch that fails is bisected
(`bisection`), so that only the requests that cause the failure fail.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Protocol, cast

import numpy as np

from kernels.stack_rows import split_rows, stack_rows
from services.infer.requests.outcome import ExecutionTimes, InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest, RunningRequest
from services.infer.requests.resident import is_resident, joined
from services.infer.requests.signature import Signature
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.bisection import Bisection
from shoal.errors import DeadlineExceeded, Internal
from shoal.oip.tensors import shape_text

log = logging.getLogger(__name__)

# A staging buffer beyond this is freed after its batch: one huge batch should not hold memory for ever.
_KEPT_BYTES = 16 << 20


class ExecutionItem(RunningRequest, Protocol):
    """A queued request as an execution sees it."""

    @property
    def expires(self) -> float: ...


@dataclass(slots=True)
class Tally:
    """Counts of an execution since they were last read."""

    bisections: int = 0
    """Failed batches that were split in two."""
    expired_rows: int = 0
    """Rows executed after their deadline: always 0, unless this module has a bug."""


class Executor(Protocol):
    """Runs batches, one at a time: an Execution, or a wrapper of one."""

    tally: Tally
    may_run_on_loop: bool
    may_not_end: bool
    """True when values decide how long a run takes: it is to be given up when no caller waits any more."""

    def give_up(self) -> None:
        """End the run in progress early; its requests fail. Called while one is. Only with `may_not_end`."""

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        """Return one outcome for each item, in order. Never raises."""


class Execution:
    """Runs batches of one model version, one at a time; owns the staging buffers."""

    def __init__(self, name: str, session: Session, signature: Signature, clock: Callable[[], float]) -> None:
        """Run batches in `session`; expiry is measured on `clock`."""
        self._name = name
        self._session = session
        self._batched = signature.max_batch_size > 0
        self._clock = clock
        self._staging: dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}
        self.tally = Tally()
        self.may_run_on_loop = session.only_computes
        """True when the model only computes: a short run may block the event loop."""
        self.may_not_end = session.may_not_end
        self._given_up = GivenUp()

    def give_up(self) -> None:
        self._given_up.set("no caller waits")

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        """Return one outcome for each item, in order. Never raises."""
        outcomes: list[Outcome] = []
        if self._given_up():
            self._given_up = GivenUp()
        try:
            try:
                outcomes = self._run(batch)
            except Exception as err:
                outcomes = self._bisect(batch, err) if len(batch) > 1 else [self._outcome_of_error(err)]
            if len(outcomes) != len(batch):
                raise RuntimeError(f"model {self._name}: {len(outcomes)} outcomes for {len(batch)} requests")
        except Exception as err:
            outcomes = [err] * len(batch)
        # For example a model that calls exit(): its callers get an error, and its worker goes on.
        except BaseException as err:
            outcomes = [RuntimeError(f"model {self._name}: {type(err).__name__}: {err}")] * len(batch)
        if self._staging:
            self._free_large_buffers()
        return outcomes

    def _bisect(self, batch: Sequence[ExecutionItem], err: Exception) -> list[Outcome]:
        log.info(
            "model %(model)s failed for a batch of %(requests)d requests, which is bisected: %(error)s",
            {"event": "model.batch_bisected", "model": self._name, "requests": len(batch), "error": err},
        )
        bisection: Bisection[ExecutionItem, Outcome] = Bisection(self._outcome_of_error)
        outcomes = bisection.outcomes(batch, self._run)
        self.tally.bisections += bisection.cuts
        return outcomes

    def _outcome_of_error(self, err: Exception) -> Outcome:
        # The caller gets the model's own error. Any other error is logged in full, and the caller gets a fixed text.
        return self._model_error(err) if isinstance(err, ModelFailed) else err

    def _model_error(self, err: ModelFailed) -> Internal:
        return Internal(f"Failed to process the request(s) for model '{self._name}': {err}")

    def _run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        """Run the items that are not expired or abandoned as one. Raises what the model raises."""
        alive = self._alive(batch, self._clock())
        while alive:
            start = perf_counter_ns()
            requests = [item.request for item in alive]
            inputs, rows = self._gather(requests)
            # Gathering large inputs takes a while: requests that expired meanwhile are left out, too.
            now = self._clock()
            still_alive = self._alive(alive, now)
            if len(still_alive) < len(alive):
                alive = still_alive
                continue
            self._count_expired(alive, now)
            outcomes = self._compute_outcomes(requests, inputs, rows, start)
            if len(alive) == len(batch):
                return outcomes
            found = dict(zip(map(id, alive), outcomes, strict=True))
            return [found[id(item)] if id(item) in found else expired() for item in batch]
        return [expired() for _ in batch]

    def _alive(self, batch: Sequence[ExecutionItem], now: float) -> Sequence[ExecutionItem]:
        if any(item.is_abandoned for item in batch) or min([item.expires for item in batch]) <= now:
            return [item for item in batch if not item.is_abandoned and now < item.expires]
        return batch

    def _count_expired(self, batch: Sequence[ExecutionItem], now: float) -> None:
        """Count expired rows that are about to run: a check of `_run`."""
        if min([item.expires for item in batch]) <= now:
            self.tally.expired_rows += sum(item.request.rows for item in batch if item.expires <= now)

    def _gather(self, requests: Sequence[InferenceRequest]) -> tuple[Mapping[str, Any], int]:
        """Return the model's inputs and the number of rows."""
        if len(requests) == 1:
            return requests[0].tensors, requests[0].rows
        return self._stack(requests, requests[0].inputs)

    def _stack(self, requests: Sequence[InferenceRequest], names: Iterable[str]) -> tuple[dict[str, Tensor], int]:
        """Return the named inputs of all requests, each stacked in one buffer; those of a single request unchanged."""
        if len(requests) == 1:
            return {name: requests[0].tensors[name] for name in names}, requests[0].rows
        inputs: dict[str, Any] = {}
        rows = sum([request.rows for request in requests])
        for name in names:
            parts = [request.tensors[name] for request in requests]
            # Requests with one key have all or none of an input on the GPU: there the parts are joined.
            if is_resident(parts[0]):
                inputs[name] = joined(cast("list[Any]", parts))
                continue
            inputs[name] = stack_rows(parts, self._buffer(name, parts[0], rows))
        return inputs, rows

    def _compute_outcomes(
        self, requests: Sequence[InferenceRequest], inputs: Mapping[str, Any], rows: int, start: int
    ) -> list[Outcome]:
        gathered = perf_counter_ns()
        names = [output.spec.name for output in requests[0].outputs]
        results = self._run_session(requests[0], inputs, names)
        computed = perf_counter_ns()
        if self._batched:
            self._check_rows(names, results, rows)
        if len(requests) == 1:
            return [InferenceResult(results, ExecutionTimes(rows, gathered - start, computed - gathered, 0))]
        counts = [request.rows for request in requests]
        parts = (
            zip(*[split_rows(result, counts) for result in results], strict=True) if results else [()] * len(requests)
        )
        times = ExecutionTimes(rows, gathered - start, computed - gathered, perf_counter_ns() - computed)
        return [InferenceResult(outputs, times) for outputs in parts]

    def _run_session(self, like: InferenceRequest, inputs: Mapping[str, Any], names: Sequence[str]) -> Sequence[Any]:
        """Return the model's outputs; `like` is any of the requests."""
        if self.may_not_end:
            return self._session.run_until(inputs, names, self._given_up)
        return self._session.run(inputs, names)

    def _buffer(self, name: str, like: Tensor, rows: int) -> Tensor:
        shape = (rows, *like.shape[1:])
        if like.dtype == object:
            return np.empty(shape, object)
        size = math.prod(shape) * like.dtype.itemsize
        memory = self._staging.get(name)
        if memory is None or memory.nbytes < size:
            # Grown to a power of two, so that batches of changing size soon fit.
            memory = self._staging[name] = np.empty(1 << max(size - 1, 1).bit_length(), np.uint8)
        return memory[:size].view(like.dtype).reshape(shape)

    def _free_large_buffers(self) -> None:
        for name in [name for name, memory in self._staging.items() if memory.nbytes > _KEPT_BYTES]:
            del self._staging[name]

    def _check_rows(self, names: Sequence[str], results: Sequence[Tensor], rows: int) -> None:
        for name, result in zip(names, results, strict=True):
            if result.shape[:1] != (rows,):
                raise ModelFailed(
                    f"output '{name}' has shape {shape_text(result.shape)} for {rows} rows: its first dimension is no "
                    "batch; set max_batch_size to 0 in the model's configuration"
                )


def gpu_resident_outputs(request: InferenceRequest) -> frozenset[str]:
    """Return the names of the outputs that may stay on a GPU."""
    return frozenset([output.spec.name for output in request.outputs if output.stays])


def expired() -> DeadlineExceeded:
    """Return the outcome of a request that expired before its run."""
    return DeadlineExceeded("Request timeout expired in the queue: it was not executed")
