"""Protocol of an operation, with its results and its context.

    inputs ──run──> Results: a value for each output, and an error for each row that could not be processed

An unfit row (a damaged image, text that is not UTF-8) fails only its own request; the other rows are not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from services.infer.operators.assets import Assets
from services.infer.operators.devices import OperationDevice
from services.infer.operators.threads import RowThreads
from services.infer.requests.ragged import Value
from services.infer.requests.signature import TensorSpec
from shoal.oip.datatypes import BY_NAME

R = TypeVar("R")
S = TypeVar("S")


class Unfit(Exception):
    """A row that cannot be processed. The message is for the caller: the input, the error, the expected value."""


@dataclass(frozen=True)
class Results:
    """Outputs of an operation, and the errors of its unfit rows."""

    values: Mapping[str, Value]
    """By output, one row for each input row. The rows of unfit inputs are placeholders."""
    unfit: Mapping[int, str] = field(default_factory=dict)
    """Error message by unfit row."""


@dataclass(frozen=True)
class OperationContext:
    """Resources of an operation: files, threads and the device."""

    assets: Assets
    threads: RowThreads
    device: OperationDevice


class Operation(Protocol):
    """One operation with its parameters. Safe to run on several threads at the same time."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def is_batched(self) -> bool:
        """True when the first dimension is a batch of independent rows. Otherwise requests are not batched."""

    @property
    def only_computes(self) -> bool:
        """True when the run time is short and proportional to the input: `run` may run on the event loop."""

    def run(self, inputs: Mapping[str, Value]) -> Results:
        """Run the rows of one execution. Ragged inputs are `Rows`, other inputs tensors."""

    def example(self) -> Mapping[str, Value]:
        """Return small valid inputs, for a run before the operation serves."""


def spec(name: str, datatype: str, *dims: int, ragged: bool = False, optional: bool = False) -> TensorSpec:
    """Return the spec of an input or output with rows of these dimensions."""
    return TensorSpec(name, BY_NAME[datatype], (-1, *dims), is_ragged=ragged, is_optional=optional)


def map_rows(
    rows: Sequence[S], work: Callable[[S], R], threads: RowThreads | None, placeholder: R
) -> tuple[list[R], dict[int, str]]:
    """Apply `work` to each row, in parallel when there are threads.

    Returns:
        the results, with `placeholder` for each row where `work` raises Unfit; and the error messages by unfit row.
    """
    unfit: dict[int, str] = {}

    def attempt(numbered: tuple[int, S]) -> R:
        number, row = numbered
        try:
            return work(row)
        except Unfit as err:
            unfit[number] = str(err)
            return placeholder

    numbered = list(enumerate(rows))
    return threads.map(attempt, numbered) if threads is not None else [attempt(row) for row in numbered], unfit
