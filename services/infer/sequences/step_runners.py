"""Runners of one step of several sequences: rows into a session, outputs and new states back, row by row. Block.

rows ──columns──> inputs, states, controls ──session──> outputs, states ──split──> StepResult, one for each step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from services.infer.model_process.inner_calls import OuterCall
from services.infer.model_process.instance import Runner
from services.infer.model_process.session import ProcessSession
from services.infer.requests.signature import fits
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.sequences.rows import Row, columns
from services.infer.sequences.settings import SequenceSettings
from shoal.oip.tensors import shape_text


@dataclass(frozen=True)
class StepResult:
    """Outputs and new states of one step."""

    outputs: Sequence[Tensor]
    """In the order of the requested outputs."""
    states: Mapping[str, Tensor]
    """For the next step, by the names of the model's inputs."""


Results: TypeAlias = "list[StepResult | Exception]"
"""One for each row with a step, in order."""


class _RowFormat:
    """Conversion of rows to tensors and back, common to all runners."""

    def __init__(self, settings: SequenceSettings, *, batched: bool, text: bool) -> None:
        self.settings, self.batched, self.text = settings, batched, text

    def columns(self, rows: Sequence[Row | None]) -> dict[str, list[Tensor]]:
        return columns(rows, self.settings, batched=self.batched, text=self.text)

    def output_names(self, outputs: Sequence[str]) -> list[str]:
        """Return the outputs to request from the model: those of the client and the states."""
        return list(dict.fromkeys((*outputs, *(state.output for state in self.settings.states))))

    def result_of_row(self, outputs: Sequence[str], results: Mapping[str, Tensor]) -> StepResult:
        """Return the result of one row. Raises ModelFailed when a state does not match the configuration."""
        states = {}
        for state in self.settings.states:
            array = results[state.output]
            dims = array.shape[int(self.batched) :]
            if array.dtype != state.datatype.dtype or not fits(dims, state.dims):
                raise ModelFailed(
                    f"state '{state.output}' is {array.dtype} {shape_text(dims)}, "
                    f"expected {state.datatype.name} {shape_text(state.dims)}"
                )
            # A copy: a view would keep the whole batch in memory for as long as one of its sequences is idle.
            states[state.input] = array.copy()
        return StepResult([results[name] for name in outputs], states)

    def split(self, rows: Sequence[Row | None], outputs: Sequence[str], results: Mapping[str, Tensor]) -> Results:
        """Return the result of each row with a step, from stacked outputs."""
        if not self.batched:
            return [self.result_of_row(outputs, results)]
        for name, array in results.items():
            if array.shape[:1] != (len(rows),):
                raise ModelFailed(
                    f"output '{name}' has shape {shape_text(array.shape)} for {len(rows)} rows: its first dimension is "
                    "no batch; set max_batch_size to 0 in the model's configuration"
                )
        return [
            self.result_of_row(outputs, {name: array[n : n + 1] for name, array in results.items()})
            for n, row in enumerate(rows)
            if row is not None
        ]


class SessionSteps:
    """Runs steps in a session of this process."""

    def __init__(self, session: Session, settings: SequenceSettings, *, batched: bool) -> None:
        self._session = session
        self._format = _RowFormat(settings, batched=batched, text=session.text)

    def run(self, rows: Sequence[Row | None], outputs: Sequence[str]) -> Results:
        """Run rows that can be stacked, at least one of which belongs to a sequence.

        Raises:
            ModelFailed: the model cannot process them.
        """
        columns = self._format.columns(rows)
        inputs = {name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for name, arrays in columns.items()}
        output_names = self._format.output_names(outputs)
        results = dict(zip(output_names, self._session.run(inputs, output_names), strict=True))
        return self._format.split(rows, outputs, results)


class ProcessSteps:
    """Runs steps in the model's own process."""

    def __init__(self, session: ProcessSession, settings: SequenceSettings, *, batched: bool) -> None:
        self._session = session
        self._format = _RowFormat(settings, batched=batched, text=session.text)
        self.on: Runner | None = None
        """The process; None: any free one."""
        self.is_wanted: Callable[[], bool] = lambda: True
        self.outer: Callable[[], OuterCall] = OuterCall

    def run(self, rows: Sequence[Row | None], outputs: Sequence[str]) -> Results:
        """Run rows as `SessionSteps.run` does.

        Raises:
            ModelDied: the process ended, and the model's memory with it.
            ModelFailed: the model cannot process the rows.
        """
        output_names = self._format.output_names(outputs)
        results = self._session.run_requests(
            self._format.columns(rows),
            output_names,
            [1] * len(rows) if self._format.batched else (),
            [row.request_info if row is not None else {} for row in rows] if self._session.wants_requests else (),
            is_wanted=self.is_wanted,
            on=self.on,
            outer=self.outer,
        )
        if len(results) == len(rows):
            pairs = zip(rows, results, strict=True)
            return [self._step_result(outputs, output_names, result) for row, result in pairs if row is not None]
        stacked = results[0] if len(results) == 1 else ModelFailed(f"{len(results)} results for {len(rows)} requests")
        if isinstance(stacked, Exception):
            raise ModelFailed(str(stacked)) from stacked
        return self._format.split(rows, outputs, dict(zip(output_names, stacked, strict=True)))

    def _step_result(
        self, outputs: Sequence[str], output_names: Sequence[str], result: list[Tensor] | Exception
    ) -> StepResult | Exception:
        if isinstance(result, Exception):
            return result
        try:
            if len(result) != len(output_names):
                raise ModelFailed(f"the model process sent {len(result)} outputs, expected {len(output_names)}")
            return self._format.result_of_row(outputs, dict(zip(output_names, result, strict=True)))
        except ModelFailed as err:
            return err


def runner_of(session: Session, settings: SequenceSettings, *, batched: bool) -> SessionSteps | ProcessSteps:
    """Return the runner of a session's steps."""
    if isinstance(session, ProcessSession):
        return ProcessSteps(session, settings, batched=batched)
    return SessionSteps(session, settings, batched=batched)
