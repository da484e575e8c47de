"""Interface of a model in its own framework. A contract suite checks every implementation."""

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
    """Return the number of rows of a call with at least one input; 1 for scalars."""
    first = next(iter(call.values()))
    return len(first) if first.ndim else 1


ANY = 1 << 30
"""Value of `max_rows` for a model without limit."""


@dataclass(frozen=True)
class Port:
    """One input or output of the converted model."""

    name: str
    dtype: np.dtype[Any]
    """Served type; text is `object`."""
    shape: tuple[int | None, ...]
    """Sizes; None for a variable size."""


@dataclass(frozen=True)
class Plan:
    """One way to convert a model."""

    name: str
    """Name in the report, such as `float32 arithmetic`."""
    is_precise: bool = False
    """True: compute in float64, whatever the types of the inputs are."""


class Original(Protocol):
    """A model in its own framework. `predict` may use float64; the converted model is served with `inputs`' types."""

    @property
    def framework(self) -> str:
        """Name of the framework, such as `scikit-learn`."""

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions of the framework and of the exporter."""

    @property
    def inputs(self) -> Sequence[Port]:
        """Inputs in the model's order."""

    @property
    def is_batched(self) -> bool:
        """True when the first dimension of every input and output is a batch of any size."""

    @property
    def max_rows(self) -> int:
        """Largest number of rows in a call."""

    @property
    def scores(self) -> frozenset[str]:
        """Outputs `[rows, classes]` whose largest element determines the label."""

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """Names of the classes, by the output that has one element for each class."""

    @property
    def plans(self) -> Sequence[Plan]:
        """Ways to convert the model, cheapest to serve first."""

    @property
    def batches(self) -> Sequence[int]:
        """Number of rows in each call of a check with random rows."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the user."""

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        """Return random rows that test critical values: near thresholds, and missing where the model takes missing
        values. Every value fits the types of `inputs`."""

    def predict(self, inputs: Mapping[str, Array]) -> Tensors:
        """Return the framework's own outputs, by the converted model's output names and in that order.

        Raises:
            InvalidArgument: the model does not take these inputs.
        """

    def export(self, plan: Plan) -> onnx.ModelProto:
        """Return the model as ONNX, with the inputs of `inputs` and the outputs of `predict`.

        Raises:
            FailedPrecondition: the exporter does not support the model; the message has its reason.
        """
