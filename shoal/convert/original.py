"""A model as its own framework has it: what a converter must know of one. A contract suite holds every format to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = dict[str, Array]
"""Arrays by the name of the input or output."""


def row_count(call: Tensors) -> int:
    """Rows of a call with one input or more; 1 where they have no dimensions."""
    first = next(iter(call.values()))
    return len(first) if first.ndim else 1


ANY = 1 << 30
"""Rows of a call to a model that takes any number."""


@dataclass(frozen=True)
class Port:
    """One input of the converted model."""

    name: str
    dtype: np.dtype[Any]
    """As it will be served. Text is `object`."""
    shape: tuple[int | None, ...]
    """None: any size."""


@dataclass(frozen=True)
class Plan:
    """One way to convert a model; the first whose answers are near enough is taken."""

    name: str
    """For the report, such as `float32 arithmetic`."""
    is_precise: bool = False
    """Compute in float64 inside, whatever the inputs are."""


class Original(Protocol):
    """A model in its own framework. It may take and give float64; the converted one is served in `inputs`' dtypes."""

    @property
    def framework(self) -> str:
        """Its name, such as `scikit-learn`."""

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions of the framework and of the exporter."""

    @property
    def inputs(self) -> Sequence[Port]:
        """In the order of the model."""

    @property
    def is_batched(self) -> bool:
        """The first dimension of every input and output is the batch, of any size."""

    @property
    def most_rows(self) -> int:
        """Rows of a call at most."""

    @property
    def scores(self) -> frozenset[str]:
        """Outputs `[rows, classes]` whose largest element is the label."""

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """Names of the classes, by the output that has one element for each."""

    @property
    def plans(self) -> Sequence[Plan]:
        """The ways to convert it, cheapest to serve first."""

    @property
    def batches(self) -> Sequence[int]:
        """Rows of each call of a check on random rows."""

    @property
    def notes(self) -> Sequence[str]:
        """What the person who brings it should know."""

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Random rows that reach into the corners of this model: near its thresholds, missing values where it takes
        them. Every value is one that `inputs`' dtypes can hold."""

    def answer(self, inputs: Mapping[str, Array]) -> Tensors:
        """What the framework itself answers, by the converted model's output names, in its order of outputs.

        Raises:
            InvalidArgument: the model does not take these inputs.
        """

    def export(self, plan: Plan) -> onnx.ModelProto:
        """The model as ONNX, with the inputs of `inputs` and the outputs of `answer`.

        Raises:
            FailedPrecondition: the exporter cannot; the message has its words.
        """
