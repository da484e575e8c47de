"""A stateful model as a session without states and controls: each row is a sequence of one step.

Warm-up and canary run this session, and need not know sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.sequences import step_runners
from services.infer.sequences.rows import Row
from services.infer.sequences.settings import SequenceSettings, client_tensors
from shoal.errors import ShoalError

_ID = 1


class TrialSession(Session):
    """Runs single steps for `services.infer.loading.warmup`. The owner of the wrapped session closes it."""

    def __init__(
        self, session: Session, settings: SequenceSettings, first: Mapping[str, Tensor], *, batched: bool
    ) -> None:
        """Wrap `session`; `first` are the states that a sequence begins with."""
        self.inputs = client_tensors(session.inputs, settings.inputs)
        self.outputs = session.outputs
        self.text = session.text
        self._parts = [
            self if part is session else TrialSession(part, settings, first, batched=batched)
            for part in session.device_sessions()
        ]
        self._first, self._batched = first, batched
        self._steps = step_runners.runner_of(session, settings, batched=batched)

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        rows = len(next(iter(inputs.values()))) if self._batched and inputs else 1
        results = self._steps.run([self._row(inputs, n) for n in range(rows)], outputs)
        for result in results:
            if isinstance(result, Exception):
                raise ModelFailed(result.message if isinstance(result, ShoalError) else str(result)) from result
        found = [result.outputs for result in results if isinstance(result, step_runners.StepResult)]
        if rows == 1:
            return list(found[0])
        return [np.concatenate(column) for column in zip(*found, strict=True)]

    def _row(self, inputs: Mapping[str, Tensor], n: int) -> Row:
        own = {name: array[n : n + 1] for name, array in inputs.items()} if self._batched else inputs
        # Both flags, so that a model that remembers sequences forgets this one. The id is the same in each run: outputs
        # may depend on it.
        return Row(own, True, True, _ID, self._first, {"correlation_id": _ID, "flags": 3})

    def device_sessions(self) -> Sequence[Session]:
        return self._parts

    def close(self) -> None: ...
