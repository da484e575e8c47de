"""One execution: rows of several calls gathered, the model run once, the answers cut apart. On a worker thread.

    inputs of each call ──stack_rows──> staging buffers ──session.run──> outputs ──split_rows──> views, one per call

A call that nobody waits for any more, or whose time is over, is left out up to the moment of the run. When a batch
fails, each of its calls is run alone, so that only the guilty one fails.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from kernels.stack_rows import split_rows, stack_rows
from services.infer.request import Call
from services.infer.runtime import ModelFailed, Session
from services.infer.signature import Signature
from services.infer.tensors import Tensor
from services.infer.wording import written
from shoal.errors import DeadlineExceeded, Internal

log = logging.getLogger(__name__)

_KEPT_BYTES = 16 << 20
# A staging buffer beyond this is given back after its batch: one huge batch should not cost memory for ever.


class Job(Protocol):
    """What an execution needs of a waiting call."""

    @property
    def call(self) -> Call: ...

    def is_dead(self, now: float) -> bool: ...


@dataclass(frozen=True)
class Times:
    """How long the parts of an execution took, in nanoseconds; and how many rows it had."""

    rows: int = 0
    gather_ns: int = 0
    compute_ns: int = 0
    scatter_ns: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of one call: outputs in the order it asked for them, or an error."""

    outputs: Sequence[Tensor] = ()
    error: Exception | None = None
    times: Times = field(default_factory=Times)


class Execution:
    """Runs batches of one model version, one at a time: it owns the buffers that rows are gathered in."""

    def __init__(self, name: str, session: Session, signature: Signature, clock: Callable[[], float]) -> None:
        """`clock` is the one that expiry is measured on."""
        self._name = name
        self._session = session
        self._batched = signature.max_batch_size > 0
        self._clock = clock
        self._staging: dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}

    def run(self, batch: Sequence[Job]) -> list[Outcome]:
        """One outcome for each job, in order. Never raises."""
        outcomes: list[Outcome] = [_EXPIRED] * len(batch)
        now = self._clock()
        alive = [n for n, job in enumerate(batch) if not job.is_dead(now)]
        if not alive:
            return outcomes
        for n, outcome in zip(alive, self._run_alive([batch[n] for n in alive]), strict=True):
            outcomes[n] = outcome
        self._give_back()
        return outcomes

    def _run_alive(self, batch: Sequence[Job]) -> list[Outcome]:
        try:
            return self._run_together([job.call for job in batch])
        except ModelFailed as err:
            if len(batch) > 1:
                log.info(
                    "model %s failed for a batch of %d calls, which now run alone: %s", self._name, len(batch), err
                )
                return [outcome for job in batch for outcome in self.run([job])]
            message = f"Failed to process the request(s) for model '{self._name}': {err}"
            return [Outcome(error=Internal(message))]
        except Exception as err:  # A fault of ours: the front tells the log everything and the caller little.
            return [Outcome(error=err) for _ in batch]

    def _run_together(self, calls: Sequence[Call]) -> list[Outcome]:
        start = perf_counter_ns()
        counts = [call.rows for call in calls]
        inputs = calls[0].inputs if len(calls) == 1 else self._gathered(calls, sum(counts))
        gathered = perf_counter_ns()
        names = [output.spec.name for output in calls[0].outputs]
        results = self._session.run(inputs, names)
        computed = perf_counter_ns()
        if self._batched:
            self._check_rows(names, results, sum(counts))
        split = [split_rows(result, counts) for result in results] if len(calls) > 1 else [[r] for r in results]
        times = Times(sum(counts), gathered - start, computed - gathered, perf_counter_ns() - computed)
        return [Outcome([views[n] for views in split], None, times) for n in range(len(calls))]

    def _gathered(self, calls: Sequence[Call], rows: int) -> dict[str, Tensor]:
        inputs = {}
        for name, first in calls[0].inputs.items():
            out = self._buffer(name, first, rows)
            inputs[name] = stack_rows([call.inputs[name] for call in calls], out)
        return inputs

    def _buffer(self, name: str, like: Tensor, rows: int) -> Tensor:
        shape = (rows, *like.shape[1:])
        if like.dtype == object:
            return np.empty(shape, object)
        size = math.prod(shape) * like.dtype.itemsize
        memory = self._staging.get(name)
        if memory is None or memory.nbytes < size:
            # Grown to a power of two, so that batches of changing size soon find it large enough.
            memory = self._staging[name] = np.empty(1 << max(size - 1, 1).bit_length(), np.uint8)
        return memory[:size].view(like.dtype).reshape(shape)

    def _give_back(self) -> None:
        for name in [name for name, memory in self._staging.items() if memory.nbytes > _KEPT_BYTES]:
            del self._staging[name]

    def _check_rows(self, names: Sequence[str], results: Sequence[Tensor], rows: int) -> None:
        for name, result in zip(names, results, strict=True):
            if result.shape[:1] != (rows,):
                raise ModelFailed(
                    f"output '{name}' has shape {written(result.shape)} for {rows} rows: its first dimension is no "
                    "batch; set max_batch_size to 0 in the model's configuration"
                )


_EXPIRED = Outcome(error=DeadlineExceeded("Request timeout expired in the queue: it was not executed"))
