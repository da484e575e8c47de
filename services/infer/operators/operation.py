"""What an operation is: rows in, rows out.

    inputs ──run──> Results: a value for each output, and what is wrong with the rows that could not be processed

A row that is unfit (a broken image, text that is not UTF-8) fails its own request and nobody else's: nothing is run
again for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from services.infer.operators.assets import Assets
from services.infer.operators.devices import DeviceSlot
from services.infer.operators.threads import RowThreads
from services.infer.requests.ragged import Value
from services.infer.requests.signature import TensorSpec
from shoal.oip.datatypes import BY_NAME

R = TypeVar("R")
S = TypeVar("S")


class Unfit(Exception):
    """A row that cannot be processed. The message is for the caller: which input, what is wrong, what is expected."""


@dataclass(frozen=True)
class Results:
    """What an operation made of its rows."""

    values: Mapping[str, Value]
    """By output, one row for each row that came, also for those that are unfit: theirs mean nothing."""
    unfit: Mapping[int, str] = field(default_factory=dict)
    """What is wrong, by row."""


@dataclass(frozen=True)
class Setting:
    """Where an operation is, and what it has there."""

    assets: Assets
    threads: RowThreads
    place: DeviceSlot


class Operation(Protocol):
    """One operation with its parameters. Safe to run on several threads at the same time."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def is_batched(self) -> bool:
        """The first dimension is the rows of a batch, each independent of the others. Else a call is run by itself."""

    @property
    def only_computes(self) -> bool:
        """Its time is in proportion to what it is given, and small: it may be run on the event loop."""

    def run(self, inputs: Mapping[str, Value]) -> Results:
        """Runs the rows of one execution: `Rows` for each input that is ragged, tensors for the others."""

    def example(self) -> Mapping[str, Value]:
        """Inputs that suit it, small ones: it is run with them before it serves."""


def spec(name: str, datatype: str, *dims: int, ragged: bool = False, optional: bool = False) -> TensorSpec:
    """An input or output with rows of these dimensions."""
    return TensorSpec(name, BY_NAME[datatype], (-1, *dims), is_ragged=ragged, is_optional=optional)


def each(
    rows: Sequence[S], work: Callable[[S], R], threads: RowThreads | None, instead: R
) -> tuple[list[R], dict[int, str]]:
    """`work` for each row, side by side, or without threads one by one; `instead` where it raises Unfit, and why."""
    unfit: dict[int, str] = {}

    def tried(numbered: tuple[int, S]) -> R:
        number, row = numbered
        try:
            return work(row)
        except Unfit as err:
            unfit[number] = str(err)
            return instead

    numbered = list(enumerate(rows))
    return threads.map(tried, numbered) if threads is not None else [tried(row) for row in numbered], unfit
